"""Scores of a pool: kept part by part, reused, resumed, and the selection made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from siftclip.datamodules.pool import Pool
from siftclip.datamodules.scoring import (
    PoolChunks,
    Scored,
    identity_hash,
    open_chunks,
    run_scores,
    run_selection,
    score_pool,
    scores_identity,
    summarise,
)
from siftclip.datamodules.selection import Selection
from siftclip.datamodules.uids import format_uid
from siftclip.selectors.base import (
    Choice,
    Chunk,
    ChunkSource,
    Requirements,
    ScoreSelector,
    Selector,
)
from siftclip.selectors.clip_score import ClipScore
from siftclip.selectors.uniform import Uniform, uniform_score

Make = Callable[..., Any]


@pytest.fixture
def pool(
    make_samples: Make, write_pool: Make, write_metadata: Make, load_pool: Callable[..., Pool]
) -> Pool:
    """20 samples in four shards; metadata for 18 of them and 3 more, in three parts."""
    samples = make_samples(23)
    root = write_pool(samples[:20], shards=4)
    write_metadata(root / "metadata", [sample.uid for sample in samples[2:]], parts=3)
    return load_pool(root)


def chunks_of(pool: Pool, selector: Selector, chunk_samples: int = 1000) -> PoolChunks:
    return open_chunks(
        pool,
        selector.requires,
        features_folder=None,
        chunk_samples=chunk_samples,
        max_bad_fraction=0.0,
    )


def run(
    selector: Selector, parameters: dict[str, Any], chunks: PoolChunks, root: Path
) -> Selection:
    scored = run_scores(selector, parameters, chunks, scores_root=root, progress=False)
    return run_selection(selector, "test", parameters, chunks, scored)


class Counting(ClipScore):
    """Notes the rows that it is asked to score, and can be stopped after some chunks."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(features="l14", fraction=0.5)
        self.scored: list[int] = []
        self.chunks = 0
        self.fits = 0
        self.stop_after = stop_after

    def fit(self, source: ChunkSource) -> None:
        self.fits += 1

    def score(self, chunk: Chunk) -> Tensor:
        if self.chunks == self.stop_after:
            raise KeyboardInterrupt
        self.chunks += 1
        self.scored += chunk.rows.tolist()
        return super().score(chunk)


def true_scores(pool: Pool) -> np.ndarray:
    scores = np.full(len(pool), np.nan, np.float32)
    for path in (Path(pool.root) / "metadata").glob("*.npz"):
        uids = pq.read_table(path.with_suffix(".parquet"))["uid"].to_pylist()
        rows = {format_uid(uid): row for row, uid in enumerate(pool.uids)}
        with np.load(path) as arrays:
            for i, uid in enumerate(uids):
                if uid in rows:
                    image, text = arrays["l14_img"][i], arrays["l14_txt"][i]
                    scores[rows[uid]] = image.astype(np.float32) @ text.astype(np.float32)
    return scores


@pytest.mark.parametrize("chunk_samples", [1, 4, 1000])
def test_scores_are_those_of_the_metadata(pool: Pool, tmp_path: Path, chunk_samples: int) -> None:
    selector = Counting()
    chunks = chunks_of(pool, selector, chunk_samples)
    scores = score_pool(selector, chunks, folder=tmp_path / "scores", progress=False)
    expected = true_scores(pool)
    assert scores.dtype == np.float32
    assert np.isnan(scores[:2]).all()
    assert np.isnan(scores).sum() == 2
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert sorted(selector.scored) == list(range(2, 20))


