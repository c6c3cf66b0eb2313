"""Named subsets: selections in a folder, with what made them and the pool that they are of.

ROOT/NAME/selection.npy   DataComp's subset file; weights.npy beside it where samples weigh
ROOT/NAME/tars.json       the tars of the pool as they were, by which a change is told
ROOT/NAME/selection.json  the manifest, written last: without it there is no subset
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from typing_extensions import NotRequired, TypedDict

import siftclip
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.selection.selection import (
    MANIFEST_NAME,
    Selection,
    read_selection,
    write_selection,
)
from siftclip.datamodules.selection.subset_files import SubsetFile, read_subset_file
from siftclip.errors import DamagedError, InputError, ParameterError
from siftclip.files import has_content, write_json
from siftclip.locks import LOCK_NAME, locked
from siftclip.records import Count, Text, checked, read_record
from siftclip.redaction import hidden
from siftclip.writing import delete_file

TARS_NAME = "tars.json"
NAME_RULE = "1 to 100 letters, digits, _ . and -, the first no dot and no -"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)
_WAY_OUT = "Delete the folder, and make the subset again."


class SubsetInput(TypedDict):
    """What a subset was made from."""

    kind: Text  # subset, or the format of a file
    place: Text  # the name of the subset, or the path as it was given
    files: dict[Text, Text]  # SHA-256 by name
    digest: Text  # of the samples, and weights
    samples: Count
    distinct: Count
    selection: NotRequired[dict[str, Any]]  # what the manifest of a selection says of its making


class SubsetMaking(TypedDict):
    """How a subset came about."""

    operation: Text  # import, or one of `algebra`
    time: Text
    siftclip: Text
    inputs: list[SubsetInput]
    samples: NotRequired[Count]  # draws
    seed: NotRequired[Count]


class SubsetPool(TypedDict):
    """The pool of a subset; manifests of selections say less."""

    root: Text
    fingerprint: Text
    samples: NotRequired[Count]
    members: NotRequired[Text]


class SubsetManifest(TypedDict):
    """What is read of the manifest of a subset."""

    name: Text
    made: SubsetMaking
    pool: SubsetPool | None
    kept_samples: Count
    kept_distinct: Count


class TarRecord(TypedDict):
    """A tar as it was when the subset was made."""

    size_bytes: Count
    samples: Count
    stamp: Text


TarRecords: TypeAlias = dict[Text, TarRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetEntry:
    """A named subset as its manifest describes it."""

    folder: Path
    manifest: SubsetManifest
    digest: str


def require_name(name: str) -> str:
    """Return the name of a subset.

    Raises:
        ParameterError: it cannot be one.
    """
    if _NAME.fullmatch(name) is None or name.endswith((".tmp", ".damaged")):
        raise ParameterError(f"must be {NAME_RULE}", parameter="name", value=name)
    return name


def subset_names(root: Path) -> list[str]:
    """List the subsets in a folder, also those that cannot be read."""
    entries = sorted(root.iterdir()) if root.is_dir() else []
    return [
        entry.name
        for entry in entries
        if _NAME.fullmatch(entry.name) and os.path.lexists(entry / MANIFEST_NAME)
    ]


def read_entry(root: Path, name: str) -> SubsetEntry:
    """Read the manifest of a subset, and nothing of its samples.

    Raises:
        InputError: there is no such subset, or its manifest is damaged.
    """
    folder = root / require_name(name)
    path = folder / MANIFEST_NAME
    if not has_content(path):
        raise ParameterError(
            f"must be one of the subsets in {root}: {subset_names(root) or 'there are none'}",
            parameter="name",
            value=name,
        )
    record = read_record(path, _StoredManifest, way_out=_WAY_OUT)
    return SubsetEntry(folder=folder, manifest=record, digest=record["digest"])


class _StoredManifest(SubsetManifest):
    digest: Text


def read_named(root: Path, name: str) -> tuple[SubsetEntry, Selection]:
    """Read a subset with its samples.

    Raises:
        InputError: there is no such subset, or it is damaged, or was changed since it was made.
    """
    entry = read_entry(root, name)
    return entry, read_selection(entry.folder)


def find_subset(root: Path, reference: str) -> tuple[SubsetFile, SubsetInput]:
    """Read the subset that a name, or the path of a file or of a folder, stands for.

    Raises:
        InputError: there is neither, or it is damaged.
    """
    if _NAME.fullmatch(reference) and os.path.lexists(root / reference / MANIFEST_NAME):
        read_entry(root, reference)
        file, kind = read_subset_file(root / reference), "subset"
    elif os.path.lexists(reference):
        file = read_subset_file(Path(reference))
        kind = file.format
    else:
        raise InputError(
            f"{reference!r} must be the name of a subset in {root} "
            f"({', '.join(subset_names(root)) or 'there are none'}), or an existing file or folder."
        )
    return file, describe_input(file, kind=kind, place=reference)


def describe_input(file: SubsetFile, *, kind: str, place: str) -> SubsetInput:
    """Describe what a subset is made from.

    Args:
        file: as it was read.
        kind: "subset" for a named one, else the format.
        place: the name, or the path.
    """
    record = SubsetInput(
        kind=kind,
        place=str(hidden(place)),
        files={**file.digests},
        digest=selection_of(file.counted, {}, weights=file.weights).digest,
        samples=file.counted.samples,
        distinct=len(file.counted.uids),
    )
    about = {name: file.manifest[name] for name in _OF_SELECTIONS if name in file.manifest}
    if about:
        record["selection"] = hidden(about)
    return record


_OF_SELECTIONS = ("name", "made", "selector", "parameters", "identity", "siftclip")


def selection_of(counted: CountedUids, manifest: Mapping[str, Any], *, weights: Any) -> Selection:
    """Make the selection of counted uids."""
    return Selection(
        uids=counted.uids,
        multiplicities=counted.multiplicities,
        manifest={**manifest},
        weights=weights,
    )


def pool_record(pool: Pool) -> SubsetPool:
    """Describe a pool."""
    return SubsetPool(
        root=str(pool.root),
        fingerprint=pool.fingerprint,
        samples=len(pool),
        members=pool.members_digest,
    )


def pool_of_manifest(manifest: Mapping[str, Any]) -> SubsetPool | None:
    """Return the pool that the manifest of a selection, or of a subset, names; None without."""
    record = manifest.get("pool")
    try:
        return checked(record, SubsetPool, owner="pool") if record else None
    except InputError:
        return None


def tar_records(pool: Pool) -> TarRecords:
    """Describe the tars of a pool as they are."""
    return {
        shard.name: TarRecord(
            size_bytes=shard.size_bytes,
            samples=len(pool.shard_rows(number)),
            stamp=shard.stamp,
        )
        for number, shard in enumerate(pool.shards)
    }


def read_tar_records(folder: Path) -> TarRecords | None:
    """Read the tars as they were when a subset was made; None if it does not say.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / TARS_NAME
    if not os.path.lexists(path):
        return None
    try:
        return read_record(path, TarRecords)
    except InputError as error:
        way_out = "Delete it: a tar that has changed is then not named."
        raise DamagedError(error, way_out) from None


