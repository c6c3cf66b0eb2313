"""Features of a pool on disk: DataComp's npz files as they are, or what `siftclip embed` wrote.

A feature set is a folder of parts. A part is `X.npz` with arrays [n, d], and the uids of its n
rows: in `X.parquet` beside it (DataComp), or in the npz itself under `uids` (ours).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siftclip.datamodules.features.provenance import MANIFEST_NAME, check_sources
from siftclip.datamodules.index.faults import FaultLog
from siftclip.datamodules.pool.metadata import read_metadata_uids
from siftclip.datamodules.pool.pool import Coverage, Pool
from siftclip.errors import InputError
from siftclip.file_identity import START_AGAIN, FileIdentity
from siftclip.files import npz_headers, read_json, read_npz, require_floats
from siftclip.selectors.core.source import set_name

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturePart:
    """One npz of a feature set, joined with the pool."""

    path: Path
    identity: FileIdentity  # of the npz when its uids were read
    uids: int  # rows of the npz
    positions: np.ndarray  # int64 [m], rows of the npz whose sample is in the pool
    rows: np.ndarray  # int64 [m], their rows in the pool


class MissingArrayError(InputError):
    """A feature set lacks an array that is asked for."""

    def __init__(self, key: str, path: Path, there: Sequence[str]) -> None:
        """Name the array, the file, and what the file holds."""
        self.key, self.path, self.there = key, path, there
        super().__init__(
            f"{path} lacks the array {key!r}, which begins with the name of its feature set. It "
            f"holds {there}."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.path, self.there)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureStore:
    """The parts of a feature set that concern a pool."""

    folder: Path
    parts: tuple[FeaturePart, ...]
    pool_coverage: Coverage  # samples of the pool that have features
    metadata_coverage: Coverage  # samples of the feature set that the pool's shards hold
    fingerprint: str

    def holds(self, keys: tuple[str, ...]) -> bool:
        """Return whether the first part has all of these arrays."""
        return set(keys) <= set(npz_headers(self.parts[0].path))

    def require(self, keys: tuple[str, ...]) -> FeatureStore:
        """Check, from the headers alone, that every part has the arrays, a row for each uid.

        Raises:
            InputError: a part is damaged, an array is missing or of another kind, or rows differ,
                or the widths of one feature set.
        """
        first: dict[str, tuple[Path, str, int]] = {}  # by the name of a feature set
        for part in self.parts:
            for key, width in _check_arrays(part.path, keys, part.uids).items():
                path, other, expected = first.setdefault(set_name(key), (part.path, key, width))
                if width != expected:
                    raise InputError(
                        f"{part.path}: the array {key!r} has {width} columns, and {other!r} of "
                        f"{path} has {expected}. Features of one model have one width: one of the "
                        "two is of another model, or damaged. Embed these samples again."
                    )
        return self


def open_features(
    pool: Pool, *, folder: Path | None, keys: tuple[str, ...], max_bad_fraction: float
) -> FeatureStore:
    """Open a feature set of which the arrays `keys` will be read, see `join_features`."""
    return join_features(pool, folder=folder, max_bad_fraction=max_bad_fraction).require(keys)


def join_features(pool: Pool, *, folder: Path | None, max_bad_fraction: float) -> FeatureStore:
    """Find the samples of a pool in a feature set.

    Args:
        pool: whose samples are looked for.
        folder: of the parts; None means the pool's own metadata.
        max_bad_fraction: how many rows may have a bad uid.

    Raises:
        InputError: there are no features, a part is damaged, none belongs to the pool, or they are
            of a wrong activation.
    """
    folder = pool.storage.metadata() if folder is None else folder
    check_activation(folder)
    paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not paths:
        raise InputError(
            f"No features (*.npz) in {folder}. Make them with `siftclip embed`, or name a folder "
            "that has some."
        )
    check_sources(folder, paths, pool)
    digest = hashlib.sha256()
    faults = FaultLog()
    parts: list[FeaturePart] = []
    covered = np.zeros(len(pool), dtype=bool)
    named = 0
    for path in paths:
        files = [file for file in (path, path.with_suffix(".parquet")) if file.exists()]
        identities = [FileIdentity.of(file) for file in files]  # first: what is read is of these
        uids, valid, part_faults = _read_uids(path)
        faults.merge(part_faults)
        rows = pool.table.find(uids)
        rows[~valid] = -1
        positions = _first_positions(rows, covered)
        named += len(uids)
        covered[rows[positions]] = True
        parts.append(
            FeaturePart(
                path=path,
                identity=identities[0],
                uids=len(uids),
                positions=positions,
                rows=rows[positions],
            )
        )
        for file, identity in zip(files, identities, strict=True):
            identity.require(file, START_AGAIN)
            digest.update(f"{identity.stamp(file.name)}\n".encode())
    faults.check(owner=f"features {folder}", total=named, max_bad_fraction=max_bad_fraction)
    present = int(covered.sum())
    store = FeatureStore(
        folder=folder,
        parts=tuple(parts),
        pool_coverage=Coverage(named=len(pool), present=present),
        metadata_coverage=Coverage(named=named, present=present),
        fingerprint=digest.hexdigest()[:16],
    )
    log.info(
        "features %s: %s samples of the pool have features; %s feature rows are in its shards",
        folder,
        store.pool_coverage,
        store.metadata_coverage,
    )
    if present == 0:
        raise InputError(
            f"No sample of the pool {pool.root} is among the {named} rows of the features in "
            f"{folder}. Do they belong to this pool?"
        )
    return store


def check_activation(folder: Path) -> None:
    """Refuse features that were made with another activation than their model's weights need.

    Earlier versions of siftclip made such features, and kept no record of the activation.

    Raises:
        InputError: the folder holds such features, or its manifest is damaged.
    """
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        return
    manifest = read_json(path)
    model = manifest.get("model") if isinstance(manifest, dict) else None
    if not isinstance(model, dict) or "loaded" in manifest or not model.get("pretrained"):
        return
    options = model.get("options")
    # Here, since importing open_clip takes seconds, which other features need not cost.
    from siftclip.datamodules.models.weight_needs import activation_name, wrong_activation

    name, tag = str(model.get("name")), str(model["pretrained"])
    if model.get("architecture") is None:
        built = wrong_activation(name, tag, options if isinstance(options, dict) else None)
        if built is not None:
            raise InputError(
                f"{folder} holds features of {name} that an earlier version of siftclip made with "
                f"{activation_name(built)}, while the weights {tag!r} were trained with "
                f"{activation_name(not built)}: they are those of another model. Delete that "
                "folder and embed again, or choose another name for the feature set. Targets of "
                "that model have the same fault: siftclip target makes them again."
            )


def _first_positions(rows: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Find the positions, ascending, that give a row of the pool its features for the first time.

    Args:
        rows: int64 [m], the pool's rows of a part; -1 where there is none.
        covered: bool [n], the pool's rows that earlier parts gave features to.
    """
    positions = np.flatnonzero(rows >= 0)
    positions = positions[~covered[rows[positions]]]
    _, first = np.unique(rows[positions], return_index=True)
    distinct: np.ndarray = positions[np.sort(first)]
    return distinct


