"""Columns and subsets made elsewhere, joined with a pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftclip.datamodules.pool import Pool
from siftclip.datamodules.pool_source import PoolSource
from siftclip.datamodules.scoring import run_selection
from siftclip.datamodules.selection import Selection
from siftclip.datamodules.uids import format_uid, to_structured
from siftclip.selectors.errors import InputError
from siftclip.selectors.external import External

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


def select(pool: Pool, tmp_path: Path, **parameters: Any) -> Selection:
    source = PoolSource(
        pool,
        features=[None],
        scores_root=tmp_path / "s",
        chunk_samples=3,
        max_bad_fraction=0.0,
        progress=False,
    )
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
        ({"other": [1.0]}, r"selector.column='score' is not a column of .* has \['uid', 'other'\]"),
        ({"score": ["high"]}, r"selector.column='score' of .* must hold numbers: .*high"),
        ({"score": [[1.0, 2.0]]}, r"selector.column='score' of .* must hold numbers"),
        ({"score": [{"a": 1}]}, r"selector.column='score' of .* must hold numbers"),
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
    with pytest.raises(InputError, match=r"selector.path must be an existing file. Got '.*b.parq"):
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
    with pytest.raises(InputError, match=r"column='x': .*a.npy must be .* f0, f1 .* and x"):
        select(pool, tmp_path, path=path, column="x", threshold=0.0)
    np.save(path, array.astype([("f0", "<i8"), ("f1", "<u8"), ("flyt", "<f4")]))
    with pytest.raises(InputError, match=r"must hold numbers, and f0 and f1 u8"):
        select(pool, tmp_path, path=path, column="flyt", threshold=0.0)
    Path(path).write_bytes(b"no")
    with pytest.raises(InputError, match=r"a.npy is not a readable npy file"):
        select(pool, tmp_path, path=path, column="flyt", threshold=0.0)


def test_column_of_the_pools_own_metadata(pool: Pool, uids: list[str], tmp_path: Path) -> None:
    """From all parquet files; the first counts for a uid that several have."""
    with pytest.raises(InputError, match=r"the pool's metadata; .* has none"):
        select(pool, tmp_path, path=None, column="score", fraction=0.5)
    folder = Path(pool.root) / "metadata"
    folder.mkdir()
    write_table(folder / "a.parquet", uid=uids[8:], score=[9.0] * 4)  # of another pool
    write_table(folder / "b.parquet", uid=[uids[5], uids[2]], score=[0.1, 0.9])
    write_table(folder / "c.parquet", uid=[uids[5], uids[7]], score=[0.9, 0.8])
    selection = select(pool, tmp_path, path=None, column="score", threshold=0.5)
    assert kept(selection) == {uids[2]: 1, uids[7]: 1}
