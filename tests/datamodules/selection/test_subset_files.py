"""Subsets in files: read as others write them, and written again to the same byte."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.datamodules.index.uids import format_uids
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.selection.selection import (
    Selection,
    make_selection,
    write_selection,
    write_subset,
)
from siftclip.datamodules.selection.subset_files import (
    SubsetFile,
    SubsetFormat,
    format_of,
    read_subset_file,
    write_subset_file,
)
from siftclip.errors import InputError, ParameterError

HALF = st.sampled_from([0, 1, 2**63, 2**64 - 1, 0xABC])
COUNTS = st.dictionaries(st.tuples(HALF, HALF), st.integers(1, 4), min_size=1, max_size=15)
NAMES: dict[SubsetFormat, str] = {"datacomp": "s.npy", "parquet": "s.parquet", "text": "s.txt"}
A, B = "00" * 15 + "0a", "ff" * 16


def counted(counts: dict[tuple[int, int], int]) -> CountedUids:
    ordered = dict(sorted(counts.items()))
    uids = np.array(list(ordered), dtype=np.uint64).reshape(-1, 2)
    return CountedUids(uids, np.array(list(ordered.values()), dtype=np.int64))


def counts_of(file: SubsetFile) -> dict[str, int]:
    uids, counts = format_uids(file.counted.uids).tolist(), file.counted.multiplicities.tolist()
    return dict(zip(uids, counts, strict=True))


def write_table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("kind", NAMES)
@given(counts=COUNTS)
def test_round_trips_to_the_byte(kind: SubsetFormat, counts: dict[tuple[int, int], int]) -> None:
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}{NAMES[kind]}" for number in range(2)]
        write_subset_file(paths[0], kind, counted(counts))
        file = read_subset_file(paths[0])
        assert file.format == kind
        for read, written in zip(file.counted, counted(counts), strict=True):
            assert read.dtype == written.dtype
            assert np.array_equal(read, written)
        write_subset_file(paths[1], kind, file.counted)
        assert paths[0].read_bytes() == paths[1].read_bytes()


@given(counts=COUNTS)
def test_all_formats_hold_the_same(counts: dict[tuple[int, int], int]) -> None:
    """As DataComp's own lines, a table of pandas and lines of text have it."""
    repeated = [pair for pair, count in sorted(counts.items()) for _ in range(count)]
    texts = [f"{high:016x}{low:016x}" for high, low in repeated]
    with TemporaryDirectory() as name:
        folder = Path(name)
        for kind, file in NAMES.items():
            write_subset_file(folder / file, kind, counted(counts))
        np.save(folder / "theirs.npy", np.array(repeated, dtype=np.dtype("u8,u8")))
        assert (folder / "s.npy").read_bytes() == (folder / "theirs.npy").read_bytes()
        assert (folder / "s.txt").read_text() == "".join(f"{text}\n" for text in texts)
        table = pd.read_parquet(folder / "s.parquet")
        assert [*table] == ["uid", "multiplicity"]
        assert table["uid"].repeat(table["multiplicity"]).tolist() == texts


def test_many_rows_cross_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siftclip.datamodules.selection.subset_files._BLOCK_ROWS", 1000)
    generator = np.random.default_rng(0)
    uids = np.unique(generator.integers(0, 2**64, (4321, 2), dtype=np.uint64), axis=0)
    subset = CountedUids(uids, generator.integers(1, 4, len(uids)))
    for kind, name in NAMES.items():
        write_subset_file(tmp_path / name, kind, subset)
        read = read_subset_file(tmp_path / name).counted
        assert all(np.array_equal(x, y) for x, y in zip(read, subset, strict=True))


# ---- as others write them -----------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["datacomp", "parquet", "text"])
def test_the_order_of_a_file_does_not_count(kind: SubsetFormat, tmp_path: Path) -> None:
    path = tmp_path / NAMES[kind]
    texts = [B, A, B, A, A]
    if kind == "datacomp":
        pairs = [(int(text[:16], 16), int(text[16:], 16)) for text in texts]
        np.save(path, np.array(pairs, dtype=np.dtype("u8,u8")))
    elif kind == "parquet":
        write_table(path, uid=texts)
    else:
        path.write_text("\n".join(texts))
    assert counts_of(read_subset_file(path)) == {A: 3, B: 2}


@pytest.mark.parametrize("integers", [pa.int8(), pa.uint64(), pa.int32()])
def test_multiplicities_of_parquet_add_up(integers: Any, tmp_path: Path) -> None:
    counts = pa.array([2, 1, 5], integers)
    path = write_table(tmp_path / "a.parquet", uid=[A, B, A], multiplicity=counts, score=[1, 2, 3])
    assert counts_of(read_subset_file(path)) == {A: 7, B: 1}


def test_texts_of_all_kinds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "uids.lst"
    lines = [A.upper(), "", str(uuid.UUID(B)), "", B]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert format_of(path) == "text"
    assert counts_of(read_subset_file(path)) == {A: 1, B: 2}


def test_texts_in_an_npy_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([B, A, A]))
    assert counts_of(read_subset_file(tmp_path / "t.npy")) == {A: 2, B: 1}


