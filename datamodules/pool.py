"""A pool: webdataset tars with an image, a caption and a uid a sample. Nothing is copied.

The rows of a pool are its samples, shard after shard in the order of the tars' names, and are
numbered from 0. A sample's uid is the field `uid` of its JSON; without one it is derived from the
names of tar and key (`siftclip.datamodules.uids.derive_uid`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from siftclip.datamodules.faults import FaultLog
from siftclip.datamodules.tar_index import ARRAY_FIELDS, ShardIndex, load_shard_index
from siftclip.datamodules.uids import UidTable, is_uid, parse_uids
from siftclip.selectors.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The samples of a pool and where their bytes are. Arrays have one entry a row, n in all."""

    root: Path
    shards: tuple[Path, ...]
    uids: np.ndarray  # uint64 [n, 2]
    table: UidTable
    shard_of_row: np.ndarray  # int32 [n], index into `shards`
    keys: np.ndarray  # str [n]
    image_offsets_bytes: np.ndarray  # int64 [n]
    image_sizes_bytes: np.ndarray  # int64 [n]
    text_offsets_bytes: np.ndarray  # int64 [n]
    text_sizes_bytes: np.ndarray  # int64 [n]
    faults: FaultLog  # of the samples that are left out
    fingerprint: str  # changes with names and sizes of tars and the uids, not with their place

    def __len__(self) -> int:
        return len(self.uids)

    def place(self, row: int) -> str:
        """`<tar>:<key>` of a row, for messages."""
        return f"{self.shards[self.shard_of_row[row]].name}:{self.keys[row]}"

    def shard_rows(self, shard: int) -> np.ndarray:
        """The rows of one shard, int64, in the order of the tar."""
        start, end = np.searchsorted(self.shard_of_row, [shard, shard + 1])
        return np.arange(start, end, dtype=np.int64)


def find_shards(root: Path) -> tuple[Path, ...]:
    """The tars of a pool: those in `root/shards` (DataComp), else those in `root` itself."""
    if not root.is_dir():
        if ":/" in str(root):  # pathlib makes one slash of the two in a URL
            raise InputError(
                f"pool.root must be a local folder; URLs are not read yet. Got {str(root)!r}."
            )
        raise InputError(f"pool.root must be an existing folder. Got {str(root)!r}.")
    for folder in (root / "shards", root):
        shards = tuple(sorted(folder.glob("*.tar")))
        if shards:
            return shards
    raise InputError(
        f"pool.root={str(root)!r} must hold webdataset tars (*.tar), there or in shards/. "
        "It holds none."
    )


def metadata_folder(root: Path) -> Path:
    """Where parquet and npz files of a pool are: `root/metadata` (DataComp), or beside the tars."""
    folder = root / "metadata"
    return folder if folder.is_dir() else find_shards(root)[0].parent


def default_cache(root: Path) -> Path:
    """Where what is derived from a pool is kept: inside it if it can be written, else at home."""
    if os.access(root, os.W_OK):
        return root / ".siftclip"
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "siftclip" / name


def open_pool(
    root: Path, *, cache_dir: Path, max_bad_fraction: float, progress: bool = True
) -> Pool:
    """Open a pool, indexing the tars which `cache_dir` does not know yet.

    Args:
        root: folder with the tars.
        cache_dir: folder for the shard indices; what is there is reused if the tar is unchanged.
        max_bad_fraction: how many samples may be bad before this is an error.
        progress: show a bar.

    Raises:
        InputError: there is no pool, a tar cannot be read, or too many samples are bad.
    """
    shards = find_shards(root)
    indices: list[ShardIndex] = []
    for shard in tqdm(shards, desc="index", unit="shard", disable=not progress, leave=False):
        indices.append(load_shard_index(shard, cache_dir / "index" / f"{shard.stem}.npz"))
    faults = _all_faults(indices, shards)
    samples = sum(len(index) for index in indices)
    faults.check(
        owner=f"pool {root}", total=samples + faults.samples, max_bad_fraction=max_bad_fraction
    )
    if samples == 0:
        raise InputError(f"pool.root={str(root)!r} holds {len(shards)} tars without one sample.")
    if faults.samples:
        log.warning("pool %s: left out %s", root, faults.summary())
    derived = sum(index.derived_uids for index in indices)
    if derived:
        log.info("pool %s: %d of %d uids derived from tar and key", root, derived, samples)
    pool = _concatenate(root, shards, indices, faults)
    repeated = samples - len(pool)
    if repeated:
        log.warning("pool %s: %d samples repeat a uid; the first of each is used", root, repeated)
    return pool


