"""The stages of `siftclip subset`: named selections, what made them, and whether they still fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from siftclip.datamodules.pool.index_changes import index_changes
from siftclip.datamodules.pool.pool import Pool, PoolOptions
from siftclip.datamodules.selection.algebra import CountedUids, combine, sample
from siftclip.datamodules.selection.registry import (
    SubsetEntry,
    SubsetInput,
    SubsetPool,
    TarRecords,
    describe_input,
    find_subset,
    pool_of_manifest,
    pool_record,
    read_entry,
    read_tar_records,
    require_name,
    subset_names,
    tar_records,
    write_named,
)
from siftclip.datamodules.selection.subset_files import (
    SUFFIXES,
    SubsetFormat,
    read_subset_file,
    write_subset_file,
)
from siftclip.datamodules.selection.verification import Finding, verify_subset
from siftclip.datamodules.storage.local import is_url
from siftclip.errors import InputError
from siftclip.locks import lock_beside, locked
from siftclip.trainer.builders.selection import pool_from
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.settings.commands import (
    SubsetCombineCommand,
    SubsetExportCommand,
    SubsetImportCommand,
    SubsetListCommand,
    SubsetShowCommand,
    SubsetVerifyCommand,
)
from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.pool import PoolSettings

FOLDER = "subsets"

log = logging.getLogger(__name__)
_POOL_OF_LIST = "pool.root must name the pool whose tars are listed, such as pool.root=/data/pool."


def subsets_root(common: CommonSettings) -> Path:
    """Return the folder of all subsets."""
    return common.output_root / FOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetMade:
    """A subset that was asked for."""

    entry: SubsetEntry
    is_new: bool  # or was there already, with the same samples
    present: int | None = None  # of its distinct samples in the pool; None: no pool was named


def import_stage(settings: SubsetImportCommand) -> SubsetMade:
    """Read a subset from a file, and keep it under a name.

    Raises:
        InputError: the file is missing or damaged, a list of tars comes without its pool, nothing
            of it is in the pool that was named, or there is another subset of the name.
    """
    wanted, root = settings.subset_import, subsets_root(settings.common)
    path = Path(wanted.path)
    name = _name_of(path) if wanted.name is None else wanted.name
    with options_of(under("subset_import", "name")):
        require_name(name)
    if not path.exists():
        raise InputError(
            f"subset_import.path must be an existing file or folder. Got {str(path)!r}."
        )
    kind: SubsetFormat | None = None if wanted.format == "auto" else wanted.format
    pool = _opened(settings.pool, settings.common)
    with options_of({"pool": "pool.root"}):
        file = read_subset_file(path, kind, pool=pool)
    present = None if pool is None else int((pool.table.find(file.counted.uids) >= 0).sum())
    if pool is not None and not present:
        raise InputError(
            f"None of the {len(file.counted.uids)} uids of {path} is in the pool {pool.root}. "
            "Is this the pool that they are of?"
        )
    given = describe_input(file, kind=file.format, place=str(path))
    noted = pool_of_manifest(file.manifest)
    if pool is not None and noted is not None and noted["fingerprint"] != pool.fingerprint:
        log.warning(
            "%s was made for another pool, or for this one as it was before (%s, %s); noted is %s "
            "as it is now (%s)",
            path,
            noted["root"],
            noted["fingerprint"],
            pool.root,
            pool.fingerprint,
        )
    with options_of(under("subset_import", "name", "overwrite")):
        entry, is_new = write_named(
            root,
            name,
            file.counted,
            operation="import",
            inputs=[given],
            weights=file.weights,
            pool=noted if pool is None else pool_record(pool),
            tars=_known_tars(root, [given]) if pool is None else tar_records(pool),
            overwrite=wanted.overwrite,
        )
    return SubsetMade(entry=entry, is_new=is_new, present=present)


def _name_of(path: Path) -> str:
    """Return the name that a file gives to a subset."""
    absolute = path.absolute()
    stem = absolute.name if absolute.is_dir() else absolute.stem
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).lstrip(".-") or "subset"


def _opened(pool: PoolSettings | None, common: CommonSettings) -> Pool | None:
    return None if pool is None else pool_from(pool, progress=common.progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetExported:
    """A file that was written."""

    path: Path
    format: SubsetFormat
    counted: CountedUids


def export_stage(settings: SubsetExportCommand) -> SubsetExported:
    """Write a subset to a file.

    Raises:
        InputError: there is no such subset, something lies where it would be written, or a list of
            tars cannot say what is selected.
    """
    wanted = settings.subset_export
    path, kind = Path(wanted.path), _format_of(Path(wanted.path), wanted.format)
    if kind == "shards" and settings.pool is None:
        raise InputError(_POOL_OF_LIST)
    _require_free(path, overwrite=wanted.overwrite)
    file = find_subset(subsets_root(settings.common), wanted.subset)[0]
    pool = _opened(settings.pool, settings.common) if kind == "shards" else None
    with locked(lock_beside(path), owner=f"subset_export.path={str(path)!r}"):
        _require_free(path, overwrite=wanted.overwrite)  # no longer changes
        write_subset_file(path, kind, file.counted, weights=file.weights, pool=pool)
    return SubsetExported(path=path, format=kind, counted=file.counted)


def _format_of(path: Path, wanted: SubsetFormat | Literal["auto"]) -> SubsetFormat:
    suffixes: dict[str, SubsetFormat] = {**SUFFIXES, ".txt": "text"}
    if wanted != "auto":
        expected = next((suffix for suffix, kind in SUFFIXES.items() if kind == wanted), "")
        if not path.name.endswith(expected):
            raise InputError(
                f"subset_export.path must end in {expected} for subset_export.format={wanted}, by "
                f"which it is read. Got {str(path)!r}."
            )
        return wanted
    if path.suffix not in suffixes:
        raise InputError(
            f"subset_export.path must end in one of {', '.join(suffixes)}, or "
            f"subset_export.format say what it is. Got {str(path)!r}."
        )
    return suffixes[path.suffix]


def _require_free(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError(f"subset_export.path={str(path)!r} is a folder. Name a file.")
    if path.exists() and not overwrite:
        raise InputError(
            f"subset_export.path={str(path)!r} exists. Name another file, or set "
            "subset_export.overwrite=true."
        )


def combine_stage(settings: SubsetCombineCommand) -> SubsetMade:
    """Make a subset of one or two others.

    Raises:
        InputError: there is no such subset, nothing would be left, or there is another subset of
            the name.
    """
    wanted, root = settings.subset_combine, subsets_root(settings.common)
    with options_of(under("subset_combine", "name")):
        require_name(wanted.name)
    files, inputs, pools = [], [], []
    for reference in (wanted.a, wanted.b):
        if reference is not None:
            file, given = find_subset(root, reference)
            files.append(file)
            inputs.append(given)
            pools.append(pool_of_manifest(file.manifest))
    parameters: dict[str, int] = {}
    if wanted.operation == "sample":
        parameters = {"samples": wanted.samples or 0, "seed": settings.common.seed}
        counted = sample(files[0].counted, parameters["samples"], seed=parameters["seed"])
    else:
        counted = combine(wanted.operation, files[0].counted, files[1].counted)
    if not len(counted.uids):
        raise InputError(
            f"The {wanted.operation} of {wanted.a} and {wanted.b} has no samples: "
            f"{len(files[0].counted.uids)} and {len(files[1].counted.uids)} distinct uids."
        )
    _warn_of_weights(inputs, [file.weights is not None for file in files])
    with options_of(under("subset_combine", "name", "overwrite")):
        entry, is_new = write_named(
            root,
            wanted.name,
            counted,
            operation=wanted.operation,
            inputs=inputs,
            pool=_common_pool(inputs, pools),
            tars=_known_tars(root, inputs),
            parameters=parameters,
            overwrite=wanted.overwrite,
        )
    return SubsetMade(entry=entry, is_new=is_new)


def _common_pool(
    inputs: Sequence[SubsetInput], pools: Sequence[SubsetPool | None]
) -> SubsetPool | None:
    """Return the pool that all inputs are of; None, with a warning, where they are of several."""
    known = {pool["fingerprint"]: pool for pool in pools if pool is not None}
    if len(known) > 1:
        log.warning(
            "%s are of several pools (%s), so that none is noted",
            " and ".join(given["place"] for given in inputs),
            ", ".join(known),
        )
    return next(iter(known.values())) if len(known) == 1 and None not in pools else None


def _known_tars(root: Path, inputs: Sequence[SubsetInput]) -> TarRecords | None:
    """Return the tars that were noted with the subsets a new one is made from, if equally."""
    noted = [
        read_tar_records(root / given["place"]) if given["kind"] == "subset" else None
        for given in inputs
    ]
    return noted[0] if all(tars == noted[0] for tars in noted) else None


def _warn_of_weights(inputs: Sequence[SubsetInput], weighs: Sequence[bool]) -> None:
    names = [given["place"] for given, has in zip(inputs, weighs, strict=True) if has]
    if names:
        log.warning("the weights of %s are left out: how to combine them nobody said", names)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetState:
    """A subset in a list: what its manifest says, or why it cannot be read."""

    name: str
    entry: SubsetEntry | None
    fault: str = ""


def list_stage(settings: SubsetListCommand) -> list[SubsetState]:
    """List all subsets, by name."""
    root = subsets_root(settings.common)
    states = []
    for name in subset_names(root):
        try:
            states.append(SubsetState(name=name, entry=read_entry(root, name)))
        except InputError as error:
            states.append(SubsetState(name=name, entry=None, fault=str(error)))
    return states


def show_stage(settings: SubsetShowCommand) -> SubsetEntry:
    """Read what a subset is, and what made it.

    Raises:
        InputError: there is no such subset, or it is damaged.
    """
    with options_of(under("subset_show", "name")):
        return read_entry(subsets_root(settings.common), settings.subset_show.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What checking a subset against a pool has found."""

    subset: str
    pool: Pool
    findings: list[Finding]

    @property
    def faults(self) -> list[Finding]:
        """Those that say that the subset does not fit."""
        return [finding for finding in self.findings if finding.is_fault]