def test_weights_go_through_parquet_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subset, weights = counted({(0, 10): 2, (7, 7): 1}), np.array([0.25, 3], dtype=np.float32)
    paths = [tmp_path / name for name in ("a.parquet", "b.parquet")]
    write_subset_file(paths[0], "parquet", subset, weights=weights)
    assert not caplog.text
    file = read_subset_file(paths[0])
    assert file.weights is not None
    assert file.weights.dtype == np.float32
    assert np.array_equal(file.weights, weights)
    write_subset_file(paths[1], "parquet", file.counted, weights=file.weights)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    shuffled = write_table(tmp_path / "c.parquet", uid=[B, A], weight=[2.0, 1.0])
    assert np.array_equal(read_subset_file(shuffled).weights, [1, 2])  # in the order of the uids
    write_subset_file(tmp_path / "a.npy", "datacomp", subset, weights=weights)
    assert "lacks the weights" in caplog.text


# ---- folders ------------------------------------------------------------------------------------
def selection(**more: Any) -> Selection:
    uids = np.array([[0, 10], [7, 7]], dtype=np.uint64)
    return make_selection(uids, np.array([2, 1]), {"selector": "mine"}, **more)


def test_a_folder_of_a_selection_is_read_whole(tmp_path: Path) -> None:
    weights = np.array([1, 2], dtype=np.float32)
    write_selection(selection(weights=weights), tmp_path / "s")
    file = read_subset_file(tmp_path / "s")
    assert file.format == "selection"
    assert file.manifest["selector"] == "mine"
    assert np.array_equal(file.weights, weights)
    assert [*file.digests] == ["selection.json", "selection.npy", "weights.npy"]


def test_a_copy_of_a_selection_has_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    write_subset(selection(), tmp_path / "s")
    file = read_subset_file(tmp_path / "s")
    assert (file.counted.samples, file.manifest, file.weights) == (3, {}, None)


def test_a_changed_selection_is_refused(tmp_path: Path) -> None:
    write_selection(selection(), tmp_path / "s")
    write_subset_file(tmp_path / "s" / "selection.npy", "datacomp", counted({(1, 1): 1}))
    with pytest.raises(InputError, match=r"is not the subset that selection\.json describes"):
        read_subset_file(tmp_path / "s")


# ---- what is refused ----------------------------------------------------------------------------
BAD_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no uid": ({"id": [A]}, "column 'uid'"),
    "no digits": ({"uid": [A, "x"]}, "Row 1 has none"),
    "null": ({"uid": pa.array([None, A])}, "Row 0 has none"),
    "zero": ({"uid": [A], "multiplicity": [0]}, "at least 1. It holds 0"),
    "negative": ({"uid": [A], "multiplicity": [-1]}, "It holds -1"),
    "float": ({"uid": [A], "multiplicity": [1.0]}, "It holds double"),
    "null count": ({"uid": [A], "multiplicity": pa.array([None], pa.int64())}, "1 nulls"),
    "huge": ({"uid": [A], "multiplicity": pa.array([2**63 + 1], pa.uint64())}, "It holds 9"),
    "text weight": ({"uid": [A], "weight": ["1"]}, "'weight' must hold finite"),
    "nan weight": ({"uid": [A], "weight": [float("nan")]}, "'weight' must hold finite"),
    "repeated": ({"uid": [A, A], "weight": [1.0, 2.0]}, "several rows of one uid"),
    "empty": ({"uid": pa.array([], pa.string())}, "holds no uids"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused(case: str, tmp_path: Path) -> None:
    columns, message = BAD_TABLES[case]
    path = write_table(tmp_path / "a.parquet", **columns)
    with pytest.raises(InputError, match=message) as caught:
        read_subset_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{A}\n\n{A[:-1]}\n", "Line 3 is"),
        (f"{A}\n{A} {B}\n", "Line 2 is"),
        (f"{A}\n" * 70_000 + "no\n", "Line 70001 is 'no'"),
        (f"{A}\n\x1b[31mred\n", r"Line 2 is '\\\\x1b\[31mred'"),
        (f"{A}\n\x01\n", "not a readable list of uids"),
    ],
)
def test_bad_lines_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        read_subset_file(tmp_path / "a.txt", "text")


def test_nothing_is_unpickled_and_no_pipe_is_waited_for(tmp_path: Path) -> None:
    pickled = tmp_path / "p.npy"
    np.save(pickled, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(InputError, match="would be unpickled"):
        read_subset_file(pickled)
    (tmp_path / "q.npy").write_bytes(pickle.dumps([A]))
    with pytest.raises(InputError, match="not a readable npy"):
        read_subset_file(tmp_path / "q.npy")
    for name in ("f.npy", "f.txt", "f.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="named pipe"):
            read_subset_file(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_subset_file(tmp_path / "nowhere.npy")
    with pytest.raises(InputError, match=r"must hold a selection: selection\.npy"):
        read_subset_file(tmp_path)


def test_a_file_that_is_written_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the digest that is noted would be that of another file."""
    path = tmp_path / "a.txt"
    path.write_text(f"{A}\n")
    read: Callable[[Path], Any] = __import__(
        "siftclip.datamodules.selection.subset_files", fromlist=["x"]
    )._lines

    def written_meanwhile(place: Path) -> Any:
        yield from read(place)
        path.write_text(f"{A}\n{B}\n")

    monkeypatch.setattr("siftclip.datamodules.selection.subset_files._lines", written_meanwhile)
    with pytest.raises(InputError, match="has changed since it was first read"):
        read_subset_file(path)


def test_every_format_has_its_way_out() -> None:
    assert {*get_args(SubsetFormat)} == {*NAMES, "shards", "selection"}
    for kind in ("shards", "selection"):
        with pytest.raises(ParameterError):
            write_subset_file(Path("x"), kind, counted({(0, 1): 1}))  # type: ignore[arg-type]
