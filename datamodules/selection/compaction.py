"""Copies the samples of a selection into webdataset tars of their own, for those who want a copy.

Training does not need one: it streams the selection from the original tars. Samples are copied byte
for byte with their headers. Only where the copy would lose who a sample is, it is written anew: its
uid was derived from the names of tar and key, which change, or its key is taken in the new tar.

What a tar holds follows from pool and selection alone, so a killed run continues where it was.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

import siftclip
from siftclip.datamodules.index.faults import FaultLog, FaultState
from siftclip.datamodules.index.layouts import IMAGE_SUFFIXES
from siftclip.datamodules.index.tar_walk import BLOCK_BYTES, TarSample, TruncatedTarError, walk_tar
from siftclip.datamodules.index.uids import derive_uid, format_uid
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import (
    BadSampleError,
    ChangedTarError,
    bad_sample,
    read_ranges,
)
from siftclip.datamodules.selection.selection import (
    SUBSET_NAME,
    WEIGHTS_NAME,
    Selection,
    expand_rows,
    write_subset,
)
from siftclip.datamodules.storage.local import StorageError
from siftclip.errors import InputError, ParameterError, require_int
from siftclip.files import write_json
from siftclip.locks import LOCK_NAME
from siftclip.progress import show_progress
from siftclip.records import Count, Text, read_record
from siftclip.writing import atomic_path, delete_file, make_folder

MANIFEST_NAME = "compact.json"
SHARDS_FOLDER = "shards"
COMPACT_VERSION = 1  # raise it with every change of the bytes, so that tars are not mixed
READ_AHEAD_BYTES = 32 << 20  # asked of the storage at once
END_MARK = bytes(2 * BLOCK_BYTES)
_COMMON_HEADER = ord("g")
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes


class ShardState(TypedDict):
    """A tar that has been written, as plain values."""

    name: Text
    samples: Count
    bytes: Count
    faults: FaultState


class _Manifest(TypedDict):
    """What is read of a compaction's manifest."""

    shards: list[ShardState]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewShard:
    """A tar that has been written."""

    name: str
    samples: int
    size_bytes: int
    faults: FaultLog = field(default_factory=FaultLog)  # of the samples that it lacks

    def state(self) -> ShardState:
        """Return plain values, for JSON."""
        return ShardState(
            name=self.name,
            samples=self.samples,
            bytes=self.size_bytes,
            faults=self.faults.state(),
        )

    @classmethod
    def from_state(cls, state: ShardState) -> NewShard:
        """Invert `state`."""
        return cls(
            name=state["name"],
            samples=state["samples"],
            size_bytes=state["bytes"],
            faults=FaultLog.from_state(state["faults"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """A finished copy, and what this call did of it."""

    folder: Path
    shards: tuple[NewShard, ...]
    faults: FaultLog  # of the selected samples that are not in the copy
    copied_bytes: int  # by this call; the rest was there
    seconds: float

    @property
    def samples(self) -> int:
        """All samples of the copy."""
        return sum(shard.samples for shard in self.shards)

    @property
    def size_bytes(self) -> int:
        """Of all its tars."""
        return sum(shard.size_bytes for shard in self.shards)


def compact_pool(
    pool: Pool,
    selection: Selection,
    folder: Path,
    *,
    shard_samples: int,
    max_bad_fraction: float,
    progress: bool = True,
) -> Compaction:
    """Write each distinct sample of a selection once, in the order of the pool.

    Args:
        pool: of the samples.
        selection: which of them, and how often.
        folder: gets `shards/*.tar`, `selection.npy` (with repetitions), `weights.npy` if the
            selection weighs samples, and `compact.json`. New, or empty, or what
            an interrupted call with the same arguments has left there.
        shard_samples: samples a tar.
        max_bad_fraction: how many samples may be unreadable before this is an error.
        progress: show a bar.

    Raises:
        InputError: the folder holds something else or lacks the space, or too many samples are bad.
    """
    start = time.perf_counter()
    require_int("shard_samples", shard_samples, minimum=1)
    rows = np.unique(expand_rows(selection, pool)[0])
    parts = np.split(rows, np.arange(shard_samples, len(rows), shard_samples))
    names = [f"{number:08d}.tar" for number in range(len(parts))]
    identity = {
        "version": COMPACT_VERSION,
        "selection": selection.digest,
        "pool": pool.fingerprint,
        "members": pool.members_digest,
        "shard_samples": shard_samples,
    }
    done = _finished_shards(folder, identity, names)
    sizes = [int(pool.sample_sizes_bytes[part].sum()) for part in parts]
    todo_bytes = sum(size for name, size in zip(names, sizes, strict=True) if name not in done)
    _require_space(make_folder(folder), todo_bytes)

    def write_manifest() -> None:
        shards = [done[name] for name in names if name in done]
        manifest = {
            "siftclip": siftclip.__version__,
            **identity,
            "pool_root": pool.root,
            "selected_samples": len(selection),
            "selected_distinct": len(rows),
            "complete": len(shards) == len(names),
            "samples": sum(shard.samples for shard in shards),
            "bytes": sum(shard.size_bytes for shard in shards),
            "shards": [shard.state() for shard in shards],
        }
        write_json(folder / MANIFEST_NAME, manifest)

    write_manifest()  # first: it says that the folder is ours
    make_folder(folder / SHARDS_FOLDER)
    write_subset(selection, folder)
    faults = FaultLog()
    for shard in done.values():
        faults.merge(shard.faults)
    with show_progress(
        total=sum(sizes),
        initial=sum(sizes) - todo_bytes,
        label="compact",
        unit="B",
        bar=progress,
    ) as bar:
        for name, part in zip(names, parts, strict=True):
            if name in done:
                continue
            shard = write_shard(pool, part, folder / SHARDS_FOLDER / name, advance=bar.update)
            faults.merge(shard.faults)
            faults.check(
                owner=f"pool {pool.root}", total=len(rows), max_bad_fraction=max_bad_fraction
            )
            done[name] = shard
            write_manifest()
    return Compaction(
        folder=folder,
        shards=tuple(done[name] for name in names),
        faults=faults,
        copied_bytes=todo_bytes,
        seconds=time.perf_counter() - start,
    )


def write_shard(
    pool: Pool, rows: np.ndarray, path: Path, *, advance: Callable[[int], object]
) -> NewShard:
    """Write the samples of rows, int64 [n], ascending, as one tar, atomically.

    Bad samples are counted and left out. `advance` is called with the bytes of each sample.
    """
    faults = FaultLog()
    taken: set[str] = set()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for row, data in zip(rows.tolist(), read_samples(pool, rows), strict=True):
            try:
                key, content = _for_new_tar(pool, row, data, taken)
            except ChangedTarError as error:
                raise error.stop() from None
            except BadSampleError as error:
                faults.add(str(error), pool.place(row))
            else:
                file.write(content)
                taken.add(key)
            advance(int(pool.sample_sizes_bytes[row]))
        file.write(END_MARK)
        size_bytes = file.tell()
    return NewShard(name=path.name, samples=len(taken), size_bytes=size_bytes, faults=faults)


def read_samples(pool: Pool, rows: np.ndarray) -> Iterator[bytes | StorageError]:
    """Yield all bytes, headers and members, of samples by rows, int64 [n], ascending."""
    sizes = pool.sample_sizes_bytes[rows]
    groups = np.cumsum(sizes) // READ_AHEAD_BYTES
    for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(groups)) + 1):
        at = rows[part]
        answers = read_ranges(
            pool, pool.shard_of_row[at], pool.sample_offsets_bytes[at], sizes[part]
        )
        yield from (data for _, data in answers)


def _for_new_tar(
    pool: Pool, row: int, data: bytes | StorageError, taken: set[str]
) -> tuple[str, bytes]:
    """Return the key and the bytes of a sample for a tar where some keys are taken.

    Raises:
        BadSampleError: it could not be read, or is not what the index says.
    """
    if isinstance(data, StorageError):
        raise bad_sample(data, pool.shards[pool.shard_of_row[row]])
    sample = _check_sample(pool, row, data)
    uid = format_uid(pool.uids[row])
    is_derived = uid == derive_uid(pool.shards[pool.shard_of_row[row]].name, sample.key)
    is_dotted = "." in sample.key.rpartition("/")[2]  # only pool.key_split=last_dot reads it
    kept = not is_derived and not is_dotted and sample.key not in taken
    if kept and not _has_common_header(data, sample):
        return sample.key, data
    key, number = uid, 0
    while key in taken:  # by a sample whose key is the uid of this one
        number += 1
        key = f"{uid}-{number}"
    return key, _rewrite(data, sample, key, uid)


def _check_sample(pool: Pool, row: int, data: bytes) -> TarSample:
    """Parse the members of a sample from its bytes alone: the tar may have changed or be damaged.

    Raises:
        BadSampleError: these are not the bytes that the index describes.
    """
    size, start = int(pool.sample_sizes_bytes[row]), int(pool.sample_offsets_bytes[row])
    if len(data) < size:
        raise BadSampleError("cut off by the end of their tar")
    try:
        samples = list(walk_tar(_Bytes(data + END_MARK), key_split=pool.key_split))
    except (InputError, TruncatedTarError):
        samples = []
    if len(samples) == 1:
        (sample,) = samples
        image, text = sample.find(*IMAGE_SUFFIXES), sample.find("txt")
        expected = (
            pool.keys[row].decode(),
            (0, size),
            (int(pool.image_offsets_bytes[row]) - start, int(pool.image_sizes_bytes[row])),
            (int(pool.text_offsets_bytes[row]) - start, int(pool.text_sizes_bytes[row])),
        )
        places = (image and image[1:3], text and text[1:3])
        if (sample.key, (sample.start_bytes, sample.end_bytes), *places) == expected:
            return sample
    raise BadSampleError("whose headers are not those that were indexed")


class _Bytes:
    """Bytes in memory as the source of a tar."""

    name = "sample"

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size_bytes = len(data)

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        return self._data[offset_bytes : offset_bytes + size_bytes]


def _has_common_header(data: bytes, sample: TarSample) -> bool:
    """Return whether a pax header among the members is about all files behind it, also others'.

    True also where a header between them cannot be read: what is written anew is always sound.
    """
    position = 0
    for member in sample.members:
        while position + BLOCK_BYTES < member.offset_bytes:  # long names, files of no sample
            kind = data[position + 156]
            size_bytes = _octal(data[position + 124 : position + 136])
            if kind == _COMMON_HEADER or size_bytes is None:
                return True
            position += BLOCK_BYTES
            if kind not in _WITHOUT_DATA:
                position += size_bytes + -size_bytes % BLOCK_BYTES
        position = member.offset_bytes + member.size_bytes
        position += -position % BLOCK_BYTES
    return False


def _octal(field: bytes) -> int | None:
    try:
        return int(field.split(b"\0", 1)[0], 8)
    except ValueError:
        return None


def _rewrite(data: bytes, sample: TarSample, key: str, uid: str) -> bytes:
    """Rewrite a sample under another key, with its uid in the JSON."""
    contents = [
        (member.suffix, data[member.offset_bytes : member.offset_bytes + member.size_bytes])
        for member in sample.members
    ]
    numbers = [number for number, (suffix, _) in enumerate(contents) if suffix == "json"]
    if numbers:
        contents[numbers[0]] = ("json", _with_uid(contents[numbers[0]][1], uid))
    else:
        contents.append(("json", json.dumps({"uid": uid}).encode()))
    return b"".join(_member(f"{key}.{suffix}", content) for suffix, content in contents)


def _with_uid(record: bytes, uid: str) -> bytes:
    """Add the uid to a JSON unless it has one. What is not an object becomes a field of one.

    Raises:
        BadSampleError: it is not JSON, which the index would have found.
    """
    try:
        fields = json.loads(record)
    except (ValueError, RecursionError):
        raise BadSampleError("whose JSON is not the one that was indexed") from None
    if not isinstance(fields, dict):
        fields = {"content": fields}
    if fields.get("uid") is not None:
        return record
    return json.dumps({**fields, "uid": uid}).encode()


def _member(name: str, content: bytes) -> bytes:
    """Format a file for a tar: header, content, zeros to the block's end. No times, no owners."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK_BYTES)


def _finished_shards(
    folder: Path, identity: dict[str, Any], names: Sequence[str]
) -> dict[str, NewShard]:
    """Find the tars that an earlier call has finished. What a killed one left half done is deleted.

    Raises:
        InputError: the folder holds another compaction, or other files.
    """
    if folder.exists() and not folder.is_dir():
        rule = "must be a folder, and it is a file"
        raise ParameterError(rule, parameter="folder", value=str(folder))
    path = folder / MANIFEST_NAME
    _delete_leftovers(path)
    if not path.is_file():
        entries = folder.iterdir() if folder.exists() else ()
        there = sorted(entry.name for entry in entries if entry.name != LOCK_NAME)
        if there:
            raise ParameterError(
                "must be a new or an empty folder",
                parameter="folder",
                value=str(folder),
                way_out=f"It holds {', '.join(there[:5])}{' and more' if len(there) > 5 else ''}, "
                f"but no {MANIFEST_NAME}.",
            )
        return {}
    manifest = read_record(path, _Manifest, way_out=f"Delete {folder} and compact again.")
    # Earlier versions did not note the members of the pool's tars.
    noted: dict[str, Any] = {"members": identity["members"], **manifest}
    found_identity = {key: noted.get(key) for key in identity}
    if found_identity != identity:
        raise ParameterError(
            f"holds another compaction: its {MANIFEST_NAME} says {_short(found_identity)}, this "
            f"one is {_short(identity)}",
            parameter="folder",
            value=str(folder),
            way_out="Name another folder, or delete that one.",
        )
    for leftover in (
        folder / SUBSET_NAME,
        folder / WEIGHTS_NAME,
        *(folder / SHARDS_FOLDER / name for name in names),
    ):
        _delete_leftovers(leftover)
    strangers = sorted({entry.name for entry in (folder / SHARDS_FOLDER).glob("*")} - {*names})
    if strangers:
        raise InputError(
            f"{folder / SHARDS_FOLDER} must hold nothing but the tars of this compaction. It holds "
            f"{', '.join(strangers[:5])}. Move this elsewhere."
        )
    shards = [NewShard.from_state(state) for state in manifest["shards"]]
    return {s.name: s for s in shards if _has_size(folder / SHARDS_FOLDER / s.name, s.size_bytes)}


def _delete_leftovers(path: Path) -> None:
    """Delete what `atomic_path(path)` leaves behind when its process is killed."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        delete_file(leftover)


def _short(identity: dict[str, Any]) -> str:
    return ", ".join(f"{key} {str(value)[:12]}" for key, value in identity.items())


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _require_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise ParameterError(
            f"needs {needed_bytes / 1e9:.2f} GB, and its disk has {free_bytes / 1e9:.2f} GB left",
            parameter="folder",
            value=str(folder),
            way_out="Make room, name a folder elsewhere, or keep less.",
        )
