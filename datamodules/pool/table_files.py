"""Where the files of a pool's table are; reads them, and refuses those that cannot be of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from typing_extensions import NotRequired, TypedDict

from siftclip.datamodules.index.faults import FaultState
from siftclip.datamodules.index.layouts import KindsState
from siftclip.datamodules.index.tar_index import INDEX_VERSION
from siftclip.datamodules.index.tar_walk import KeySplit
from siftclip.datamodules.storage.local import ShardFile, Storage, identify_shards
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


def table_place(
    storage: Storage, cache: Path, key_split: KeySplit
) -> tuple[tuple[ShardFile, ...], Path]:
    """Find the tars of a pool as they are now, and the folder for the table of just these.

    The tars' own indices are beside that folder, see `index_path`.

    Args:
        storage: of the pool.
        cache: the folder that keeps what is derived from the pool.
        key_split: how keys are told in the tars.

    Raises:
        InputError: there is no pool, or a tar cannot be read.
    """
    # each rule in a folder of its own, so that runs with different ones leave each other's alone
    places = cache / ("index" if key_split == "first_dot" else f"index_{key_split}")
    shards = identify_shards(storage.shards(), places)
    stamps = "".join(f"{shard.name}\0{shard.stamp}\0" for shard in shards)
    name = hashlib.sha256(f"{INDEX_VERSION}\0{key_split}\0{stamps}".encode()).hexdigest()[:16]
    return shards, places / f"table-{name}"


def index_path(folder: Path, shard: ShardFile) -> Path:
    """Return where the index of a tar is kept."""
    return folder / f"{shard.stem}.npz"


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