def write_named(
    root: Path,
    name: str,
    counted: CountedUids,
    *,
    operation: str,
    inputs: Sequence[SubsetInput],
    weights: Any = None,
    pool: SubsetPool | None = None,
    tars: TarRecords | None = None,
    parameters: Mapping[str, int] | None = None,
    overwrite: bool = False,
) -> tuple[SubsetEntry, bool]:
    """Write a subset under a name; one that is there with the same samples stays as it is.

    Args:
        root: the folder of all subsets.
        name: of this one.
        counted: its samples.
        operation: what made it.
        inputs: from what.
        weights: float32 [n], what they count in the loss.
        pool: that they are of, as far as it is known.
        tars: of the pool, as they are now.
        parameters: the seed and the number of draws of a sample.
        overwrite: replace another subset of that name.

    Returns:
        The subset, and whether it was written now.

    Raises:
        InputError: there is another subset of that name, or it cannot be written.
    """
    folder = root / require_name(name)
    making = SubsetMaking(
        operation=operation,
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        siftclip=siftclip.__version__,
        inputs=[*inputs],
        **(parameters or {}),  # type: ignore[typeddict-item]  # the two that it may have
    )
    manifest = SubsetManifest(
        name=name,
        made=making,
        pool=pool,
        kept_samples=counted.samples,
        kept_distinct=len(counted.uids),
    )
    selection = selection_of(counted, manifest, weights=weights)
    digest = selection.digest
    with locked(folder / LOCK_NAME, owner=f"The subset {name}", wait=True):
        if os.path.lexists(folder / MANIFEST_NAME) and not overwrite:
            there = read_entry(root, name)
            if there.digest != digest:
                raise ParameterError(
                    f"is that of another subset, of {there.manifest['kept_samples']} samples, made "
                    f"{there.manifest['made']['time']}",
                    parameter="name",
                    value=name,
                    way_out="Choose another name, or overwrite it.",
                )
            return there, False
        delete_file(folder / MANIFEST_NAME)  # from here on there is none until all is written
        if tars is None:
            delete_file(folder / TARS_NAME)
        else:
            write_json(folder / TARS_NAME, tars)
        write_selection(selection, folder)
    return SubsetEntry(folder=folder, manifest=manifest, digest=digest), True