def _all_faults(indices: list[ShardIndex], shards: tuple[Path, ...]) -> FaultLog:
    """Join the shards' faults; what a cut tar has lost is estimated from the whole ones."""
    faults = FaultLog()
    whole = [len(index) for index in indices if not index.truncated]
    for index, shard in zip(indices, shards, strict=True):
        faults.merge(index.faults)
        if index.truncated and whole:
            lost = int(np.median(whole)) - len(index) - 1  # the index itself has counted one
            if lost > 0:
                faults.add("lost behind the cut (estimated)", shard.name, samples=lost)
    return faults


def _concatenate(
    root: Path, shards: tuple[Path, ...], indices: list[ShardIndex], faults: FaultLog
) -> Pool:
    columns = {
        name: np.concatenate([getattr(index, name) for index in indices]) for name in ARRAY_FIELDS
    }
    lengths = [len(index) for index in indices]
    columns["shard_of_row"] = np.repeat(np.arange(len(shards), dtype=np.int32), lengths)
    table = UidTable.build(columns["uids"])
    if table.duplicates():
        first = table.find(columns["uids"]) == np.arange(len(columns["uids"]))
        columns = {name: values[first] for name, values in columns.items()}
        table = UidTable.build(columns["uids"])
    digest = hashlib.sha256()
    for shard, length in zip(shards, lengths, strict=True):
        digest.update(f"{shard.name}:{length}:{shard.stat().st_size}\n".encode())
    digest.update(columns["uids"].tobytes())
    return Pool(
        root=root,
        shards=shards,
        table=table,
        faults=faults,
        fingerprint=digest.hexdigest()[:16],
        **columns,
    )


def read_metadata_uids(path: Path) -> tuple[np.ndarray, np.ndarray, FaultLog]:
    """The uids of a metadata parquet: uint64 [n, 2], a bool [n] of which are valid, and faults.

    Raises:
        InputError: the file is not parquet or has no column `uid`.
    """
    try:
        column = pq.read_table(path, columns=["uid"])["uid"].to_pylist()
    except Exception as error:  # pyarrow raises ArrowInvalid, KeyError and OSError for bad files
        raise InputError(f"{path} must be a parquet file with a column 'uid': {error}.") from None
    faults = FaultLog()
    valid = np.fromiter((is_uid(uid) for uid in column), dtype=bool, count=len(column))
    for i in np.flatnonzero(~valid):
        faults.add("with a uid that is not 32 hexadecimal digits", f"{path.name}, row {i}")
    uids = parse_uids([uid if ok else "0" * 32 for uid, ok in zip(column, valid, strict=True)])
    return uids, valid, faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of what is named somewhere is really there."""

    named: int
    present: int

    @property
    def fraction(self) -> float:
        return self.present / self.named if self.named else 1.0

    def __str__(self) -> str:
        return f"{self.present} of {self.named} ({100 * self.fraction:.1f} %)"


def metadata_coverage(pool: Pool) -> Coverage | None:
    """How many samples of the pool's metadata its shards hold; None if it has no metadata."""
    folder = pool.root / "metadata"
    named = present = 0
    for path in sorted(folder.glob("*.parquet")):
        uids, valid, _ = read_metadata_uids(path)
        named += len(uids)
        present += int((pool.table.find(uids[valid]) >= 0).sum())
    return Coverage(named=named, present=present) if named else None
