"""Which tar the features of a shard are of, so that features of a replaced one are noticed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import read_ranges
from siftclip.errors import InputError
from siftclip.files import read_json, read_npz

MANIFEST_NAME = "features.json"
SOURCE = "source"  # the name of the array in an npz: the stamp of the tar, and its content
_PROBES = 8  # samples of a tar that are compared byte by byte


def shard_source(pool: Pool, shard: int) -> np.ndarray:
    """Return what stands for a tar: its stamp and a digest of its content, two texts."""
    return np.asarray([pool.shards[shard].stamp, _content(pool, shard)])


def _content(pool: Pool, shard: int) -> str:
    """Hash the keys, places and sizes of a tar's samples, and the bytes of some."""
    rows = pool.shard_rows(shard)
    digest = hashlib.sha256(b"\0".join(pool.keys[rows].tolist()))
    for offsets, sizes in (
        (pool.image_offsets_bytes, pool.image_sizes_bytes),
        (pool.text_offsets_bytes, pool.text_sizes_bytes),
    ):
        digest.update(np.ascontiguousarray(offsets[rows]).tobytes())
        digest.update(np.ascontiguousarray(sizes[rows]).tobytes())
    if len(rows):
        probes = np.unique(rows[np.linspace(0, len(rows) - 1, _PROBES).astype(np.int64)])
        ranges = read_ranges(
            pool,
            np.full(len(probes), shard),
            pool.sample_offsets_bytes[probes],
            pool.sample_sizes_bytes[probes],
        )
        for number, data in sorted(ranges, key=lambda pair: pair[0]):
            digest.update(f"{number}\0".encode() + (data if isinstance(data, bytes) else b""))
    return digest.hexdigest()


def is_stale(path: Path, pool: Pool, shard: int) -> bool:
    """Return whether the features in an npz are of another tar than the shard is now.

    A copy of the tar, whose time of change is another, is the same tar. Features of earlier
    versions of siftclip do not say what they are of.
    """
    try:
        (source,) = read_npz(path, [SOURCE])
    except InputError:  # an earlier version's, or damaged, which its reader says better
        return False
    stamp: str
    content: str
    stamp, content = source.tolist()
    return stamp != pool.shards[shard].stamp and content != _content(pool, shard)


def check_sources(folder: Path, paths: Sequence[Path], pool: Pool) -> None:
    """Check that features which were made of this pool are of its tars as they are now.

    Features of another pool, such as the one that this is a part of, are joined by uid alone.

    Raises:
        InputError: a tar has been replaced since it was embedded.
    """
    manifest = folder / MANIFEST_NAME
    if not os.path.lexists(manifest) or _pool_of(read_json(manifest)) != pool.fingerprint:
        return
    shards = {shard.stem: number for number, shard in enumerate(pool.shards)}
    stale = [
        path.name
        for path in paths
        if path.stem in shards and is_stale(path, pool, shards[path.stem])
    ]
    if stale:
        raise InputError(
            f"{folder}: the features of {len(stale)} tars ({', '.join(stale[:3])}) are of other "
            "images or captions than these tars hold now. Run siftclip embed again, which embeds "
            "these tars anew."
        )


def _pool_of(manifest: object) -> object:
    pool = manifest.get("pool") if isinstance(manifest, dict) else None
    return pool.get("fingerprint") if isinstance(pool, dict) else None
