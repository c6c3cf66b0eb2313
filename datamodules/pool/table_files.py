"""Reads the files of a pool's table, and refuses those that cannot be of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from typing_extensions import NotRequired, TypedDict

from siftclip.datamodules.index.faults import FaultState
from siftclip.datamodules.index.layouts import KindsState
from siftclip.datamodules.index.tar_walk import KeySplit
from siftclip.errors import InputError
from siftclip.files import read_npy
from siftclip.records import Count, Text, read_record

NOTES_NAME = "notes.json"
_UIDS = ("uids", "sorted_uids")
_DTYPES = {"uids": np.uint64, "sorted_uids": np.uint64, "shard_of_row": np.int32}


class TableNotes(TypedDict):
    """What a table keeps beside its arrays."""

    pool: Text
    fingerprint: Text
    members: Text
    derived_uids: Count
    repeated_uids: Count
    key_split: KeySplit
    hidden: FaultState
    faults: FaultState
    incomplete: NotRequired[KindsState]  # an older table has none


def read_table(
    folder: Path, names: Sequence[str], shards: int
) -> tuple[TableNotes, dict[str, np.ndarray]]:
    """Read the notes of a table, and map its arrays into memory.

    Args:
        folder: of the table.
        names: of the arrays.
        shards: how many tars the pool has.

    Raises:
        InputError: a file is missing, damaged, or of something else.
    """
    try:
        notes = read_record(folder / NOTES_NAME, TableNotes)
        columns = {name: read_npy(folder / f"{name}.npy", mapped=True) for name in names}
        _check_columns(columns, shards, folder)
    except InputError as error:
        raise InputError(f"{error} Delete the folder {folder}; it is made again.") from None
    return notes, columns


def _check_columns(columns: Mapping[str, np.ndarray], shards: int, folder: Path) -> None:
    """Check dtypes and shapes of a table's arrays, and which tars its rows are in."""
    count = columns["keys"].size
    for name, array in columns.items():
        shape = (count, 2) if name in _UIDS else (count,)
        fits = array.dtype.kind == "S" if name == "keys" else array.dtype == _dtype(name)
        if not fits or array.shape != shape:
            raise InputError(
                f"{folder / name}.npy must have the shape {list(shape)}. It holds {array.dtype} "
                f"{list(array.shape)}."
            )
    of_row = columns["shard_of_row"]
    if count and not 0 <= of_row[0] <= of_row[-1] < shards:
        raise InputError(f"{folder / 'shard_of_row'}.npy names tars that the pool does not have.")


def _dtype(name: str) -> type:
    return _DTYPES.get(name, np.int64)