def _read_uids(path: Path) -> tuple[np.ndarray, np.ndarray, FaultLog]:
    parquet = path.with_suffix(".parquet")
    if parquet.exists():
        return read_metadata_uids(parquet)
    (uids,) = read_npz(path, ["uids"])
    if uids.dtype != np.uint64 or uids.ndim != 2 or uids.shape[1] != 2:
        raise InputError(
            f"{path}: the array 'uids' must be uint64 [n, 2]. Got {uids.dtype} {uids.shape}."
        )
    return uids, np.ones(len(uids), dtype=bool), FaultLog()


def _check_arrays(path: Path, keys: tuple[str, ...], samples: int) -> dict[str, int]:
    """Check the arrays' kind, and their rows against the uids; return their widths by key."""
    headers = npz_headers(path)
    for key in keys:
        if key not in headers:
            raise MissingArrayError(key, path, sorted(headers))
        shape, dtype = headers[key]
        require_floats(dtype, f"{path}: the array {key!r}")
        if len(shape) == 2 and not shape[1]:
            raise InputError(f"{path}: the array {key!r} has no columns. Its shape is {shape}.")
        if len(shape) != 2 or shape[0] != samples:
            parquet = path.with_suffix(".parquet")
            raise InputError(
                f"{path}: the array {key!r} must have one row for each of the {samples} uids in "
                f"{parquet.name if parquet.exists() else 'it'}. Its shape is {shape}."
            )
    return {key: headers[key][0][1] for key in keys}


def is_readable(path: Path) -> bool:
    """Return whether an npz is whole, as far as its headers and its table of contents tell."""
    try:
        npz_headers(path)
    except InputError:
        return False
    return True
