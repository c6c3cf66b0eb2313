"""Numbers made elsewhere, joined with a pool by uid."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siftclip.datamodules.index.uids import from_structured
from siftclip.datamodules.pool.metadata import Metadata, read_metadata
from siftclip.datamodules.pool.pool import Pool, metadata_tables
from siftclip.datamodules.selection.selection import WEIGHTS_NAME, read_subset
from siftclip.errors import InputError, ParameterError
from siftclip.files import content_digest, file_stamp, read_npy
from siftclip.reading import reason_of
from siftclip.selectors.core.source import ExternalColumn, ListColumn

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


def read_pool_column(pool: Pool, column: ExternalColumn) -> np.ndarray:
    """Read the numbers of a column for each row of the pool, float64 [n], NaN where there is none.

    Raises:
        InputError: a file is missing or damaged, or none of its uids is in the pool.
    """
    paths = _paths(pool, column)
    values = np.full(len(pool), np.nan)
    for path in reversed(paths):  # of a uid that several files have, the first counts
        from_file = read_column(pool, path, column.column, owner=column, must_match=len(paths) == 1)
        values = np.where(np.isnan(from_file), values, from_file)
    return values


def read_pool_lists(pool: Pool, column: ExternalColumn) -> ListColumn:
    """Read the lists of a column for each row of the pool; empty where there is none.

    The column holds lists of whole numbers of at least 0, or such a number, which is a list of one.
    Nulls are left out, also in lists. Of a uid that occurs several times, the first list that is
    not empty counts.

    Args:
        pool: whose rows are wanted.
        column: see `ExternalColumn`; of parquet files only.

    Raises:
        InputError: a file is missing or damaged, has no such column, or holds something else, or
            none of its uids is in the pool.
    """
    paths = _paths(pool, column)
    values, sizes, rows = [], [], []
    for path in paths:
        uids, lists = _read_lists(path, column.column, column)
        pool_rows = pool.table.find(uids)
        log.info("%s: %d of %d uids are in the pool", path, int((pool_rows >= 0).sum()), len(uids))
        if len(paths) == 1 and not (pool_rows >= 0).any():
            raise InputError(f"None of the {len(uids)} uids in {path} is in the pool {pool.root}.")
        used = np.flatnonzero((pool_rows >= 0) & (np.diff(lists.offsets) > 0))
        lists = lists.take(used)
        values.append(lists.values)
        sizes.append(np.diff(lists.offsets))
        rows.append(pool_rows[used])
    # an empty list at the end, for the rows without one
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([*sizes, [0]]))])
    joined, owners = np.concatenate(rows), np.full(len(pool), len(offsets) - 2)
    owners[joined[::-1]] = np.arange(len(joined))[::-1]  # numpy keeps the last of equal indices
    return ListColumn(np.concatenate(values), offsets).take(owners)


def column_stamp(pool: Pool, column: ExternalColumn) -> list[Any]:
    """Return a stamp that changes with a column's files: their content, or the pool's stamps."""
    stamp = file_stamp if column.path is None else content_digest
    return [column.column, *(stamp(path) for path in _paths(pool, column) if path.is_file())]


def _paths(pool: Pool, column: ExternalColumn) -> list[Path]:
    if column.path is not None:
        return [Path(column.path)]
    paths = metadata_tables(pool)
    if not paths:
        raise ParameterError(
            f"must name a parquet file: null stands for the metadata of the pool, and {pool.root} "
            "has none",
            owner=column,
            parameter="path",
            got="null",
        )
    return paths


def read_column(
    pool: Pool, path: Path, name: str | None, *, owner: object = None, must_match: bool = True
) -> np.ndarray:
    """Read external numbers for each row of the pool, float64 [n], NaN where there is none.

    Of a uid that the file has twice, the first number counts.

    Args:
        pool: whose rows are wanted.
        path: see `ExternalColumn`.
        name: the column; None for a subset, whose numbers are how often it has a uid.
        owner: whose parameters `path` and `column` are, for messages; see `ParameterError`.
        must_match: whether a file without any uid of the pool is an error.

    Raises:
        InputError: the file is missing or damaged, or none of its uids is in the pool.
    """
    if not path.is_file():
        rule = "must be an existing file"
        raise ParameterError(rule, owner=owner, parameter="path", value=str(path))
    if name is None:
        uids, counts = read_subset(path)
        weights = path.with_name(WEIGHTS_NAME)
        if weights.is_file():
            log.warning(
                "%s holds no weights; %s, beside it, has those of its samples, to train with",
                path,
                weights.name,
            )
        values = counts.astype(np.float64)
    elif path.suffix == ".npy":
        uids, values = _read_structured(path, name, owner)
    else:
        uids, values = _read_parquet(path, name, owner)
    rows = pool.table.find(uids)
    present = rows >= 0
    log.info("%s: %d of %d uids are in the pool", path, int(present.sum()), len(uids))
    if must_match and not present.any():
        raise InputError(f"None of the {len(uids)} uids in {path} is in the pool {pool.root}.")
    covered = np.zeros(len(pool), dtype=bool)
    covered[rows[present]] = True
    again = int(present.sum() - covered.sum())
    if again:
        log.warning("%s has %d uids again: the first number of each counts", path, again)
    column = np.full(len(pool), np.nan)
    column[rows[present][::-1]] = values[present][::-1]  # numpy keeps the last of equal indices
    return column


def _read_parquet(path: Path, name: str, owner: object) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa

    uids, valid, faults, _, columns = _with_column(path, name, owner)
    if pa.types.is_temporal(columns[name].type):  # which numpy turns into numbers
        raise _column_error(f"must hold numbers in {path}: {columns[name].type}", owner, name)
    try:
        values = columns[name].to_numpy().astype(np.float64)
    except Exception as error:  # as many kinds as there are types of pyarrow and numpy
        raise _column_error(
            f"must hold numbers in {path}: {reason_of(error)}", owner, name
        ) from None
    if faults.samples:
        log.warning("%s: left out %s", path, faults.summary())
        uids, values = uids[valid], values[valid]
    return uids, values


def _column_error(rule: str, owner: object, name: str | None) -> ParameterError:
    return ParameterError(rule, owner=owner, parameter="column", value=name)


def _read_lists(path: Path, name: str | None, owner: object) -> tuple[np.ndarray, ListColumn]:
    """Read the valid uids of a parquet file, uint64 [m, 2], and a list for each."""
    if path.suffix != ".parquet" or not path.is_file():
        rule = "must be an existing .parquet file, for lists"
        raise ParameterError(rule, owner=owner, parameter="path", value=str(path))
    uids, valid, faults, _, columns = _with_column(path, name, owner)
    lists = _lists_of(columns[name].combine_chunks(), f"The column {name!r} of {path}")
    if faults.samples:
        log.warning("%s: left out %s", path, faults.summary())
        uids, lists = uids[valid], lists.take(np.flatnonzero(valid))
    return uids, lists


def _lists_of(column: pa.Array, owner: str) -> ListColumn:
    """Convert an arrow array of lists or of whole numbers, without nulls."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, items, sizes = column.type, column, np.ones(len(column), dtype=np.int64)
    of_lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_kind(kind) for is_kind in of_lists):
        lengths = pc.list_value_length(column).fill_null(0)
        kind, items, sizes = kind.value_type, column.flatten(), lengths.to_numpy()
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise InputError(
            f"{owner} must hold lists of whole numbers, or one whole number each. Got {kind}; give "
            "what it names numbers from 0."
        )
    ends = np.concatenate([[0], np.cumsum(sizes)])
    kept = np.concatenate([[0], np.cumsum(items.is_valid().to_numpy(zero_copy_only=False))])
    try:
        values = items.drop_null().cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise InputError(f"{owner} must hold whole numbers below 2^63: {error}.") from None
    if values.min(initial=0) < 0:
        raise InputError(f"{owner} must hold numbers of at least 0. It has {values.min()}.")
    return ListColumn(values, kept[ends])


