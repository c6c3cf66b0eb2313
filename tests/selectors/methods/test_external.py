"""The options of `External`; its files are joined by `siftclip.datamodules.selection.run`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.selectors.core.base import Chunk, ExternalColumn
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.methods.external import External


def make_chunk(values: list[float]) -> Chunk:
    rows = np.arange(len(values), dtype=np.int64)
    uids = np.stack([rows, rows], axis=1).astype(np.uint64)
    return Chunk(rows=rows, uids=uids, column=np.array(values))


def test_parquet_column_is_the_score() -> None:
    selector = External(path="a.parquet", column="dfn", fraction=0.5)
    assert selector.requires.column == ExternalColumn(path="a.parquet", column="dfn")
    choice = selector.select(MemorySource(make_chunk([0.1, 0.7, np.nan, 0.9])))
    assert choice.multiplicities.tolist() == [0, 1, 0, 1]


def test_subset_is_taken_as_it_is() -> None:
    selector = External(path="a.npy")
    assert selector.requires.column == ExternalColumn(path="a.npy", column=None)
    choice = selector.select(MemorySource(make_chunk([2.0, np.nan, 1.0])))
    assert choice.multiplicities.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"path": "a.csv", "column": "x"},
            r"must end in .parquet or .npy, or be null. Got 'a.csv'",
        ),
        ({"path": "a.parquet", "fraction": 0.1}, "column must name a column"),
        ({"path": "a.parquet", "column": "x"}, "exactly one of"),
        ({"path": "a.parquet", "column": "x", "fraction": 2.0}, "fraction must be"),
        ({"path": None, "fraction": 0.1}, "column must name a column of the metadata"),
        ({"path": "a.npy", "column": "x"}, "exactly one of"),
        ({"path": "a.npy", "fraction": 0.5}, "finished subset.*fraction=0.5"),
        ({"path": "a.npy", "threshold": 0.0}, "finished subset.*threshold=0.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        External(**options)


def test_chunk_without_the_column_is_a_fault_of_the_engine() -> None:
    rows = np.arange(2, dtype=np.int64)
    chunk = Chunk(rows=rows, uids=np.zeros((2, 2), np.uint64))
    with pytest.raises(ValueError, match="lacks the column"):
        External(path="a.npy").score(chunk)


def test_names_that_yaml_reads_as_numbers_are_explained() -> None:
    for column in (math.inf, 12, True):
        with pytest.raises(InputError, match=r"column must be text\. Got .*quote it"):
            External(path=None, column=column, fraction=0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"path must be text\. Got 7"):
        External(path=7, column="a", fraction=0.5)  # type: ignore[arg-type]
