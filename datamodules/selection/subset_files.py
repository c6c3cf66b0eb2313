"""The files that a subset comes in and goes out by.

    datacomp   npy, `u8,u8`, a row for each sample; repeated rows repeat it
    parquet    a column uid, and perhaps multiplicity (else 1 each) and weight
    text       one uid per line; repeated lines repeat it
    shards     a list of tars, as webdataset takes it: see `shard_lists`
    selection  a folder that Siftclip has written, such as a run

Whatever the order in a file, a subset is sorted by uid. A file that was written from it, read and
written again is the same to the byte.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from siftclip.datamodules.index.uids import (
    distinct_uids,
    group_uids,
    to_structured,
    uid_digits,
)
from siftclip.datamodules.pool.metadata import parse_uid_array, read_metadata
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.selection.selection import (
    MANIFEST_NAME,
    SUBSET_NAME,
    WEIGHTS_COLUMN,
    WEIGHTS_NAME,
    read_selection,
    read_subset,
    read_weights,
)
from siftclip.datamodules.selection.shard_lists import (
    left_out_samples,
    list_of_tars,
    listed_tars,
    samples_of_tars,
    tars_of_samples,
)
from siftclip.errors import InputError, ParameterError
from siftclip.file_identity import START_AGAIN, FileIdentity
from siftclip.files import sha256_of, write_npy, write_text
from siftclip.reading import open_file, readable, require_file
from siftclip.redaction import printable
from siftclip.uid_texts import UID_RULE, plain_uid
from siftclip.writing import atomic_path

if TYPE_CHECKING:
    import pyarrow as pa

SubsetFormat: TypeAlias = Literal["datacomp", "parquet", "text", "shards", "selection"]
SUFFIXES: Mapping[str, SubsetFormat] = {".npy": "datacomp", ".parquet": "parquet"}
COUNT_COLUMN = "multiplicity"
_BLOCK_ROWS = 1 << 20  # that are written at once
_LOOKED_AT_BYTES = 4096  # of a text, to tell uids from tars
_MOST = 2**53

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetFile:
    """What was read of a file, or of the folder of a selection."""

    counted: CountedUids
    format: SubsetFormat
    digests: Mapping[str, str]  # SHA-256 of what was read, by the name of each file
    weights: np.ndarray | None = None  # float32 [n]
    manifest: Mapping[str, Any] = field(default_factory=dict)  # of a selection


def format_of(path: Path) -> SubsetFormat:
    """Find the format of a file or folder, by its suffix, or by how its text begins.

    Raises:
        InputError: there is no such file.
    """
    if path.is_dir():
        return "selection"
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    with open_file(path) as file:
        lines = file.read(_LOOKED_AT_BYTES).decode("utf-8-sig", errors="replace").split("\n")
    first = next((line.strip() for line in lines if line.strip()), "")
    return "text" if plain_uid(first) is not None else "shards"


def read_subset_file(
    path: Path, kind: SubsetFormat | None = None, *, pool: Pool | None = None
) -> SubsetFile:
    """Read a subset.

    Args:
        path: of a file, or of a folder with a selection.
        kind: its format; None finds out, see `format_of`.
        pool: whose tars a list of tars names.

    Raises:
        InputError: it is missing or damaged, something in it is no uid, or it holds none.
    """
    kind = format_of(path) if kind is None else kind
    if kind == "selection":
        return _read_folder(path)
    require_file(path)
    identity = FileIdentity.of(path)
    digest = sha256_of(path)
    counted, weights = _READERS[kind](path, pool)
    identity.require(path, START_AGAIN)  # or the digest is that of another file
    if not len(counted.uids):
        raise InputError(f"{path} holds no uids.")
    if kind == "datacomp" and path.with_name(WEIGHTS_NAME).is_file() and path.name == SUBSET_NAME:
        log.warning(
            "%s holds no weights; %s beside it has some: name the folder to have both",
            path,
            WEIGHTS_NAME,
        )
    return SubsetFile(counted=counted, format=kind, digests={path.name: digest}, weights=weights)


def _read_folder(folder: Path) -> SubsetFile:
    """Read what `write_selection` or `write_subset` has written."""
    names = (MANIFEST_NAME, SUBSET_NAME, WEIGHTS_NAME)
    there = [name for name in names if (folder / name).is_file()]
    if SUBSET_NAME not in there:
        raise InputError(
            f"{folder} must hold a selection: {SUBSET_NAME}, as runs and selections have it."
        )
    digests = {name: sha256_of(folder / name) for name in there}
    manifest: Mapping[str, Any] = {}
    if MANIFEST_NAME in there:
        selection = read_selection(folder)
        counted = CountedUids(selection.uids, selection.multiplicities)
        weights, manifest = selection.weights, selection.manifest
    else:
        counted = CountedUids(*read_subset(folder / SUBSET_NAME))
        weights = read_weights(folder / WEIGHTS_NAME, counted.uids)
    if not len(counted.uids):
        raise InputError(f"{folder / SUBSET_NAME} holds no uids.")
    return SubsetFile(
        counted=counted, format="selection", digests=digests, weights=weights, manifest=manifest
    )


# ---- readers ------------------------------------------------------------------------------------
_Read: TypeAlias = tuple[CountedUids, np.ndarray | None]


def _read_datacomp(path: Path, _: Pool | None) -> _Read:
    return CountedUids(*read_subset(path)), None


def _read_parquet(path: Path, _: Pool | None) -> _Read:
    columns = [COUNT_COLUMN, WEIGHTS_COLUMN]
    listed, valid, _faults, names, table = read_metadata(path, columns)
    if not valid.all():
        row = int(np.argmin(valid))
        raise InputError(f"{path} must hold {UID_RULE} in its column 'uid'. Row {row} has none.")
    counts = np.ones(len(listed), dtype=np.int64)
    if COUNT_COLUMN in names:
        counts = _whole_numbers(table[COUNT_COLUMN], path)
    uids, groups = group_uids(listed)
    multiplicities = np.zeros(len(uids), dtype=np.int64)
    np.add.at(multiplicities, groups, counts)
    weights = None
    if WEIGHTS_COLUMN in names:
        if len(uids) < len(listed):
            raise InputError(
                f"{path} has weights and several rows of one uid. Give each uid one row, with a "
                f"column {COUNT_COLUMN!r} for how often it is kept."
            )
        weights = np.empty(len(uids), dtype=np.float32)
        weights[groups] = _weights(table[WEIGHTS_COLUMN], path)
    return CountedUids(uids, multiplicities), weights


def _whole_numbers(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    import pyarrow as pa

    rule = f"{path}: the column {COUNT_COLUMN!r} must hold whole numbers of at least 1"
    if not pa.types.is_integer(column.type) or column.null_count:
        held = f"{column.null_count} nulls" if column.null_count else column.type
        raise InputError(f"{rule}. It holds {held}.")
    numbers = column.to_numpy()
    if len(numbers) and (numbers.min() < 1 or numbers.max() > _MOST):
        wrong = numbers.min() if numbers.min() < 1 else numbers.max()
        raise InputError(f"{rule}. It holds {wrong}.")
    return np.asarray(numbers, dtype=np.int64)


def _weights(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    import pyarrow as pa

    rule = f"{path}: the column {WEIGHTS_COLUMN!r} must hold finite numbers of at least 0"
    if not pa.types.is_floating(column.type) or column.null_count:
        held = f"{column.null_count} nulls" if column.null_count else column.type
        raise InputError(f"{rule}. It holds {held}.")
    weights = np.asarray(column.to_numpy(), dtype=np.float32)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise InputError(f"{rule}.")
    return weights


def _read_text(path: Path, _: Pool | None) -> _Read:
    parts, line = [], 1
    for texts in _lines(path):
        uids, valid = parse_uid_array(texts)
        for place in np.flatnonzero(~valid).tolist():  # blank lines alone get past the first
            _refuse_line(path, line + place, texts[place].as_py())
        parts.append(uids[valid])
        line += len(texts)
    return CountedUids(*distinct_uids(np.concatenate(parts))), None


def _lines(path: Path) -> Iterator[pa.Array]:
    """Read the lines of a text as arrays of large binary values, block by block."""
    import pyarrow as pa
    from pyarrow import csv

    with open_file(path) as file, readable(path, "list of uids"):
        reader = csv.open_csv(
            file,
            read_options=csv.ReadOptions(column_names=["uid"], block_size=1 << 24),
            parse_options=csv.ParseOptions(
                delimiter="\x01",
                quote_char=False,
                double_quote=False,
                ignore_empty_lines=False,
            ),
            convert_options=csv.ConvertOptions(
                column_types={"uid": pa.large_binary()}, check_utf8=False
            ),
        )
        for batch in reader:
            yield batch.column(0)


def _refuse_line(path: Path, line: int, text: bytes) -> None:
    """Raise InputError for a line that is no uid, unless it is blank."""
    if text.strip():
        got = printable(text[:100].decode("utf-8", errors="replace"))
        raise InputError(f"{path} must hold one uid per line: {UID_RULE}. Line {line} is {got!r}.")


def _read_shards(path: Path, pool: Pool | None) -> _Read:
    tars = listed_tars(path)
    if pool is None:
        raise ParameterError(
            f"must be given to read {path}, a list of tars: which samples these hold is in its "
            "index",
            parameter="pool",
        )
    _warn_of_left_out(pool)
    return samples_of_tars(pool, tars), None


def _warn_of_left_out(pool: Pool) -> None:
    if left_out_samples(pool):
        log.warning(
            "the tars of %s hold %d more samples, which the pool leaves out (see siftclip index) "
            "and webdataset reads",
            pool.root,
            left_out_samples(pool),
        )


_READERS: Mapping[SubsetFormat, Callable[[Path, Pool | None], _Read]] = {
    "datacomp": _read_datacomp,
    "parquet": _read_parquet,
    "text": _read_text,
    "shards": _read_shards,
}


# ---- writers ------------------------------------------------------------------------------------
def write_subset_file(
    path: Path,
    kind: SubsetFormat,
    counted: CountedUids,
    *,
    weights: np.ndarray | None = None,
    pool: Pool | None = None,
) -> None:
    """Write a subset to a file, atomically.

    Args:
        path: of the file.
        kind: its format, but no folder.
        counted: the subset.
        weights: float32 [n], what samples count in the loss; parquet alone has a place for them.
        pool: whose tars a list of tars names.

    Raises:
        InputError: a list of tars cannot say what is selected, see `tars_of_samples`.
    """
    if weights is not None and kind != "parquet":
        log.warning("%s lacks the weights of the subset: only parquet has a place for them", path)
    if kind == "datacomp":
        write_npy(path, to_structured(np.repeat(counted.uids, counted.multiplicities, axis=0)))
    elif kind == "parquet":
        _write_parquet(path, counted, weights)
    elif kind == "text":
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for rows in _row_blocks(len(counted.uids)):
                _write_lines(file, counted.uids[rows], counted.multiplicities[rows])
    elif kind == "shards":
        if pool is None:
            raise ParameterError("must be given, whose tars the list names", parameter="pool")
        lines = list_of_tars(tars_of_samples(pool, counted))
        _warn_of_left_out(pool)
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        raise ParameterError("must be that of a file", parameter="kind", value=kind)


def _row_blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _BLOCK_ROWS):
        yield slice(start, start + _BLOCK_ROWS)


def _write_lines(file: IO[bytes], uids: np.ndarray, multiplicities: np.ndarray) -> None:
    lines = np.full((len(uids), 33), ord("\n"), dtype=np.uint8)
    lines[:, :32] = uid_digits(uids)
    file.write(np.repeat(lines, multiplicities, axis=0).tobytes())


def _write_parquet(path: Path, counted: CountedUids, weights: np.ndarray | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("uid", pa.string()), (COUNT_COLUMN, pa.int64())]
    fields += [] if weights is None else [(WEIGHTS_COLUMN, pa.float32())]
    schema = pa.schema(fields)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for rows in _row_blocks(len(counted.uids)):
            columns = [_text_array(counted.uids[rows]), pa.array(counted.multiplicities[rows])]
            columns += [] if weights is None else [pa.array(weights[rows])]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _text_array(uids: np.ndarray) -> pa.Array:
    """Format uids, uint64 [n, 2], as an array of texts, without one of Python's for each."""
    import pyarrow as pa

    offsets = pa.py_buffer(np.arange(0, 32 * len(uids) + 1, 32, dtype=np.int32))
    content = pa.py_buffer(np.ascontiguousarray(uid_digits(uids)))
    return pa.StringArray.from_buffers(len(uids), offsets, content)