def verify_stage(settings: SubsetVerifyCommand) -> Verified:
    """Check that a subset is whole, and of the pool that is named, or else the one it was made for.

    Raises:
        InputError: there is no such subset, it is damaged, or there is no pool.
    """
    root, reference = subsets_root(settings.common), settings.subset_verify.subset
    file, given = find_subset(root, reference)
    noted = pool_of_manifest(file.manifest)
    tars = _known_tars(root, [given])
    wanted = settings.pool if settings.pool is not None else noted_pool(noted, reference)
    with options_of(under("pool", "root", "key_split")):
        index = index_changes(
            PoolOptions(
                root=wanted.root,
                cache_dir=wanted.cache_dir,
                key_split=wanted.key_split,
                storage_options=wanted.storage_options,
                shard_cache_gb=wanted.shard_cache_gb,
            )
        )
    pool = pool_from(wanted, progress=settings.common.progress)
    findings = verify_subset(file.counted, pool, noted=noted, tars=tars, index=index)
    return Verified(subset=reference, pool=pool, findings=findings)


def noted_pool(noted: SubsetPool | None, reference: str) -> PoolSettings:
    """Return the pool that a subset was made for.

    Args:
        noted: what its manifest says.
        reference: what it was called, for messages.

    Raises:
        InputError: it is not noted, or is not a folder of this machine: a manifest does not decide
            which server is asked.
    """
    root = None if noted is None else noted["root"]
    if root is None or is_url(root) or not Path(root).is_dir():
        what = "does not say which pool it is of"
        if root is not None:
            what = f"was made for {root}, which is {'a URL' if is_url(root) else 'not there'}"
        raise InputError(f"{reference} {what}. Name the pool: pool.root=FOLDER|URL.")
    return PoolSettings(root=root)
