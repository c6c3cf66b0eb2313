"""What refers to what among outputs: who would miss an entry that goes.

Runs are trained on selections, these are made from scores, a report is of runs, a run may be
distilled from another. All of it stands in records that entries keep: paths, digests, and the
identities by which results are known. A record that cannot be read could name anything; it is told.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from siftclip.datamodules.selection.selection import MANIFEST_NAME
from siftclip.errors import InputError
from siftclip.files import identity_hash, read_json
from siftclip.reading import read_text
from siftclip.trainer.outputs.kinds import KindName
from siftclip.trainer.outputs.scan import Entry, Outputs
from siftclip.trainer.runtime.run_records import read_config

_MOST_CSV_BYTES = 1 << 28
# The records of each kind that may name others
_RECORDS: Mapping[KindName, tuple[str, ...]] = {
    "runs": ("config.yaml", "identity.json", MANIFEST_NAME),
    "selections": (MANIFEST_NAME,),
    "scores": ("identity.json",),
    "features": ("features.json",),
    "subsets": (MANIFEST_NAME,),
    "copies": ("compact.json",),
}
# The tables of samples and scores name none, and hold captions
_TABLES_OF_REPORT = re.compile(r"[^/]+\.(csv|json)|tables/runs\.csv|runs/[^/]+\.json")
_RULE = "rule"  # of a selector, on which its scores do not depend


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One entry names another."""

    source: str  # places
    target: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """All references among outputs."""

    all: tuple[Reference, ...]
    unreadable: tuple[str, ...] = ()  # what is wrong with records that may name others
    texts: frozenset[str] = frozenset()  # all texts of all records

    def to(self, place: str) -> list[Reference]:
        """Return those that name an entry."""
        return [reference for reference in self.all if reference.target == place]

    def of(self, place: str) -> list[Reference]:
        """Return what an entry names."""
        return [reference for reference in self.all if reference.source == place]

    def names_path(self, place: str) -> bool:
        """Return whether a record has the path of a file or folder, or of one below it."""
        return any(text.endswith(f"/{place}") or f"/{place}/" in text for text in self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Identity:
    """By what a result is known, as far as it tells which others it was made from."""

    digest: str  # of all of it, as it ends the names of folders
    pool: Any
    code: Mapping[str, Any]  # of the selectors
    selector: str  # a hash, of the selector without its rule
    parts: frozenset[str]  # the same of all that may be a selector in it
    is_of_loop: bool  # a run whose selector in the loop is described otherwise

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> _Identity:
        online = record.get("online")
        code = (online if isinstance(online, Mapping) else record).get("code")
        return cls(
            digest=identity_hash(record),
            pool=record.get("pool"),
            code=code if isinstance(code, Mapping) else {},
            selector=_hash_without_rule(record.get("selector")),
            parts=frozenset(map(_hash_without_rule, _mappings(record.get("selector")))),
            is_of_loop=isinstance(online, Mapping) and "selector" in online,
        )

    def has_used(self, scores: _Identity) -> bool:
        """Return whether what this stands for was made from scores."""
        if self.pool != scores.pool or not (self.is_of_loop or scores.selector in self.parts):
            return False
        return all(self.code.get(name) == value for name, value in scores.code.items())


def _hash_without_rule(selector: Any) -> str:
    """Hash a selector: scores do not depend on its rule."""
    plain = selector
    if isinstance(selector, Mapping):
        plain = {name: value for name, value in selector.items() if name != _RULE}
    return identity_hash({"selector": plain})


@dataclass(slots=True)
class _Records:
    """What an entry says."""

    texts: set[str] = field(default_factory=set)
    identities: list[_Identity] = field(default_factory=list)
    digest: str | None = None  # of its selection
    names: set[str] = field(default_factory=set)  # of feature sets


def find_references(outputs: Outputs) -> References:
    """Read the records of all entries, and find which others they name."""
    records: dict[str, _Records] = {}
    unreadable: list[str] = []
    for entry in outputs.entries:
        records[entry.place] = _Records()
        for path in _record_files(entry):
            try:
                is_subset = entry.kind.name == "subsets"
                _read_record(path, records[entry.place], is_subset=is_subset)
            except InputError as error:
                unreadable.append(str(error))
    found: dict[tuple[str, str], Reference] = {}
    for source in outputs.entries:
        for target, why in _named(source, records, outputs):
            if target != source.place:
                reference = Reference(source=source.place, target=target, why=why)
                found.setdefault((source.place, target), reference)
    texts = frozenset(f"/{text}" for record in records.values() for text in record.texts)
    return References(all=tuple(found.values()), unreadable=tuple(unreadable), texts=texts)


# ---- records ------------------------------------------------------------------------------------
def _record_files(entry: Entry) -> Iterator[Path]:
    """Yield the files of an entry that may name others."""
    names = _RECORDS.get(entry.kind.name, ())
    for file in entry.files:
        is_report = entry.kind.name == "reports" and _TABLES_OF_REPORT.fullmatch(file.path)
        if file.is_ours and (file.path in names or is_report):
            yield entry.path / file.path


def _read_record(path: Path, records: _Records, *, is_subset: bool) -> None:
    if path.suffix == ".csv":
        records.texts |= _cells(path)
        return
    record = read_config(path) if path.suffix == ".yaml" else read_json(path)
    # a subset keeps all that its inputs were made from; what it was made from itself is enough
    records.texts.update(_inputs(record) if is_subset else _texts(record))
    if not isinstance(record, Mapping):
        return
    if path.name == MANIFEST_NAME:
        digest, identity = record.get("digest"), record.get("identity")
        records.digest = digest if isinstance(digest, str) else None
        records.identities += [_Identity.of(identity)] if isinstance(identity, Mapping) else []
    elif path.name == "identity.json":
        records.identities.append(_Identity.of(record))
    name = record.get("name")
    if path.name == "features.json" and isinstance(name, str):
        records.names.add(name)


def _inputs(record: Any) -> Iterator[str]:
    """Yield what a subset was made from: paths, and places of other subsets."""
    making = record.get("made") if isinstance(record, Mapping) else None
    inputs = making.get("inputs") if isinstance(making, Mapping) else None
    for given in inputs if isinstance(inputs, list) else ():
        place = given.get("place") if isinstance(given, Mapping) else None
        if isinstance(place, str):
            yield f"subsets/{place}" if given.get("kind") == "subset" else place


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a record, names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _cells(path: Path) -> set[str]:
    try:
        rows = csv.reader(read_text(path, most=_MOST_CSV_BYTES).splitlines())
        return {cell for row in rows for cell in row}
    except csv.Error as error:
        raise InputError(f"{path} is not a readable table: {error}.") from None


# ---- who is meant -------------------------------------------------------------------------------
def _named(
    source: Entry, records: Mapping[str, _Records], outputs: Outputs
) -> Iterator[tuple[str, str]]:
    """Yield the places that an entry names, with how."""
    own = records[source.place]
    places = {entry.place for entry in outputs.entries}
    for text in own.texts:
        place = _place_of(text, places, outputs.root)
        if place is not None:
            yield place, "by its path"
    for target in outputs.entries:
        why = _why(source, own, target, records[target.place])
        if why:
            yield target.place, why


def _why(source: Entry, own: _Records, target: Entry, theirs: _Records) -> str:
    """Say how an entry needs another one by what they are known by; empty if it does not."""
    kinds = source.kind.name, target.kind.name
    if kinds in (("runs", "selections"), ("subsets", "selections")):
        if _is_selection(own, target.name, theirs):
            return "trained on it" if kinds[0] == "runs" else "made of it"
    elif kinds in (("runs", "scores"), ("selections", "scores")):
        if any(each.has_used(kept) for each in own.identities for kept in theirs.identities):
            return "made from them"
    elif kinds[1] == "features" and not own.texts.isdisjoint(_arrays(theirs.names)):
        return "reads features of its name"
    return ""


def _place_of(text: str, places: set[str], root: Path) -> str | None:
    """Return the place that a text is a path of, or into, wherever the outputs were then."""
    if "/" not in text or len(text) > os.pathconf("/", "PC_PATH_MAX"):
        return None
    path = PurePosixPath(text.removeprefix("local-dir:"))
    candidates: list[Sequence[str]] = [path.parts[start:] for start in range(len(path.parts))]
    here = Path(os.path.abspath(path))
    if here.is_relative_to(root):
        candidates.insert(0, here.relative_to(root).parts)
    for parts in candidates:
        for end in range(len(parts), 0, -1):
            place = "/".join(parts[:end])
            # a single name may be anybody's, unless it is in this very folder
            if place in places and (end > 1 or parts is candidates[0]):
                return place
    return None


def _is_selection(own: _Records, name: str, theirs: _Records) -> bool:
    by_identity = any(name.endswith(f"-{each.digest}") for each in own.identities)
    return by_identity or (own.digest is not None and own.digest == theirs.digest)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _mappings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _mappings(inner)


def _arrays(names: Iterable[str]) -> set[str]:
    """Return what records call feature sets, and their arrays."""
    return {text for name in names for text in (name, f"{name}_img", f"{name}_txt")}
