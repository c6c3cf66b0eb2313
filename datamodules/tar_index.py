"""Where the samples of one webdataset tar lie: uid, offsets and sizes, from one sequential pass."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from siftclip.datamodules.faults import FaultLog
from siftclip.datamodules.files import read_npz, write_npz
from siftclip.datamodules.uids import derive_uid, is_uid, parse_uids
from siftclip.selectors.errors import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# webdataset's rule: the key is everything before the first dot of the file's name.
MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
META_NAME = re.compile(r"^__[^/]*__($|/)")  # not samples, by webdataset's rule
INDEX_VERSION = 1
# tarfile lets the last three out for headers with impossible numbers
TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file inside a tar: where its bytes are."""

    suffix: str  # lower case, what follows the first dot of the name
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TarSample:
    """The members of one key, in the order of the tar."""

    key: str
    members: tuple[Member, ...]

    def find(self, *suffixes: str) -> Member | None:
        """The first member with one of these suffixes."""
        return next((member for member in self.members if member.suffix in suffixes), None)


class TruncatedTarError(Exception):
    """A tar ends in the middle of a member; the samples before the cut have been given out."""


def walk_tar(path: Path) -> Iterator[TarSample]:
    """Yield the samples of a tar in order: consecutive members with the same key.

    Members whose name has no dot or is `__like_this__`, folders and links are passed over, as
    webdataset does.

    Raises:
        InputError: the file cannot be opened as a tar.
        TruncatedTarError: the file ends inside a member. The sample which the cut runs through
            is not given out. A damaged header counts as a cut.
    """
    try:
        size_bytes = path.stat().st_size
        # Names that are not UTF-8 become printable, so that messages can show them.
        archive = tarfile.open(  # noqa: SIM115 - closed by the `with` below
            path, "r:", encoding="utf-8", errors="backslashreplace"
        )
    except TAR_ERRORS as error:
        raise InputError(f"{path} must be an uncompressed tar file: {error}.") from None
    key, members = "", list[Member]()
    with archive:
        while True:
            try:
                info = archive.next()
            except TAR_ERRORS as error:
                raise TruncatedTarError(f"{path} ends after {size_bytes} bytes: {error}") from None
            if info is None:
                break
            match = MEMBER_NAME.match(info.name) if info.isfile() else None
            if match is None or META_NAME.match(info.name):
                continue
            if match[1] != key and members:
                yield TarSample(key=key, members=tuple(members))
                members = []
            if not 0 <= info.size <= size_bytes - info.offset_data:
                raise TruncatedTarError(
                    f"{path} ends after {size_bytes} bytes, inside the member {info.name!r}"
                )
            key = match[1]
            members.append(
                Member(suffix=match[2].lower(), offset_bytes=info.offset_data, size_bytes=info.size)
            )
            # tarfile keeps every header otherwise
            archive.members = []  # type: ignore[attr-defined]  # the stub lacks it
        # A tar ends with a block of zeros; a file cut exactly between two members has none.
        if size_bytes and not _ends_with_zero_block(path, archive.offset, size_bytes):
            raise TruncatedTarError(f"{path} ends after {size_bytes} bytes without an end mark")
    if members:
        yield TarSample(key=key, members=tuple(members))


def _ends_with_zero_block(path: Path, offset_bytes: int, size_bytes: int) -> bool:
    # tarfile stops at a zero block and leaves `offset` on it or behind it, else at the end.
    start = max(0, min(offset_bytes, size_bytes - tarfile.BLOCKSIZE))
    with path.open("rb") as file:
        file.seek(start)
        block = file.read(tarfile.BLOCKSIZE)
    return len(block) == tarfile.BLOCKSIZE and not any(block)


