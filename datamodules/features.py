"""Features of a pool on disk: DataComp's npz files as they are, or what `siftclip embed` wrote.

A feature set is a folder of parts. A part is `X.npz` with arrays [n, d], and the uids of its n
rows: in `X.parquet` beside it (DataComp), or in the npz itself under `uids` (ours).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from siftclip.datamodules.faults import FaultLog
from siftclip.datamodules.files import read_npy_header, read_npz
from siftclip.datamodules.pool import Coverage, Pool, read_metadata_uids
from siftclip.selectors.base import Chunk
from siftclip.selectors.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturePart:
    """One npz of a feature set, joined with the pool."""

    path: Path
    positions: np.ndarray  # int64 [m], rows of the npz whose sample is in the pool
    rows: np.ndarray  # int64 [m], their rows in the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureStore:
    """The parts of a feature set that concern a pool."""

    folder: Path
    parts: tuple[FeaturePart, ...]
    pool_coverage: Coverage  # samples of the pool that have features
    metadata_coverage: Coverage  # samples of the feature set that the pool's shards hold
    fingerprint: str

    def read(self, part: FeaturePart, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """The features of a part by key, float [m, d], aligned with `part.rows`.

        Raises:
            InputError: a key is missing, or an array does not have as many rows as uids.
        """
        arrays = read_npz(part.path, list(keys))
        return {
            key: torch.from_numpy(array[part.positions])
            for key, array in zip(keys, arrays, strict=True)
        }

    def chunks(
        self, part: FeaturePart, pool: Pool, keys: tuple[str, ...], chunk_samples: int
    ) -> Iterator[Chunk]:
        """The samples of a part in chunks of at most `chunk_samples`."""
        features = self.read(part, keys)
        for start in range(0, len(part.rows), chunk_samples):
            at = slice(start, start + chunk_samples)
            rows = part.rows[at]
            yield Chunk(
                rows=rows,
                uids=pool.uids[rows],
                features={key: values[at] for key, values in features.items()},
            )


def open_features(
    pool: Pool, *, folder: Path | None, keys: tuple[str, ...], max_bad_fraction: float
) -> FeatureStore:
    """Open a feature set and check that every part has the keys and as many rows as uids.

    Args:
        pool: whose samples are looked for.
        folder: of the parts; None means the pool's own metadata.
        keys: the arrays that will be read.
        max_bad_fraction: how many rows may have a bad uid.

    Raises:
        InputError: there are no features, a part is damaged, a key is missing, or rows differ.
    """
    folder = pool.storage.metadata() if folder is None else folder
    paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not paths:
        raise InputError(
            f"No features (*.npz) in {folder}. Make them with `siftclip embed`, or point "
            "features.root at a folder that has some."
        )
    digest = hashlib.sha256()
    faults = FaultLog()
    parts: list[FeaturePart] = []
    covered = np.zeros(len(pool), dtype=bool)
    named = 0
    for path in paths:
        uids, valid, part_faults = _read_uids(path)
        _check_rows(path, keys, len(uids))
        faults.merge(part_faults)
        rows = pool.table.find(uids)
        rows[~valid] = -1
        positions = _first_positions(rows, covered)
        named += len(uids)
        covered[rows[positions]] = True
        parts.append(FeaturePart(path=path, positions=positions, rows=rows[positions]))
        for file in (path, path.with_suffix(".parquet")):
            if file.exists():
                status = file.stat()
                digest.update(f"{file.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
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


def _first_positions(rows: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Positions of a part, ascending, that give a row of the pool its features for the first time.

    Args:
        rows: int64 [m], the pool's rows of a part; -1 where there is none.
        covered: bool [n], the pool's rows that earlier parts gave features to.
    """
    positions = np.flatnonzero(rows >= 0)
    positions = positions[~covered[rows[positions]]]
    _, first = np.unique(rows[positions], return_index=True)
    return positions[np.sort(first)]


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


def _check_rows(path: Path, keys: tuple[str, ...], samples: int) -> None:
    """Check the arrays' kind, and their rows against the uids, from the npy headers alone."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = sorted(file.files)
            headers = {key: _header(file, key) for key in keys if key in file.files}
    except Exception as error:  # numpy raises zipfile, zlib, value and OS errors for damaged files
        raise InputError(f"{path} is not a readable npz file: {error}.") from None
    for key in keys:
        if key not in headers:
            raise InputError(
                f"features.name asks for the array {key!r}, which {path} lacks. It holds {names}."
            )
        shape, dtype = headers[key]
        if dtype.kind != "f":
            raise InputError(f"{path}: the array {key!r} must hold floats. Its dtype is {dtype}.")
        if len(shape) != 2 or shape[0] != samples:
            parquet = path.with_suffix(".parquet")
            raise InputError(
                f"{path}: the array {key!r} must have one row for each of the {samples} uids in "
                f"{parquet.name if parquet.exists() else 'it'}. Its shape is {shape}."
            )


def _header(file: np.lib.npyio.NpzFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    with file.zip.open(f"{key}.npy") as member:  # type: ignore[union-attr]  # None when closed
        shape, _, dtype = read_npy_header(member)
        return shape, dtype
