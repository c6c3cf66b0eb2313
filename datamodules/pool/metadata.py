"""Parquet files about samples, such as a pool's metadata: uids, with columns of the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from siftclip.datamodules.index.faults import FaultLog
from siftclip.datamodules.index.uids import parse_uid_bytes
from siftclip.errors import InputError
from siftclip.file_identity import START_AGAIN, FileIdentity
from siftclip.reading import reason_of
from siftclip.uid_texts import DASHES

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_UID = "uid"


class Metadata(NamedTuple):
    """What was read of a metadata parquet of n rows, all of it from one state of the file."""

    uids: np.ndarray  # uint64 [n, 2]; zeros where they are not valid
    valid: np.ndarray  # bool [n]
    faults: FaultLog  # of the uids
    names: list[str]  # of all columns of the file
    columns: pa.Table  # those that were asked for and are there


def read_metadata(path: Path, columns: Sequence[str] = ()) -> Metadata:
    """Read uids and columns of a metadata parquet. Opened once: their rows belong together.

    Raises:
        InputError: the file is not parquet, has no column `uid` of texts, or one of the columns
            twice, or changes while it is read.
    """
    import pyarrow.parquet as pq

    identity = FileIdentity.of(path)
    try:
        with pq.ParquetFile(path, pre_buffer=True) as file:
            names = file.schema_arrow.names
            _require_once(path, names, (_UID, *columns))
            table = file.read(columns=[name for name in names if name in (_UID, *columns)])
        texts = _uid_texts(path, table[_UID])
    except Exception as error:  # pyarrow raises ArrowInvalid, KeyError and OSError for bad files
        identity.require(path, START_AGAIN)  # half of a new file is no parquet file either
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} must be a parquet file with a column 'uid': {reason_of(error)}."
        ) from None
    identity.require(path, START_AGAIN)
    uids, valid, faults = _parse_uids(texts, path.name)
    return Metadata(uids, valid, faults, names, table)


def read_labels(path: Path, column: str) -> tuple[np.ndarray, pd.Series]:
    """Read a column of names or numbers of kinds of a metadata parquet, and the uids of its rows.

    Returns:
        uids uint64 [n, 2] and labels [n], of the rows with a valid uid.

    Raises:
        InputError: see `read_metadata`; or there is no such column, or it holds something else.
    """
    import pyarrow as pa

    uids, valid, _, names, columns = read_metadata(path, [column])
    if column not in names:
        raise InputError(f"{path} must have a column {column!r}. It has {names}.")
    kind = columns[column].type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    of_labels = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    if not any(is_kind(kind) for is_kind in (*of_labels, pa.types.is_boolean, pa.types.is_null)):
        raise InputError(
            f"{path}: the column {column!r} must hold texts or whole numbers. It holds {kind}."
        )
    return uids[valid], columns[column].to_pandas()[valid].reset_index(drop=True)


def _require_once(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that the uids are there, and nothing that is wanted is there twice."""
    if _UID not in names:
        raise InputError(
            f"{path} must be a parquet file with a column 'uid', which says whose rows they are. "
            f"Its columns are {names}."
        )
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise InputError(f"{path} must have one column {twice[0]!r}. It has several.")


def _uid_texts(path: Path, column: pa.ChunkedArray) -> pa.Array:
    """Convert a column of texts, of whatever kind, to one array of binary values."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    others = (pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in (*is_text, *others)):
        raise InputError(
            f"{path}: the column 'uid' must hold texts of 32 hexadecimal digits. It holds {kind}."
        )
    return column.cast(pa.large_binary()).combine_chunks()


def read_metadata_uids(path: Path) -> tuple[np.ndarray, np.ndarray, FaultLog]:
    """Read the uids of a metadata parquet: uint64 [n, 2], a bool [n] of valid ones, and faults.

    Raises:
        InputError: see `read_metadata`.
    """
    return read_metadata(path)[:3]


def parse_uid_array(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Parse an array of large binary values: uint64 [n, 2], and a bool [n] of which are uids."""
    data = np.zeros((len(texts), 32), dtype=np.uint8)
    for length in (32, 32 + len(DASHES)):
        rows, characters = _of_length(texts, length)
        data[rows] = characters if length == 32 else _without_dashes(characters)
    return parse_uid_bytes(data)


def _parse_uids(texts: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray, FaultLog]:
    uids, valid = parse_uid_array(texts)
    faults = FaultLog()
    for i in np.flatnonzero(~valid):
        faults.add("with a uid that is not 32 hexadecimal digits", f"{name}, row {i}")
    uids[~valid] = 0
    return uids, valid, faults


def _of_length(texts: pa.Array, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the texts of a length: a bool [n], and their bytes, uint8 [m, length]."""
    import pyarrow.compute as pc

    wanted = pc.equal(pc.binary_length(texts), length).fill_null(False)
    kept = texts.filter(wanted)
    characters = np.zeros((0, length), dtype=np.uint8)
    if len(kept):
        start = np.frombuffer(kept.buffers()[1], dtype=np.int64)[kept.offset]
        content = np.frombuffer(kept.buffers()[2], dtype=np.uint8)[start:]
        characters = content[: length * len(kept)].reshape(-1, length)
    return wanted.to_numpy(zero_copy_only=False), characters


def _without_dashes(characters: np.ndarray) -> np.ndarray:
    """Return the digits of UUIDs, uint8 [m, 36], as uint8 [m, 32]; zeros for what is none."""
    digits = np.delete(characters, DASHES, axis=1)
    digits[(characters[:, DASHES] != ord("-")).any(axis=1)] = 0
    return digits
