"""The index of one webdataset tar: its samples' uids and where their bytes are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import NotRequired

from siftclip.datamodules.index.faults import FaultLog, FaultState
from siftclip.datamodules.index.layouts import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIX,
    KindsState,
    MemberKinds,
    kind_of,
)
from siftclip.datamodules.index.tar_walk import (
    MAX_CONTENT_BYTES,
    KeySplit,
    Member,
    TarSample,
    TarSource,
    TruncatedTarError,
    round_up,
    walk_tar,
)
from siftclip.datamodules.index.uids import derive_uid, parse_uids
from siftclip.errors import InputError
from siftclip.files import has_form, parse_json, read_npz, write_npz
from siftclip.records import Count, checked
from siftclip.uid_texts import plain_uid

INDEX_VERSION = 3
_UID_FIELD = re.compile(rb'"uid"\s*:\s*"([0-9a-fA-F]{32})"')
_NAMES_SHOWN = 3  # of a sample's members, in messages

MAX_KEY_BYTES = 1024  # a pool keeps as many for every key as its longest has
SHARED_NAME = "that share the name of another sample in their tar"
WITHOUT_IMAGE, WITHOUT_CAPTION = "without image", "without caption"
APART = "whose image and caption do not follow each other in their tar"
OTHER_FOLDERS = "whose image and caption are in different folders of their tar: two keys"
DOTTED_NAMES = (
    "whose names differ only behind their first dot, where webdataset's rule ends the key; with "
    "last_dot as the key split each of them is a sample"
)

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
    repeated: int  # samples that are left out because an earlier one has their name and bytes
    hidden: FaultLog  # pairs that belong to a sample by its key, as a mask does, and are not used
    faults: FaultLog
    incomplete: MemberKinds  # what the samples without image or caption have
    truncated: bool

    def __len__(self) -> int:
        return len(self.uids)


def build_shard_index(
    source: TarSource, name: str, key_split: KeySplit = "first_dot"
) -> ShardIndex:
    """Index one tar in one pass. Faults of samples are counted; the sample is left out.

    Of several samples with one name the first is used, if it is complete before a suffix repeats.
    The others are faults, or repeats if their bytes are equal.

    Args:
        source: of the tar's bytes.
        name: of the tar, which uids are derived from where samples have none.
        key_split: the dot that ends the key in the members' names.
    """
    builder = _IndexBuilder(source, name)
    cut: TruncatedTarError | None = None
    try:
        for sample in walk_tar(source, content_of="json", key_split=key_split):
            builder.add(sample)
    except TruncatedTarError as error:
        cut = error
    return builder.finish(cut)


class _IndexBuilder:
    """Collects the samples of a tar."""

    def __init__(self, source: TarSource, name: str) -> None:
        self._source, self._name = source, name
        self._faults, self._hidden = FaultLog(), FaultLog()
        self._uids: list[str] = []
        self._keys: list[bytes] = []
        self._places: list[tuple[int, int, int, int, int, int]] = []
        self._derived: dict[str, int] = {}  # the row of a key whose uid follows from it
        self._incomplete: dict[str, TarSample] = {}
        self._repeated = 0

    def add(self, sample: TarSample) -> None:
        """Take the next sample of the tar."""
        key, members, start, end = sample
        by_suffix = {member[0]: member for member in members}
        repeats = len(by_suffix) < len(members)
        if repeats:
            self._count_repeats(sample)
            by_suffix = _first_round(members)
            last = members[len(by_suffix) - 1]
            end = round_up(last.offset_bytes + last.size_bytes)  # others do not belong to it
        image = by_suffix.get("jpg") or _image_in(by_suffix)
        text, record = by_suffix.get("txt"), by_suffix.get("json")
        if image is None or text is None:
            if not repeats:  # else it is counted
                self._add_incomplete(sample)
            return
        if len(key) > MAX_KEY_BYTES // 4 and len(key.encode()) > MAX_KEY_BYTES:
            cause = f"with a name of more than {MAX_KEY_BYTES} bytes"
            self._faults.add(cause, self._place(sample))
            return
        if len(members) > 3:
            self._note_hidden(sample)
        try:
            uid = None if record is None else _find_uid(record[3] or b"")
        except _UidError as error:
            self._faults.add(str(error), f"{self._name}:{key}")
            return
        if uid is None:
            earlier = self._derived.setdefault(key, len(self._uids))
            if earlier < len(self._uids):
                if self._is_like(earlier, image, text):
                    self._repeated += 1
                else:
                    self._faults.add(SHARED_NAME, self._place(sample))
                return
            uid = derive_uid(self._name, key)
        self._uids.append(uid)
        self._keys.append(key.encode())
        self._places.append((start, end - start, image[1], image[2], text[1], text[2]))

    def finish(self, cut: TruncatedTarError | None) -> ShardIndex:
        """Return the index, when the tar has ended, or why it has ended too early."""
        kinds = MemberKinds()
        for group in _of_one_name(self._incomplete.values()):
            if len(group) > 1:
                self._faults.add(OTHER_FOLDERS, self._place(*group))
                continue
            (sample,) = group
            pairs = _hidden_pairs(sample).total()
            if pairs:
                cause = DOTTED_NAMES
            elif _has_image(sample) and _has_text(sample):
                cause = APART
            else:
                cause = WITHOUT_CAPTION if _has_image(sample) else WITHOUT_IMAGE
                record = sample.find("json")
                suffixes = [member.suffix for member in sample.members]
                kinds.add(kind_of(suffixes, None if record is None else record.content))
            self._faults.add(cause, self._place(sample), samples=max(1, pairs))
        if cut is not None:
            self._faults.add(cut.cause, self._name)
        columns = np.asarray(self._places, dtype=np.int64).reshape(-1, 6).T.copy()
        return ShardIndex(
            uids=parse_uids(self._uids),
            keys=np.asarray(self._keys, dtype=np.bytes_),
            **dict(zip(ARRAY_FIELDS[2:], columns, strict=True)),
            derived_uids=len(self._derived),
            repeated=self._repeated,
            hidden=self._hidden,
            faults=self._faults,
            incomplete=kinds,
            truncated=cut is not None,
        )

    def _add_incomplete(self, sample: TarSample) -> None:
        """Keep it to the end: what it lacks may stand apart, which is one fault, not two."""
        first = self._incomplete.setdefault(sample.key, sample)
        if first is not sample:
            first.members.extend(sample.members)

    def _note_hidden(self, sample: TarSample) -> None:
        pairs = len(_hidden_pairs(sample))  # of those that repeat, `_count_repeats` counts the rest
        if pairs:
            self._hidden.add("pairs", self._place(sample), samples=pairs)

    def _count_repeats(self, sample: TarSample) -> None:
        """Count the samples of one name behind the first; all of them if that is not complete."""
        hidden = _hidden_pairs(sample)
        by_suffix: dict[str, list[Member]] = {}
        for member in sample.members:
            by_suffix.setdefault(member.suffix, []).append(member)
        plain = [len(same) for s, same in by_suffix.items() if s.rpartition(".")[0] not in hidden]
        samples = max(plain, default=0) + hidden.total()
        first = _first_round(sample.members)
        if "txt" not in first or first.keys().isdisjoint(IMAGE_SUFFIXES):
            cause = SHARED_NAME if plain else DOTTED_NAMES
            self._faults.add(cause, self._place(sample), samples=samples)
            return
        samples -= 1 + len(hidden)
        if all(self._same_bytes(same[0], other) for same in by_suffix.values() for other in same):
            self._repeated += samples
        else:
            self._faults.add(SHARED_NAME, self._place(sample), samples=samples)

    def _is_like(self, row: int, image: Member, text: Member) -> bool:
        *_, image_at, image_bytes, text_at, text_bytes = self._places[row]
        return self._same_bytes(
            Member("", image_at, image_bytes, None), image
        ) and self._same_bytes(Member("", text_at, text_bytes, None), text)

    def _same_bytes(self, member: Member, other: Member) -> bool:
        """Return whether two members hold the same; only names that occur twice are read for it."""
        if member is other:
            return True
        size = member.size_bytes
        if size != other.size_bytes or size > MAX_CONTENT_BYTES:
            return False
        first = self._source.read(member.offset_bytes, size)[:size]
        return first == self._source.read(other.offset_bytes, size)[:size]

    def _place(self, sample: TarSample, *others: TarSample) -> str:
        """Return tar and key with the names of the members, those of others too, for messages."""
        names = [name for part in (sample, *others) for name in part.names()]
        shown = ", ".join(names[:_NAMES_SHOWN])
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        return f"{self._name}:{sample.key} [{shown}{more}]"


def _of_one_name(samples: Iterable[TarSample]) -> Iterator[list[TarSample]]:
    """Yield incomplete samples, together those of one name in several folders that are a pair."""
    by_name: dict[str, list[TarSample]] = {}
    for sample in samples:
        by_name.setdefault(sample.key.rpartition("/")[2], []).append(sample)
    for group in by_name.values():
        images, texts = sum(map(_has_image, group)), sum(map(_has_text, group))
        if len(group) > 1 and images == texts == 1:
            yield sorted(group, key=_has_image, reverse=True)
        else:
            yield from ([sample] for sample in group)


def _has_image(sample: TarSample) -> bool:
    return sample.find(*IMAGE_SUFFIXES) is not None


def _has_text(sample: TarSample) -> bool:
    return sample.find(TEXT_SUFFIX) is not None


def _image_in(by_suffix: Mapping[str, Member]) -> Member | None:
    return next((by_suffix[suffix] for suffix in IMAGE_SUFFIXES if suffix in by_suffix), None)


def _hidden_pairs(sample: TarSample) -> Counter[str]:
    return sample.hidden_pairs(IMAGE_SUFFIXES, ("txt",))


def _first_round(members: list[Member]) -> dict[str, Member]:
    """Return the members by suffix up to the first whose suffix has been there before."""
    first: dict[str, Member] = {}
    for member in members:
        if member.suffix in first:
            break
        first[member.suffix] = member
    return first


class _UidError(Exception):
    """The JSON of a sample does not say which one it is; the message follows a count."""


def _find_uid(record: bytes) -> str | None:
    """Find the `uid` in a sample's JSON; None without one.

    Raises:
        _UidError: it is no uid, or there are several, or the JSON cannot be read.
    """
    match = _UID_FIELD.search(record)
    # A quote inside a JSON string is escaped, so this is a field; of the outermost object, if no
    # other one has begun. Parsing all of the JSON would take as long as the rest of the index.
    if match and record.count(b"{", 0, match.start()) == 1 and record.count(b'"uid"') == 1:
        return match[1].decode()
    try:
        fields = json.loads(record, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        raise _UidError("with a uid that is not 32 hexadecimal digits") from None
    uids = [uid for name, uid in fields if name == "uid"] if isinstance(fields, _Pairs) else []
    if not uids or uids == [None]:
        return None
    if len(uids) > 1:
        raise _UidError("with more than one uid in their JSON")
    uid = plain_uid(str(uids[0])) if isinstance(uids[0], (str, int)) else None
    if uid is None:
        raise _UidError("with a uid that is not 32 hexadecimal digits")
    return uid


class _Notes(FaultState):
    """What an index keeps beside its arrays."""

    version: str  # of the format, the key split and the tar
    derived_uids: Count
    repeated: Count
    hidden: FaultState
    truncated: bool
    incomplete: NotRequired[KindsState]  # an older index has none


class _Pairs(list[tuple[str, Any]]):
    """The fields of a JSON object, those of one name kept apart."""


def load_shard_index(
    name: str,
    stamp: str,
    open_source: Callable[[], AbstractContextManager[TarSource]],
    path: Path,
    key_split: KeySplit = "first_dot",
) -> ShardIndex:
    """Read a tar's index from the file `path` if it was made from this very tar, else build it.

    Args:
        name: of the tar.
        stamp: of its size and its time of change, or what its server has for that, so that a
            changed tar is noticed.
        open_source: opens the tar.
        path: where the index is kept.
        key_split: see `build_shard_index`.

    Raises:
        InputError: there is a folder in the place of that file.
    """
    if path.is_dir():
        raise InputError(f"{path} must be a file, which an index is kept in. Delete that folder.")
    version = _version(stamp, key_split)
    index = _read_cached(path, version)
    if index is not None:
        return index
    with open_source() as source:
        index = build_shard_index(source, name, key_split)
    notes = _Notes(
        incomplete=index.incomplete.state(),
        version=version,
        derived_uids=index.derived_uids,
        repeated=index.repeated,
        hidden=index.hidden.state(),
        truncated=index.truncated,
        **index.faults.state(),
    )
    arrays = {field: getattr(index, field) for field in ARRAY_FIELDS}
    write_npz(path, notes=np.asarray(json.dumps(notes)), **arrays)
    return index


def _version(stamp: str, key_split: KeySplit) -> str:
    return f"{INDEX_VERSION} {key_split} {stamp}"


def index_state(path: Path, stamp: str, key_split: KeySplit) -> Literal["same", "other", "none"]:
    """Say whether a kept index is of a tar as it is now, of another one, or not there at all.

    Args:
        path: as for `load_shard_index`.
        stamp: the tar's, as there.
        key_split: see `build_shard_index`.
    """
    if not path.is_file():
        return "none"
    try:
        (notes,) = read_npz(path, ["notes"])
        version = checked(parse_json(str(notes).encode()), _Notes, owner=str(path))["version"]
    except ValueError:
        return "none"  # damaged: it is built again
    return "same" if version == _version(stamp, key_split) else "other"


def _read_cached(path: Path, version: str) -> ShardIndex | None:
    if not path.exists():
        return None
    try:
        notes_text, *arrays = read_npz(path, ["notes", *ARRAY_FIELDS])
        record = parse_json(str(notes_text).encode())
        notes = checked(record, _Notes, owner=str(path))
    except ValueError:
        return None  # a cache is only a cache: build it again
    columns = dict(zip(ARRAY_FIELDS, arrays, strict=True))
    if notes["version"] != version or not _are_columns(columns):
        return None
    return ShardIndex(
        **columns,
        derived_uids=notes["derived_uids"],
        repeated=notes["repeated"],
        hidden=FaultLog.from_state(notes["hidden"]),
        incomplete=MemberKinds.from_state(notes.get("incomplete", [])),  # an older index has none
        truncated=notes["truncated"],
        faults=FaultLog.from_state(notes),
    )


def _are_columns(columns: Mapping[str, np.ndarray]) -> bool:
    """Return whether arrays have the dtypes and shapes of `ShardIndex`, and point into a tar."""
    uids, keys, *places = columns.values()
    count = len(uids) if uids.ndim else 0
    return (
        has_form(uids, np.uint64, (count, 2))
        and keys.dtype.kind == "S"
        and keys.shape == (count,)
        and all(has_form(array, np.int64, (count,)) for array in places)
        and all(array.min(initial=0) >= 0 for array in places)
    )
