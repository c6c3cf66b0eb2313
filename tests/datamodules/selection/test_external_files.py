"""Columns and subsets made elsewhere, joined with a pool."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftclip.datamodules.index.tar_index import _find_uid
from siftclip.datamodules.index.uids import format_uid, parse_uids, to_structured
from siftclip.datamodules.pool.metadata import read_metadata_uids
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.columns import read_pool_lists
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.selection.run import run_selection
from siftclip.datamodules.selection.selection import Selection, read_subset
from siftclip.errors import InputError
from siftclip.selectors.core.source import ExternalColumn, Requirements
from siftclip.selectors.methods.concepts import ConceptBalance
from siftclip.selectors.methods.external import External

Make = Callable[..., Any]


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]) -> Pool:
    return load_pool(write_pool(make_samples(8)))


@pytest.fixture
def uids(make_samples: Make) -> list[str]:
    """Of the pool's eight samples and of four others."""
    return [sample.uid for sample in make_samples(12)]


def write_table(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def make_source(pool: Pool, tmp_path: Path) -> PoolSource:
    return PoolSource(
        pool,
        features=[None],
        scores_root=tmp_path / "s",
        chunk_samples=3,
        max_bad_fraction=0.0,
        progress=False,
    )


def select(pool: Pool, tmp_path: Path, **parameters: Any) -> Selection:
    source = make_source(pool, tmp_path)
    return run_selection(External(**parameters), "external", parameters, source)


def kept(selection: Selection) -> dict[str, int]:
    counts = selection.multiplicities.tolist()
    return dict(zip(map(format_uid, selection.uids), counts, strict=True))


def test_column_is_joined_by_uid(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    order = [11, 3, 0, 7, 9, 1]  # shuffled, some of another pool, some of ours left out
    score = [9.0, 0.5, 0.1, 0.9, 8.0, 0.7]
    path = write_table(tmp_path / "a.parquet", uid=[uids[i].upper() for i in order], score=score)
    assert kept(select(pool, tmp_path, path=path, column="score", threshold=0.5)) == {
        uids[3]: 1,
        uids[7]: 1,
        uids[1]: 1,
    }


def test_samples_without_a_number_are_never_selected(
    pool: Pool, uids: list[str], tmp_path: Path
) -> None:
    score = [-5.0, None, float("nan"), -7.0]
    path = write_table(tmp_path / "a.parquet", uid=uids[:4], score=score)
    selection = select(pool, tmp_path, path=path, column="score", fraction=1.0)
    assert kept(selection) == {uids[0]: 1, uids[3]: 1}


@pytest.mark.parametrize("kind", [pa.int32(), pa.float16(), pa.float64(), pa.bool_()])
def test_numbers_of_any_kind_are_read(
    pool: Pool, uids: list[str], tmp_path: Path, kind: pa.DataType
) -> None:
    score = pa.array(np.array([1, 0, 1], np.float16 if kind == pa.float16() else np.int32)).cast(
        kind
    )
    path = write_table(tmp_path / "a.parquet", uid=uids[:3], score=score)
    selection = select(pool, tmp_path, path=path, column="score", threshold=1.0)
    assert kept(selection) == {uids[0]: 1, uids[2]: 1}


def test_first_of_repeated_uids_counts(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    names = [uids[0], uids[1], uids[0], uids[1]]
    path = write_table(tmp_path / "a.parquet", uid=names, score=[1.0, 0.0, 0.0, 1.0])
    selection = select(pool, tmp_path, path=path, column="score", threshold=0.5)
    assert kept(selection) == {uids[0]: 1}


def test_repeated_uids_are_counted(
    pool: Pool, uids: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_table(tmp_path / "c.parquet", uid=[*uids, *uids[:3]], v=np.arange(15.0))
    select(pool, tmp_path, path=path, column="v", fraction=0.5)
    assert "has 3 uids again: the first number of each counts" in caplog.text


def test_times_are_no_numbers(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    times = pa.array(np.arange(12), pa.timestamp("us"))
    path = write_table(tmp_path / "c.parquet", uid=uids, v=times)
    with pytest.raises(InputError, match=r"column must hold numbers in .*: timestamp\[us\]"):
        select(pool, tmp_path, path=path, column="v", fraction=0.5)


def test_a_file_is_no_url() -> None:
    with pytest.raises(InputError, match="path must be a file on this machine, and no URL"):
        External(path="http://host/x.parquet", column="v", fraction=0.5)


def test_bad_uids_are_left_out_and_named(
    make_samples: Make,
    write_pool: Make,
    load_pool: Callable[..., Pool],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = make_samples(3)
    samples[0].record = b'{"uid": "%s"}' % (b"0" * 32)  # which no bad uid may stand for
    pool = load_pool(write_pool(samples))
    names = ["bad", None, samples[2].uid]
    path = write_table(tmp_path / "a.parquet", uid=names, score=[3.0, 2.0, 1.0])
    selection = select(pool, tmp_path, path=path, column="score", threshold=0.0)
    assert kept(selection) == {samples[2].uid: 1}
    assert "2 with a uid that is not 32 hexadecimal digits" in caplog.text


def test_subset_keeps_its_repetitions(pool: Pool, tmp_path: Path) -> None:
    rows = np.sort(to_structured(pool.uids[[5, 2, 5, 5, 0]]))
    np.save(tmp_path / "subset.npy", rows)
    selection = select(pool, tmp_path, path=str(tmp_path / "subset.npy"))
    assert np.array_equal(selection.to_subset(), rows)
    assert selection.manifest["kept_samples"] == 5
    assert selection.manifest["kept_distinct"] == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"other": [1.0]}, r"column must be a column of .* Got 'score'. It has \['uid', 'other'\]"),
        ({"score": ["high"]}, r"ExternalColumn: column must hold numbers in .*high"),
        ({"score": [[1.0, 2.0]]}, r"ExternalColumn: column must hold numbers in"),
        ({"score": [{"a": 1}]}, r"ExternalColumn: column must hold numbers in"),
    ],
)
def test_wrong_column(
    pool: Pool, uids: list[str], tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    path = write_table(tmp_path / "a.parquet", uid=uids[:1], **columns)
    with pytest.raises(InputError, match=message):
        select(pool, tmp_path, path=path, column="score", fraction=0.5)


def test_wrong_file(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"column": "score", "fraction": 0.5}
    with pytest.raises(
        InputError, match=r"ExternalColumn: path must be an existing file. Got '.*b.parq"
    ):
        select(pool, tmp_path, path=str(tmp_path / "b.parquet"), **options)
    path = write_table(tmp_path / "a.parquet", key=uids[:1], score=[1.0])
    with pytest.raises(InputError, match=r"a.parquet must be a parquet file with a column 'uid'"):
        select(pool, tmp_path, path=path, **options)
    Path(path).write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"a.parquet must be a parquet file with a column 'uid'"):
        select(pool, tmp_path, path=path, **options)


def test_file_of_another_pool(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", uid=uids[8:], score=[1.0] * 4)
    with pytest.raises(InputError, match=r"None of the 4 uids in .*a.parquet is in the pool"):
        select(pool, tmp_path, path=path, column="score", fraction=0.5)


def test_column_that_judges_nothing(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", uid=uids[:2], score=[None, float("nan")])
    with pytest.raises(InputError, match=r"keeps none of 8 samples"):
        select(pool, tmp_path, path=path, column="score", fraction=0.5)


def test_structured_array_has_a_column(pool: Pool, tmp_path: Path) -> None:
    """Uids as in a DataComp subset with a score beside them, in any order."""
    kind = np.dtype([("f0", "<u8"), ("f1", "<u8"), ("flyt", "<f4")])
    array = np.zeros(3, dtype=kind)
    for place, (row, score) in enumerate([(6, 0.5), (1, 2.0), (3, -1.0)]):
        array[place] = (*pool.uids[row].tolist(), score)
    path = str(tmp_path / "a.npy")
    np.save(path, array)
    expected = {format_uid(pool.uids[row]): 1 for row in (1, 6)}
    assert kept(select(pool, tmp_path, path=path, column="flyt", threshold=0.0)) == expected
    with pytest.raises(InputError, match=r"column needs .*a.npy to be .* f0, f1 .* and x. Got 'x'"):
        select(pool, tmp_path, path=path, column="x", threshold=0.0)
    np.save(path, array.astype([("f0", "<i8"), ("f1", "<u8"), ("flyt", "<f4")]))
    with pytest.raises(InputError, match=r"must hold numbers in .*, and f0 and f1 u8"):
        select(pool, tmp_path, path=path, column="flyt", threshold=0.0)
    Path(path).write_bytes(b"no")
    with pytest.raises(InputError, match=r"a.npy is not a readable npy file"):
        select(pool, tmp_path, path=path, column="flyt", threshold=0.0)


def test_column_of_the_pools_own_metadata(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    """From all parquet files; the first counts for a uid that several have."""
    with pytest.raises(InputError, match=r"the metadata of the pool, and .* has none"):
        select(pool, tmp_path, path=None, column="score", fraction=0.5)
    folder = Path(pool.root) / "metadata"
    folder.mkdir()
    write_table(folder / "a.parquet", uid=uids[8:], score=[9.0] * 4)  # of another pool
    write_table(folder / "b.parquet", uid=[uids[5], uids[2]], score=[0.1, 0.9])
    write_table(folder / "c.parquet", uid=[uids[5], uids[7]], score=[0.9, 0.8])
    selection = select(pool, tmp_path, path=None, column="score", threshold=0.5)
    assert kept(selection) == {uids[2]: 1, uids[7]: 1}


# ---- lists --------------------------------------------------------------------------------------
def lists_of(pool: Pool, path: str | None, name: str | None = "concepts") -> list[list[int]]:
    """The list of each row, in the order of the samples that the pool was made of."""
    found = read_pool_lists(pool, ExternalColumn(path=path, column=name))
    assert found.values.dtype == found.offsets.dtype == np.int64
    assert found.offsets[0] == 0
    assert found.offsets[-1] == len(found.values)
    return [found.values[a:b].tolist() for a, b in itertools.pairwise(found.offsets)]


LISTS: list[list[int] | None] = [[5, 1, 5], None, [], [2**62], [9], [7, 8]]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("row_group", [2, 100])
def test_lists_are_joined_by_uid(
    pool: Pool, uids: list[str], tmp_path: Path, kind: Callable[..., Any], row_group: int
) -> None:
    order = [11, 3, 0, 7, 9, 1]  # shuffled, some of another pool
    column = pa.array(LISTS, type=kind(pa.int64()))
    path = tmp_path / "a.parquet"
    table = pa.table({"uid": [uids[i].upper() for i in order], "concepts": column})
    pq.write_table(table, path, row_group_size=row_group)
    expected: list[list[int]] = [[] for _ in uids]
    for i, members in zip(order, LISTS, strict=True):
        expected[i] = members or []
    assert lists_of(pool, str(path)) == expected[:8]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.int64()])
def test_whole_numbers_are_lists_of_one(
    pool: Pool, uids: list[str], tmp_path: Path, kind: pa.DataType
) -> None:
    column = pa.array([4, None, 0], type=kind)
    path = write_table(tmp_path / "a.parquet", uid=uids[:3], concepts=column)
    assert lists_of(pool, path) == [[4], [], [0], [], [], [], [], []]


def test_lists_of_other_kinds(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    """Nulls in lists, lists of equal length, a slice of an array, and lists that are all empty."""
    columns: list[tuple[Any, list[list[int]]]] = [
        (pa.array([[1, None], [None], [2]], type=pa.list_(pa.int16())), [[1], [], [2]]),
        (pa.array([[1, 2], None, [3, 4]], type=pa.list_(pa.int32(), 2)), [[1, 2], [], [3, 4]]),
        (pa.array([[9, 9], [1], None, [2, 3]]).slice(1), [[1], [], [2, 3]]),
        (pa.array([[], None, []], type=pa.list_(pa.null())), [[], [], []]),
        (pa.nulls(3), [[], [], []]),
    ]
    for number, (column, expected) in enumerate(columns):
        path = write_table(tmp_path / f"{number}.parquet", uid=uids[:3], concepts=column)
        assert lists_of(pool, path)[:3] == expected, column.type


def test_first_list_of_repeated_uids_counts(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    names = [uids[0], uids[1], uids[0], uids[1], uids[1]]
    column: list[list[int] | None] = [[1], None, [2], [3], [4]]
    path = write_table(tmp_path / "a.parquet", uid=names, concepts=column)
    assert lists_of(pool, path)[:2] == [[1], [3]]


def test_lists_with_bad_uids_are_left_out(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], tmp_path: Path
) -> None:
    samples = make_samples(2)
    samples[0].record = b'{"uid": "%s"}' % (b"0" * 32)  # which no bad uid may stand for
    pool = load_pool(write_pool(samples))
    path = write_table(
        tmp_path / "a.parquet", uid=["bad", None, samples[1].uid], concepts=[[1], [2], [3, 4]]
    )
    assert lists_of(pool, path) == [[], [3, 4]]


def test_lists_of_the_pools_own_metadata(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    folder = Path(pool.root) / "metadata"
    folder.mkdir()
    write_table(folder / "a.parquet", uid=uids[8:], concepts=[[9]] * 4)  # of another pool
    write_table(folder / "b.parquet", uid=[uids[5], uids[2]], concepts=[[], [2, 3]])
    write_table(folder / "c.parquet", uid=[uids[5], uids[2]], concepts=[[6], [9]])
    assert lists_of(pool, None) == [[], [], [2, 3], [], [], [6], [], []]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1.5]]), r"column 'concepts' of .*a.parquet must hold lists .* Got double"),
        (pa.array([0.0]), r"must hold lists of whole numbers, or one .* Got double; give what"),
        (pa.array([["dog"]]), r"must hold lists .* Got string; give what it names numbers"),
        (pa.array([[[1]]]), r"must hold lists of whole numbers"),
        (pa.array([[3, -1]]), r"must hold numbers of at least 0. It has -1"),
        (pa.array([2**63], type=pa.uint64()), r"must hold whole numbers below 2\^63"),
    ],
)
def test_wrong_lists(
    pool: Pool, uids: list[str], tmp_path: Path, column: pa.Array, message: str
) -> None:
    path = write_table(tmp_path / "a.parquet", uid=uids[:1], concepts=column)
    with pytest.raises(InputError, match=message):
        lists_of(pool, path)


