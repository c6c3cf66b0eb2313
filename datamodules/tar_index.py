"""The index of one webdataset tar: its samples' uids and where their bytes are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from siftclip.datamodules.faults import FaultLog
from siftclip.datamodules.files import read_npz, write_npz
from siftclip.datamodules.tar_walk import TarSource, TruncatedTarError, walk_tar
from siftclip.datamodules.uids import derive_uid, is_uid, parse_uids
from siftclip.selectors.errors import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INDEX_VERSION = 2
_UID_FIELD = re.compile(rb'"uid"\s*:\s*"([0-9a-fA-F]{32})"')

# What a shard's index holds for each of its samples.
ARRAY_FIELDS = (
    "uids",
    "keys",
    "sample_offsets_bytes",
    "sample_sizes_bytes",
    "image_offsets_bytes",
    "image_sizes_bytes",
    "text_offsets_bytes",
    "text_sizes_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """The samples of one tar that have an image and a caption, with where their bytes are."""

    uids: np.ndarray  # uint64 [n, 2]
    keys: np.ndarray  # bytes [n], UTF-8
    sample_offsets_bytes: np.ndarray  # int64 [n], of the first header of the sample's members
    sample_sizes_bytes: np.ndarray  # int64 [n], to the end of the last member's last block
    image_offsets_bytes: np.ndarray  # int64 [n]
    image_sizes_bytes: np.ndarray  # int64 [n]
    text_offsets_bytes: np.ndarray  # int64 [n]
    text_sizes_bytes: np.ndarray  # int64 [n]
    derived_uids: int  # samples whose uid was derived from tar and key
    faults: FaultLog
    truncated: bool

    def __len__(self) -> int:
        return len(self.uids)


def build_shard_index(source: TarSource, name: str) -> ShardIndex:
    """Index one tar in one pass. Faults of samples are counted; the sample is left out.

    Args:
        source: of the tar's bytes.
        name: of the tar, which uids are derived from where samples have none.
    """
    faults = FaultLog()
    uids: list[str] = []
    keys: list[bytes] = []
    places: list[tuple[int, int, int, int, int, int]] = []
    derived_uids, truncated = 0, False
    try:
        for key, members, start, end in walk_tar(source, content_of="json"):
            image = text = record = None
            for member in reversed(members):  # so that the first of each kind counts
                suffix = member[0]
                if suffix in IMAGE_SUFFIXES:
                    image = member
                elif suffix == "txt":
                    text = member
                elif suffix == "json":
                    record = member
            if image is None or text is None:
                cause = "without image" if image is None else "without caption"
                faults.add(cause, f"{name}:{key}")
                continue
            uid = None if record is None else _find_uid(record[3] or b"")
            if uid is None:
                uid = derive_uid(name, key)
                derived_uids += 1
            elif not uid:
                faults.add("with a uid that is not 32 hexadecimal digits", f"{name}:{key}")
                continue
            uids.append(uid)
            keys.append(key.encode())
            places.append((start, end - start, image[1], image[2], text[1], text[2]))
    except TruncatedTarError:
        truncated = True
        faults.add("cut off with the end of their tar (at least)", name)
    columns = np.asarray(places, dtype=np.int64).reshape(-1, 6).T.copy()
    return ShardIndex(
        uids=parse_uids(uids),
        keys=np.asarray(keys, dtype=np.bytes_),
        **dict(zip(ARRAY_FIELDS[2:], columns, strict=True)),
        derived_uids=derived_uids,
        faults=faults,
        truncated=truncated,
    )


def _find_uid(record: bytes) -> str | None:
    """The `uid` of a sample's JSON: None without one, "" where it is not one or cannot be read."""
    match = _UID_FIELD.search(record)
    # A quote inside a JSON string is escaped, so this is a field; of the outermost object, if no
    # other one has begun. Parsing all of the JSON would take as long as the rest of the index.
    if match and record.count(b"{", 0, match.start()) == 1 and record.count(b'"uid"') == 1:
        return match[1].decode()
    try:
        fields = json.loads(record)
    except (ValueError, RecursionError):
        return ""
    uid = fields.get("uid") if isinstance(fields, dict) else None
    if uid is None:
        return None
    return str(uid) if is_uid(str(uid)) else ""


def load_shard_index(
    name: str, stamp: str, open_source: Callable[[], AbstractContextManager[TarSource]], path: Path
) -> ShardIndex:
    """The index of a tar, from the file `path` if it was made from this very tar, else built anew.

    Args:
        name: of the tar.
        stamp: of its size and its time of change, or what its server has for that, so that a
            changed tar is noticed.
        open_source: opens the tar.
        path: where the index is kept.
    """
    version = f"{INDEX_VERSION} {stamp}"
    index = _read_cached(path, version)
    if index is not None:
        return index
    with open_source() as source:
        index = build_shard_index(source, name)
    notes = {
        "version": version,
        "derived_uids": index.derived_uids,
        "truncated": index.truncated,
        **index.faults.state(),
    }
    arrays = {field: getattr(index, field) for field in ARRAY_FIELDS}
    write_npz(path, notes=np.asarray(json.dumps(notes)), **arrays)
    return index


def _read_cached(path: Path, version: str) -> ShardIndex | None:
    if not path.exists():
        return None
    try:
        notes_text, *columns = read_npz(path, ["notes", *ARRAY_FIELDS])
    except InputError:
        return None  # a cache is only a cache: build it again
    notes = json.loads(str(notes_text))
    if notes.pop("version") != version:
        return None
    return ShardIndex(
        **dict(zip(ARRAY_FIELDS, columns, strict=True)),
        derived_uids=notes["derived_uids"],
        truncated=notes["truncated"],
        faults=FaultLog.from_state(notes),
    )
