"""What an offline run of wandb has left, read back from its files by code of its own."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class OfflinePart:
    """A part of a run: what one start of it has left."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)  # messages of protobuf
    metrics: list[Any] = field(default_factory=list)  # definitions of them, messages
    run: Any = None  # a message
    exit_code: int | None = None

    def artifact(self, kind: str) -> Any:
        """The one artifact of a kind."""
        (found,) = (artifact for artifact in self.artifacts if artifact.type == kind)
        return found

    def steps_with(self, key: str) -> list[int]:
        return [row["trainer/global_step"] for row in self.rows if key in row]

    def table(self, key: str) -> dict[str, Any]:
        """The one table under a key: columns and data."""
        (place,) = (row[f"{key}/path"] for row in self.rows if f"{key}/path" in row)
        table: dict[str, Any] = json.loads((self.path.parent / "files" / place).read_text())
        return table


def offline_records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: a 7 byte header, then a log in LevelDB's format.

    Blocks of 32 KiB hold chunks with a header of checksum (4 bytes), length (2) and type (1: whole,
    2: first, 3: middle, 4: last); the rest of a block that cannot hold a header is padding.
    """
    for record, _ in _placed_records(path.read_bytes()):
        yield record


def record_ends(path: Path) -> list[int]:
    """The places behind the records of a `.wandb` file."""
    return [end for _, end in _placed_records(path.read_bytes())]


def has_whole_records(path: Path) -> bool:
    """Whether a `.wandb` file ends with a record, and not in the middle of one."""
    return record_ends(path)[-1:] == [path.stat().st_size]


def _placed_records(data: bytes) -> Iterator[tuple[bytes, int]]:
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data) or not kind:
            return  # still being written, or cut off
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts, at
            parts = b""


def read_part(path: Path) -> OfflinePart:
    """What is in a `.wandb` file, as far as it is whole."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    part = OfflinePart(path)
    for data in offline_records(path):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(data)
        except DecodeError:  # the end of a file that was cut off
            break
        kind = record.WhichOneof("record_type")
        if kind == "history":
            part.rows.append(_values(record.history.item))
        elif kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            part.config.update({item.key: json.loads(item.value_json) for item in updates})
            part.run = record.run if kind == "run" else part.run
        elif kind == "summary":
            part.summary.update(_values(record.summary.update))
        elif kind == "artifact":
            part.artifacts.append(record.artifact)
        elif kind == "metric":
            part.metrics.append(record.metric)
        elif kind == "exit":
            part.exit_code = record.exit.exit_code
    return part


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_parts(folder: Path, *, whole: bool = True) -> list[OfflinePart]:
    """The parts of the run in a folder, in the order of their starts; wandb's own process writes.

    Args:
        folder: of the run, with its id in `wandb_id`.
        whole: wait until the last of them has its end.
    """
    run_id = (folder / "wandb_id").read_text().strip()
    paths = sorted(folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    if whole:
        wait_until_written(paths[-1])
    return [read_part(path) for path in paths]


def wait_until_written(path: Path) -> None:
    """Wait for wandb's own process, which writes the end of the run last."""
    deadline = time.monotonic() + 60
    while read_part(path).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.05)
