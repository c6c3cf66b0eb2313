"""Every built-in selector on a pool of files: answers that are kept, few samples, several ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built_in_selectors import built_in_selectors

from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.pool.pool import Pool, open_pool
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import Requirements, ScoreSelector
from siftclip.selectors.core.checks import synthetic_files
from siftclip.selectors.core.rules import Threshold, TopFraction
from siftclip.selectors.core.source import FeatureFile

SAMPLES = 60
KEYS = ("l14_img", "l14_txt", "b32_img", "b32_txt")


BUILT_IN = built_in_selectors()


@pytest.fixture(scope="module")
def folder(
    make_samples: Callable[..., Any],
    write_pool_at: Callable[..., Path],
    write_metadata: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pool whose last three samples have no features, beside all files of the factories."""
    folder = tmp_path_factory.mktemp("pools")
    known = open_folder(folder, write_pool_at(folder / "pool", make_samples(SAMPLES), shards=4))
    uids = [format_uid(uid) for uid in known.uids]
    metadata = folder / "pool" / "metadata"
    write_metadata(metadata, uids[:-3], parts=3, keys=KEYS, dim=16)
    for path in metadata.glob("*.parquet"):
        table = pq.read_table(path)
        columns = {
            "cluster": np.arange(len(table)) % 2.0,
            "concepts": [list(range(number % 4)) for number in range(len(table))],
            "original_width": np.full(len(table), 300),
            "original_height": np.arange(len(table)) + 190,
        }
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values))
        pq.write_table(table, path)
    target, centroids, names = (
        FeatureFile(path="target.npz", key="l14_img"),
        FeatureFile(path="centroids.npy"),
        FeatureFile(path="names.npz"),
    )
    files = synthetic_files(Requirements(files=(target, centroids, names)), samples=9)
    np.savez(folder / "target.npz", l14_img=files[target].numpy())
    np.save(folder / "centroids.npy", files[centroids].numpy())
    np.savez(folder / "names.npz", files[names].numpy())
    table = pa.table({"uid": uids, "dfn": np.arange(SAMPLES) / SAMPLES})
    pq.write_table(table, folder / "a.parquet")
    subset = np.sort(np.array([tuple(uid) for uid in known.uids[::2]], dtype="u8,u8"))
    np.save(folder / "a.npy", subset)
    return folder


def open_folder(folder: Path, root: Path) -> Pool:
    """The pool at `root`, with its index beside it."""
    return open_pool(
        LocalStorage(str(root)), cache_dir=folder / "cache", max_bad_fraction=0, progress=False
    )


@pytest.fixture
def pool(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """The pool, which all tests share; the working folder holds files of the test's own."""
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy2(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return open_folder(folder, folder / "pool")


def source_of(pool: Pool, scores: str, chunk_samples: int = 16, ranks: Ranks | None = None) -> Any:
    return PoolSource(
        pool,
        features=[None],
        scores_root=Path(scores),
        chunk_samples=chunk_samples,
        max_bad_fraction=0.0,
        ranks=ranks,
        progress=False,
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_answers_are_kept_and_do_not_depend_on_chunks_and_ranks(
    name: str, pool: Pool, run_on_ranks: Callable[..., list[Any]]
) -> None:
    make = BUILT_IN[name]
    expected = make().select(source_of(pool, "scores")).multiplicities
    assert expected.shape == (SAMPLES,)
    again = make().select(source_of(pool, "scores", chunk_samples=5)).multiplicities
    assert np.array_equal(again, expected)
    for shared in ("scores", "others"):
        answers = run_on_ranks(
            2, lambda ranks, at=shared: make().select(source_of(pool, at, ranks=ranks))
        )
        for answer in answers:
            assert np.array_equal(answer.multiplicities, expected)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("name", BUILT_IN)
def test_few_samples_that_earlier_stages_have_left(
    name: str, samples: int, pool: Pool, run_on_ranks: Callable[..., list[Any]]
) -> None:
    make = BUILT_IN[name]

    def select(ranks: Ranks, first: int) -> np.ndarray:
        rows = np.arange(first, first + samples)
        source = source_of(pool, f"scores{first}", ranks=ranks).restrict(rows)
        return make().select(source).multiplicities

    for first in (0, SAMPLES - samples):  # the last ones have no features
        answers = run_on_ranks(3, lambda ranks, at=first: select(ranks, at))
        assert all(answer.tolist() == answers[0].tolist() for answer in answers)
        assert answers[0].shape == (samples,)


@pytest.mark.parametrize("name", BUILT_IN)
def test_another_rule_takes_the_same_scores(name: str, pool: Pool) -> None:
    make = BUILT_IN[name]
    selector = make()
    if not isinstance(selector, ScoreSelector):
        pytest.skip("it has no scores")
    for rule in (TopFraction(0.4), TopFraction(0.2), Threshold(-0.2)):
        selector.rule = rule
        kept = selector.select(source_of(pool, "scores"))
        alone = selector.select(source_of(pool, f"scores {rule!r}"))
        assert np.array_equal(kept.multiplicities, alone.multiplicities)
        assert kept.scores is not None
        assert alone.scores is not None
        assert np.array_equal(kept.scores, alone.scores, equal_nan=True)


def test_selectors_do_not_take_the_answers_of_others(pool: Pool) -> None:
    for name, make in BUILT_IN.items():
        shared = make().select(source_of(pool, "shared")).multiplicities
        alone = make().select(source_of(pool, name)).multiplicities
        assert np.array_equal(shared, alone), name


def test_other_files_give_other_answers(pool: Pool) -> None:
    makes = {name: make for name, make in BUILT_IN.items() if make().requires.files}
    assert len(makes) > 8
    before = {name: m().select(source_of(pool, "a")).multiplicities for name, m in makes.items()}
    generator = np.random.default_rng(5)
    for path in ("target.npz", "centroids.npy", "names.npz"):
        values = generator.standard_normal((12, 16)) + 0.3  # more rows: another size, another stamp
        values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
        if path.endswith("npy"):
            np.save(path, values)
        else:
            np.savez(path, l14_img=values)
    changed = 0
    for name, make in makes.items():
        after = make().select(source_of(pool, "a")).multiplicities
        assert np.array_equal(after, make().select(source_of(pool, "b")).multiplicities), name
        changed += not np.array_equal(after, before[name])
    assert changed > len(makes) / 2