def test_wrong_files_of_lists(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", uid=uids[8:], concepts=[[1]] * 4)
    with pytest.raises(InputError, match=r"None of the 4 uids in .*a.parquet is in the pool"):
        lists_of(pool, path)
    with pytest.raises(
        InputError, match=r"column must be a column of .* Got 'tags'.*\['uid', 'concepts'"
    ):
        lists_of(pool, path, "tags")
    with pytest.raises(InputError, match=r"must be an existing .parquet file, for lists. Got '.*b"):
        lists_of(pool, str(tmp_path / "b.parquet"))
    (tmp_path / "c.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"must be an existing .parquet file, for lists"):
        lists_of(pool, str(tmp_path / "c.npy"))
    path = write_table(tmp_path / "d.parquet", key=uids[:1], concepts=[[1]])
    with pytest.raises(InputError, match=r"d.parquet must be a parquet file with a column 'uid'"):
        lists_of(pool, path)


def test_source_takes_lists_and_stamps_their_file(
    pool: Pool, uids: list[str], tmp_path: Path
) -> None:
    concepts: list[list[int]] = [[i] * (i % 3) for i in range(8)]
    column = pa.array(concepts, type=pa.list_(pa.int32()))
    path = write_table(tmp_path / "a.parquet", uid=uids[:8], concepts=column)
    selector = ConceptBalance(path=path, column="concepts", fraction=0.5)
    source = make_source(pool, tmp_path)
    lists = source.take(np.array([5, 0, 4]), selector.requires).lists
    assert lists is not None
    assert lists.values.tolist() == [5, 5, 4]
    assert lists.offsets.tolist() == [0, 2, 2, 3]
    assert source.take(np.array([5]), Requirements()).lists is None
    assert selector.select(source).multiplicities.sum() == 4
    before = source.identity(selector)
    assert source.identity(ConceptBalance(path=path, column="concepts", fraction=0.5)) == before
    write_table(tmp_path / "a.parquet", uid=uids[:7], concepts=column[:7])
    assert source.identity(selector)["columns"] == before["columns"]  # of what it has read
    changed = make_source(pool, tmp_path).identity(selector)
    for part in ("columns", "files"):  # the path is named, too
        assert changed.pop(part) != before.pop(part)
    assert changed == before


# ---- uids as others write them -------------------------------------------------------------------
@pytest.mark.parametrize("form", [str.upper, lambda text: str(uuid.UUID(text)), lambda text: text])
def test_uids_with_dashes_and_capitals_are_found(
    form: Callable[[str], str], tmp_path: Path
) -> None:
    texts = [f"{number:032x}" for number in (7, 10**30, 2**127 + 5)]
    path = tmp_path / "scores.parquet"
    pd.DataFrame({"uid": [form(text) for text in texts], "score": [1.0, 2.0, 3.0]}).to_parquet(path)
    uids, valid, faults = read_metadata_uids(path)
    assert valid.all()
    assert not faults.samples
    assert np.array_equal(uids, parse_uids(texts))
    for kind in ("U", "S"):
        np.save(tmp_path / "subset.npy", np.array([form(text) for text in texts], dtype=kind))
        listed, counts = read_subset(tmp_path / "subset.npy")
        assert np.array_equal(listed, parse_uids(texts))
        assert counts.tolist() == [1, 1, 1]


def test_texts_that_are_no_uids_are_told(tmp_path: Path) -> None:
    wrong = ["0" * 32, "00000000-0000-0000-00000000-00000000", "-" * 36, "0" * 36, None]
    path = tmp_path / "scores.parquet"
    pd.DataFrame({"uid": wrong}).to_parquet(path)
    assert read_metadata_uids(path)[1].tolist() == [True, False, False, False, False]
    np.save(tmp_path / "subset.npy", np.array(wrong[:2]))
    with pytest.raises(InputError, match=r"must hold 32 hexadecimal .*Row 1 is '00000000-0000-"):
        read_subset(tmp_path / "subset.npy")


def test_a_pool_may_have_uids_with_dashes() -> None:
    record = b'{"uid": "00000000-0000-4000-8000-00000000000a"}'
    assert _find_uid(record) == "0000000000004000800000000000000a"
