"""The original sizes of a pool's images, as its metadata or the samples' JSON give them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from siftclip.datamodules.index.tar_walk import TruncatedTarError, walk_tar
from siftclip.datamodules.pool.metadata import read_metadata
from siftclip.datamodules.pool.pool import Pool, metadata_tables
from siftclip.errors import InputError
from siftclip.files import has_form, read_npy, write_npy
from siftclip.progress import track
from siftclip.reading import reason_of

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("original_width", "original_height")
_LARGEST = 2**31  # pixels, beyond any image
_JSON_FIELDS = (COLUMNS, ("width", "height"))  # img2dataset's, then an image's as it is stored


def read_image_sizes(pool: Pool, *, progress: bool) -> np.ndarray:
    """Read width and height of each image before any resize, int64 [n, 2]; -1 where unknown.

    The columns `original_width` and `original_height` of the pool's metadata count; a pool without
    metadata is read once for the fields of these names, or `width` and `height`, in the JSON of its
    samples, and the answer is kept beside the index.

    Raises:
        InputError: the metadata lacks the columns.
    """
    paths = metadata_tables(pool)
    return _from_metadata(pool, paths) if paths else _from_json(pool, progress)


def _from_metadata(pool: Pool, paths: list[Path]) -> np.ndarray:
    sizes = np.full((len(pool), 2), -1, dtype=np.int64)
    for path in reversed(paths):  # of a uid that comes twice, the first row counts
        uids, valid, _, names, table = read_metadata(path, COLUMNS)
        if not set(COLUMNS) <= set(names):
            raise InputError(f"{path} must have the columns {COLUMNS}. It has {names}.")
        values = np.stack([_whole_numbers(path, table[name], name) for name in COLUMNS], axis=1)
        rows = np.where(valid, pool.table.find(uids), -1)
        present = np.flatnonzero(rows >= 0)[::-1]
        sizes[rows[present]] = values[present]
    return sizes


def _whole_numbers(path: Path, column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Convert a column of whole numbers to int64 [n], -1 for null."""
    import pyarrow as pa

    try:
        # a float is one, too, if it is whole: pandas makes floats of integers with gaps
        return np.asarray(column.cast(pa.int64()).fill_null(-1).to_numpy())
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: the column {name!r} must hold whole numbers: {reason_of(error)}."
        ) from None


def _from_json(pool: Pool, progress: bool) -> np.ndarray:
    path = pool.table_folder / "image_sizes.npy"
    with suppress(InputError):  # a cache is only a cache
        known = read_npy(path)
        if has_form(known, np.int64, (len(pool), 2)):
            return known
    sizes = np.full((len(pool), 2), -1, dtype=np.int64)
    shards = track(
        pool.shards, total=len(pool.shards), label="image sizes", unit="tar", bar=progress
    )
    for number, shard in enumerate(shards):
        rows = {int(pool.sample_offsets_bytes[row]): row for row in pool.shard_rows(number)}
        with pool.storage.open_tar(shard) as tar:
            try:
                for _, members, start, _ in walk_tar(
                    tar, content_of="json", key_split=pool.key_split
                ):
                    row = rows.get(start)
                    record = next((m.content for m in members if m.suffix == "json"), None)
                    if row is not None and record:
                        sizes[row] = _size_in(record)
            except TruncatedTarError:
                pass  # the index has counted it
    write_npy(path, sizes)
    return sizes


def _size_in(record: bytes) -> tuple[int, int]:
    """Find width and height in a sample's JSON; (-1, -1) where it has none."""
    try:
        fields = json.loads(record)
        for names in _JSON_FIELDS:
            width, height = (fields.get(name) for name in names)
            if isinstance(width, int) and isinstance(height, int):
                return min(width, _LARGEST), min(height, _LARGEST)
    except (ValueError, AttributeError, RecursionError):
        pass
    return -1, -1