# What a shard's index holds for each of its samples.
ARRAY_FIELDS = (
    "uids",
    "keys",
    "image_offsets_bytes",
    "image_sizes_bytes",
    "text_offsets_bytes",
    "text_sizes_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """The samples of one tar that have an image and a caption, with where their bytes are."""

    uids: np.ndarray  # uint64 [n, 2]
    keys: np.ndarray  # str [n]
    image_offsets_bytes: np.ndarray  # int64 [n]
    image_sizes_bytes: np.ndarray  # int64 [n]
    text_offsets_bytes: np.ndarray  # int64 [n]
    text_sizes_bytes: np.ndarray  # int64 [n]
    derived_uids: int  # samples whose uid was derived from tar and key
    faults: FaultLog
    truncated: bool

    def __len__(self) -> int:
        return len(self.uids)


def build_shard_index(path: Path) -> ShardIndex:
    """Index one tar in one pass. Faults of samples are counted; the sample is left out."""
    faults = FaultLog()
    uids: list[str] = []
    keys: list[str] = []
    places: list[tuple[int, int, int, int]] = []
    derived_uids, truncated = 0, False
    with _open_file(path) as file:
        try:
            for sample in walk_tar(path):
                image = sample.find(*IMAGE_SUFFIXES)
                text = sample.find("txt")
                place = f"{path.name}:{sample.key}"
                if image is None or text is None:
                    faults.add("without image" if image is None else "without caption", place)
                    continue
                uid = _read_uid(file, sample.find("json"))
                if uid is None:
                    uid = derive_uid(path.name, sample.key)
                    derived_uids += 1
                elif not is_uid(uid):
                    faults.add("with a uid that is not 32 hexadecimal digits", place)
                    continue
                uids.append(uid)
                keys.append(sample.key)
                places.append(
                    (image.offset_bytes, image.size_bytes, text.offset_bytes, text.size_bytes)
                )
        except TruncatedTarError:
            truncated = True
            faults.add("cut off with the end of their tar (at least)", path.name)
    columns = np.asarray(places, dtype=np.int64).reshape(-1, 4)
    return ShardIndex(
        uids=parse_uids(uids),
        keys=np.asarray(keys, dtype=np.str_),
        image_offsets_bytes=columns[:, 0],
        image_sizes_bytes=columns[:, 1],
        text_offsets_bytes=columns[:, 2],
        text_sizes_bytes=columns[:, 3],
        derived_uids=derived_uids,
        faults=faults,
        truncated=truncated,
    )


def _open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _read_uid(file: BinaryIO, member: Member | None) -> str | None:
    """The `uid` of a sample's JSON: None without one, "" where the JSON cannot be read."""
    if member is None:
        return None
    file.seek(member.offset_bytes)
    try:
        record = json.loads(file.read(member.size_bytes))
    except (ValueError, RecursionError):
        return ""
    uid = record.get("uid") if isinstance(record, dict) else None
    return None if uid is None else str(uid)


def load_shard_index(path: Path, cache_path: Path) -> ShardIndex:
    """The index of a tar, from `cache_path` if it was made from this very file, else built anew.

    "This very file" means equal size and modification time, so that a changed shard is noticed.
    """
    try:
        status = path.stat()
    except OSError as error:  # a dangling link, for one
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    stamp = np.asarray([INDEX_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)
    if cache_path.exists():
        index = _read_cached(cache_path, stamp)
        if index is not None:
            return index
    index = build_shard_index(path)
    notes = {
        "derived_uids": index.derived_uids,
        "truncated": index.truncated,
        **index.faults.state(),
    }
    arrays = {name: getattr(index, name) for name in ARRAY_FIELDS}
    write_npz(cache_path, stamp=stamp, notes=np.asarray(json.dumps(notes)), **arrays)
    return index


def _read_cached(cache_path: Path, stamp: np.ndarray) -> ShardIndex | None:
    try:
        cached_stamp, notes_text, *columns = read_npz(cache_path, ["stamp", "notes", *ARRAY_FIELDS])
    except InputError:
        return None  # a cache is only a cache: build it again
    if not np.array_equal(cached_stamp, stamp):
        return None
    notes = json.loads(str(notes_text))
    faults = FaultLog(examples=notes["examples"])
    faults.counts.update(notes["counts"])
    return ShardIndex(
        **dict(zip(ARRAY_FIELDS, columns, strict=True)),
        derived_uids=notes["derived_uids"],
        truncated=notes["truncated"],
        faults=faults,
    )