def test_each_part_has_a_file_and_is_not_scored_twice(pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    first = Counting()
    scores = score_pool(first, chunks_of(pool, first), folder=folder, progress=False)
    parts = sorted(path.stem for path in (Path(pool.root) / "metadata").glob("*.npz"))
    assert sorted(path.name for path in folder.iterdir()) == [f"{part}.npz" for part in parts]

    again = Counting()
    reused = score_pool(again, chunks_of(pool, again), folder=folder, progress=False)
    assert (again.chunks, again.fits) == (0, 0)
    assert np.array_equal(reused, scores, equal_nan=True)

    (folder / f"{parts[1]}.npz").unlink()
    third = Counting()
    redone = score_pool(third, chunks_of(pool, third), folder=folder, progress=False)
    assert (third.chunks, third.fits) == (1, 1)
    with np.load(folder / f"{parts[1]}.npz") as part:
        assert sorted(third.scored) == sorted(part["rows"].tolist())
    assert np.array_equal(redone, scores, equal_nan=True)


@pytest.mark.parametrize("stop_after", [0, 1, 2, 5])
def test_killed_run_resumes_with_the_part_it_was_in(
    pool: Pool, tmp_path: Path, stop_after: int
) -> None:
    killed = Counting(stop_after)
    with pytest.raises(KeyboardInterrupt):
        score_pool(killed, chunks_of(pool, killed, 4), folder=tmp_path / "s", progress=False)
    done = len(list((tmp_path / "s").glob("*.npz"))) if (tmp_path / "s").exists() else 0
    assert done == stop_after // 2  # each part has 7 rows or fewer in the pool: two chunks of 4
    resumed = Counting()
    chunks = chunks_of(pool, resumed, 4)
    scores = score_pool(resumed, chunks, folder=tmp_path / "s", progress=False)
    assert resumed.chunks == 6 - 2 * done
    np.testing.assert_allclose(scores, true_scores(pool), rtol=0, atol=1e-6)


def test_without_features_the_parts_are_the_shards(pool: Pool, tmp_path: Path) -> None:
    selector = Uniform(seed=1, fraction=0.5)
    chunks = chunks_of(pool, selector, 3)
    assert chunks.store is None
    scores = score_pool(selector, chunks, folder=tmp_path / "s", progress=False)
    assert sorted(p.stem for p in (tmp_path / "s").iterdir()) == [f"0000000{i}" for i in range(4)]
    assert np.array_equal(scores, uniform_score(pool.uids, 1))


def test_samples_without_features_are_never_selected(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    selector = ClipScore(features="l14", fraction=1.0)
    selection = run(selector, {"fraction": 1.0}, chunks_of(pool, selector), tmp_path)
    kept = {format_uid(uid) for uid in selection.uids}
    assert kept == {format_uid(uid) for uid in pool.uids[2:]}
    assert "2 of 20 samples have no score and cannot be selected" in caplog.text
    assert selection.manifest["kept_samples"] == 18
    assert selection.manifest["kept_fraction"] == pytest.approx(0.9)


def test_selection_keeps_the_best_and_says_where_it_comes_from(pool: Pool, tmp_path: Path) -> None:
    selector = ClipScore(features="l14", fraction=0.25)
    parameters = {"features": "l14", "fraction": 0.25}
    selection = run(selector, parameters, chunks_of(pool, selector), tmp_path)
    scores = true_scores(pool)
    best = np.argsort(-np.nan_to_num(scores, nan=-9))[:5]
    assert {format_uid(uid) for uid in selection.uids} == {format_uid(pool.uids[i]) for i in best}
    manifest = selection.manifest
    assert manifest["selector"] == "test"
    assert manifest["parameters"] == parameters
    assert manifest["pool"] == {
        "root": str(pool.root),
        "fingerprint": pool.fingerprint,
        "samples": 20,
    }
    assert manifest["kept_distinct"] == 5
    assert manifest["score_quantiles_kept"]["q0"] == pytest.approx(scores[best].min(), abs=1e-6)
    assert manifest["score_quantiles_pool"]["q100"] == pytest.approx(np.nanmax(scores), abs=1e-6)


def test_another_rule_reuses_the_scores(pool: Pool, tmp_path: Path) -> None:
    def score(**parameters: Any) -> Scored:
        selector = Counting()
        scored = run_scores(
            selector, parameters, chunks_of(pool, selector), scores_root=tmp_path, progress=False
        )
        calls.append(selector.chunks)
        return scored

    calls: list[int] = []
    first = score(features="l14", fraction=0.5, threshold=None)
    second = score(features="l14", fraction=None, threshold=0.1)
    third = score(features="l14", alpha=2)
    assert first.folder == second.folder != third.folder
    assert calls == [3, 0, 3]


def test_identity_changes_with_everything_that_scores_depend_on(
    pool: Pool, make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], tmp_path: Path
) -> None:
    def identity(pool: Pool, selector: Selector, **parameters: Any) -> str:
        return identity_hash(scores_identity(parameters, chunks_of(pool, selector)))

    clip, uniform = ClipScore(features="l14", fraction=0.1), Uniform(seed=0, fraction=0.1)
    first = identity(pool, clip, features="l14")
    assert first == identity(pool, clip, features="l14", fraction=0.7, rule="x")
    found = {first, identity(pool, clip, features="b32"), identity(pool, uniform, seed=0)}
    path = next((Path(pool.root) / "metadata").glob("*.npz"))
    os.utime(path, ns=(0, 0))
    found.add(identity(pool, clip, features="l14"))
    other = load_pool(write_pool(make_samples(19), folder="other"), cache="other")
    found.add(identity(other, uniform, seed=0))
    assert len(found) == 5


class EveryOther(Selector):
    """A set function without scores: keeps every other uid, in their order, twice."""

    @property
    def requires(self) -> Requirements:
        return Requirements(features=("l14_img",), captions=True)

    def select(self, source: ChunkSource) -> Choice:
        chunks = list(source())
        rows = np.concatenate([chunk.rows for chunk in chunks])
        uids = np.concatenate([chunk.uids for chunk in chunks])
        self.captions = {
            int(row): caption
            for chunk in chunks
            for row, caption in zip(chunk.rows, chunk.captions or [], strict=True)
        }
        multiplicities = np.zeros(len(rows), dtype=np.int64)
        multiplicities[np.lexsort((uids[:, 1], uids[:, 0]))[::2]] = 2
        return Choice(rows=rows, multiplicities=multiplicities)


def test_set_function_without_scores_is_run(pool: Pool, tmp_path: Path) -> None:
    selector = EveryOther()
    chunks = chunks_of(pool, selector, 4)
    scored = run_scores(selector, {}, chunks, scores_root=tmp_path, progress=False)
    assert scored.scores is None
    selection = run_selection(selector, "every_other", {}, chunks, scored)
    ordered = sorted(tuple(uid.tolist()) for uid in pool.uids[2:])  # those with features
    assert [tuple(uid.tolist()) for uid in selection.uids] == ordered[::2]
    assert selection.multiplicities.tolist() == [2] * 9
    assert selection.manifest["kept_samples"] == 18
    assert selection.manifest["kept_distinct"] == 9
    assert selection.manifest["score_quantiles_pool"] == {}
    assert selector.captions == {row: f"caption of sample {row}" for row in range(2, 20)}


class CaptionLength(ScoreSelector):
    @property
    def requires(self) -> Requirements:
        return Requirements(captions=True)

    def score(self, chunk: Chunk) -> Tensor:
        assert chunk.captions is not None
        return torch.tensor([float(len(caption)) for caption in chunk.captions])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_captions_are_read_and_the_tars_closed(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], tmp_path: Path
) -> None:
    samples = make_samples(6)
    samples[4].caption = b""
    samples[5].caption = b"\xff"
    pool = load_pool(write_pool(samples, shards=3))
    selector = CaptionLength(threshold=1.0)
    before = open_files()
    selection = run(selector, {}, chunks_of(pool, selector, 1), tmp_path)
    assert len(selection) == 4  # a caption that cannot be read is empty
    assert open_files() == before
    half: Iterator[Chunk] = chunks_of(pool, selector, 1)()
    next(half)
    half.close()  # type: ignore[attr-defined]  # a generator that is left half-way
    assert open_files() == before


def test_quantiles_leave_out_nan() -> None:
    summary = summarise(np.array([3, np.nan, 1, 2], np.float32))
    assert (summary["q0"], summary["q50"], summary["q100"]) == (1.0, 2.0, 3.0)
    assert set(summary) == {"q0", "q1", "q10", "q25", "q50", "q75", "q90", "q99", "q100"}
    assert summarise(np.full(3, np.nan, np.float32)) == {}
