"""Columns of a metadata parquet of any type: uids in every text type, and one line for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftclip.datamodules.pool.metadata import read_labels, read_metadata
from siftclip.errors import InputError

UIDS = [f"{number:032x}" for number in range(3)]


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array(UIDS),
        pa.array(UIDS, pa.large_string()),
        pa.array(UIDS).dictionary_encode(),
        pa.array([uid.encode() for uid in UIDS]),
        pa.array([uid.encode() for uid in UIDS], pa.binary(32)),
    ],
)
def test_texts_of_any_type_are_uids(tmp_path: Path, column: pa.Array) -> None:
    read = read_metadata(write(tmp_path / "a.parquet", uid=column))
    assert read.uids[:, 1].tolist() == [0, 1, 2]
    assert read.valid.all()


@pytest.mark.parametrize(
    "column", [pa.nulls(3), pa.array([None, "x", "0" * 33]), pa.array([b"\xff"] * 3)]
)
def test_what_is_no_uid_is_counted(tmp_path: Path, column: pa.Array) -> None:
    read = read_metadata(write(tmp_path / "a.parquet", uid=column))
    assert not read.valid.any()
    assert read.faults.samples == 3
    assert np.array_equal(read.uids, np.zeros((3, 2)))


def test_a_file_without_rows(tmp_path: Path) -> None:
    read = read_metadata(write(tmp_path / "a.parquet", uid=pa.array([], pa.string())))
    assert read.uids.shape == (0, 2)


@pytest.mark.parametrize(
    "column", [pa.array([1, 2, 3]), pa.array([["a"]] * 3), pa.array([{"a": 1}] * 3)]
)
def test_other_types_are_named(tmp_path: Path, column: pa.Array) -> None:
    path = write(tmp_path / "a.parquet", uid=column)
    with pytest.raises(InputError, match=r"a\.parquet: the column 'uid' must hold texts of 32"):
        read_metadata(path)


def test_no_uid_or_two(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", key=UIDS)
    with pytest.raises(InputError, match=r"with a column 'uid', .* Its columns are \['key'\]"):
        read_metadata(path)
    for names in (["uid", "uid"], ["uid", "kind", "kind"]):
        pq.write_table(pa.table([pa.array(UIDS)] * len(names), names), path)
        with pytest.raises(InputError, match=r"must have one column '(uid|kind)'. It has several"):
            read_metadata(path, ["kind"])


def test_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", uid=[*UIDS[:2], "x"], kind=["a", "b", "c"], n=[1, 2, 3])
    uids, labels = read_labels(path, "kind")
    assert uids[:, 1].tolist() == [0, 1]
    assert labels.tolist() == ["a", "b"]
    assert read_labels(path, "n")[1].tolist() == [1, 2]
    with pytest.raises(InputError, match=r"must have a column 'other'"):
        read_labels(path, "other")
    write(path, uid=UIDS, kind=[["a"]] * 3)
    with pytest.raises(InputError, match=r"'kind' must hold texts or whole numbers. It holds list"):
        read_labels(path, "kind")