def _with_column(path: Path, name: str | None, owner: object) -> Metadata:
    """Read a parquet file with a column, which must be there."""
    read = read_metadata(path, [] if name is None else [name])
    if name not in read.names:
        raise ParameterError(
            f"must be a column of {path}",
            owner=owner,
            parameter="column",
            value=name,
            way_out=f"It has {read.names}.",
        )
    return read


def _read_structured(path: Path, name: str, owner: object) -> tuple[np.ndarray, np.ndarray]:
    array = read_npy(path, mapped=True)
    fields: Mapping[str, Any] = array.dtype.fields or {}
    if array.ndim != 1 or not {"f0", "f1", name} <= set(fields):
        raise ParameterError(
            f"needs {path} to be a one-dimensional structured array with the fields f0, f1 (the "
            f"uid, u8) and {name}",
            owner=owner,
            parameter="column",
            value=name,
            way_out=f"It has {array.dtype} {array.shape}.",
        )
    if (
        any(fields[half][0] != np.uint64 for half in ("f0", "f1"))
        or fields[name][0].kind not in "fiu"
        or fields[name][0].shape
    ):
        rule = f"must hold numbers in {path}, and f0 and f1 u8, and it has {array.dtype}"
        raise _column_error(rule, owner, name)
    return from_structured(array), array[name].astype(np.float64)
