"""Reads the `.wandb` files of a run's parts, each as far as it is whole."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siftclip.errors import InputError, is_finite
from siftclip.reading import open_file
from siftclip.trainer.runtime.tracking.metric_names import STEP_KEY
from siftclip.writing import atomic_path, move

log = logging.getLogger(__name__)

_OFFLINE = "offline-run"  # what the names of such parts begin with
_OUTLIVES_SECONDS = 600.0  # far longer than wandb's own process writes after a kill
_MAGIC, _HEADER_BYTES = b":W&B", 7  # of a file; a header of a chunk has as many
_BLOCK_BYTES = 32768
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(slots=True)
class LoggedRows:
    """What the parts of a run hold."""

    parts: int = 0
    next_row: int = 0  # the first number that no row has
    rows_of: dict[int, dict[str, int]] = field(default_factory=dict)  # the first, by step and key
    artifacts: set[tuple[str, str]] = field(default_factory=set)  # names and digests

    @property
    def last_step(self) -> int:
        return max((step for step, rows in self.rows_of.items() if rows), default=-1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of wandb's."""
        number = int(row.get("_step", -1))
        self.next_row = max(self.next_row, number + 1)
        if STEP_KEY in row:
            rows = self.rows_of.setdefault(int(row[STEP_KEY]), {})
            for key in row:
                rows[key] = min(number, rows.get(key, number))

    def forget_from(self, number: int) -> None:
        """Forget the rows with this number and higher ones."""
        for step, rows in self.rows_of.items():
            self.rows_of[step] = {key: row for key, row in rows.items() if row < number}

    def lacks(self, metrics: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Return those metrics of a step of which no row has a value."""
        known = self.rows_of.get(step, ())
        return {key: value for key, value in metrics.items() if key not in known}


def logged_rows(folder: Path, run_id: str) -> LoggedRows:
    """Read what the parts of a run in a folder hold, as far as they are whole."""
    rows = LoggedRows()
    for path in _parts(folder, run_id):
        rows.parts += 1
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "artifact":
                rows.artifacts.add((record.artifact.name, record.artifact.digest))
            row = _row(record)
            if row is not None:
                rows.add(row)
    return rows


def mend_parts(folder: Path, run_id: str) -> None:
    """Make the offline parts of a run such that `wandb sync` sends them.

    At one that a kill has cut off it would stop, and send none of those that follow. What is behind
    the last whole record is cut off, and a part that has not begun gets another name.
    """
    for path in _parts(folder, run_id):
        if not path.parent.name.startswith(_OFFLINE):
            continue
        content, end, kinds = _content_of(path), 0, set()
        for record, behind in _records_in(content):
            end = behind
            kinds.add(record.WhichOneof("record_type"))
        if "run" not in kinds:
            move(path.parent, path.parent.with_name(f"empty-{path.parent.name}"))
        elif end < len(content) or ("exit" not in kinds and _is_recent(path)):
            # Another file of this name. wandb's own process may outlive the one that was killed:
            # what it still writes, into the old file, would be there twice.
            with atomic_path(path) as temporary:
                temporary.write_bytes(content[:end])


def _is_recent(path: Path) -> bool:
    return time.time() - path.stat().st_mtime < _OUTLIVES_SECONDS


def _parts(folder: Path, run_id: str) -> list[Path]:
    """Find the files of the parts, by kind and date."""
    kinds = (folder.glob(f"wandb/{kind}-*/run-{run_id}.wandb") for kind in (_OFFLINE, "run"))
    return sorted(path for of_kind in kinds for path in of_kind)


def history(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a part, values by key; of what has parts, one of them."""
    for record in wandb_records(path):
        row = _row(record)
        if row is not None:
            yield row


def wandb_records(path: Path) -> Iterator[Any]:
    """Read the records of a part, messages of protobuf."""
    for record, _ in _records_in(_content_of(path)):
        yield record


def _records_in(content: bytes) -> Iterator[tuple[Any, int]]:
    """Parse the records of a `.wandb` file, each with the place behind it."""
    from wandb.proto import wandb_internal_pb2

    for data, end in _messages(content):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(data)
        except Exception:  # protobuf's own; the end of a file that was cut off
            return
        yield record, end


def _row(record: Any) -> dict[str, Any] | None:
    """Return the values of a row; None of another record, or a damaged one."""
    if record.WhichOneof("record_type") != "history":
        return None
    items = record.history.item
    try:
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
    except (ValueError, RecursionError, IndexError):
        return None
    numbers = (row[key] for key in ("_step", STEP_KEY) if key in row)
    return row if all(map(is_finite, numbers)) else None


def _content_of(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read()
    except (InputError, OSError) as error:
        log.warning("this part of the wandb run counts as empty: %s", error)
        return b""


def _messages(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Split a `.wandb` file, a log in LevelDB's format, into its records; ends where it is cut.

    With each comes the place behind it.

    Behind a header of 7 bytes there are blocks of 32 KiB with chunks, each with a checksum (4
    bytes), a length (2) and a type (1). The rest of a block that cannot hold a header is padding.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        return
    at, record = _HEADER_BYTES, b""
    while at + _HEADER_BYTES <= len(data):
        room = _BLOCK_BYTES - at % _BLOCK_BYTES
        if room < _HEADER_BYTES:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        at += _HEADER_BYTES
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or at + length > len(data):
            return
        record = (b"" if kind in (_WHOLE, _FIRST) else record) + data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield record, at
