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

from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.pool_source import FolderCache, PoolSource, summarise
from siftclip.datamodules.selection.run import (
    run_selection,
    score_pool,
)
from siftclip.datamodules.selection.selection import Selection, write_selection
from siftclip.errors import InputError
from siftclip.files import identity_hash
from siftclip.hashing import uniform_score
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import (
    Choice,
    Chunk,
    Requirements,
    ScoreSelector,
    Selector,
    Source,
)
from siftclip.selectors.core.compose import Then
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.uniform import Uniform

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


@pytest.fixture
def source_of(tmp_path: Path) -> Callable[..., PoolSource]:
    def make(pool: Pool, chunk_samples: int = 1000, scores: str = "scores") -> PoolSource:
        return PoolSource(
            pool,
            features=[None],
            scores_root=tmp_path / scores,
            chunk_samples=chunk_samples,
            max_bad_fraction=0.0,
            progress=False,
        )

    return make


def run(selector: Selector, source: PoolSource) -> Selection:
    return run_selection(selector, "test", {"features": "l14"}, source)


class Counting(ClipScore):
    """Notes the rows that it is asked to score, and can be stopped after some chunks."""

    def __init__(self, **rule: Any) -> None:
        super().__init__(features="l14", **(rule or {"fraction": 0.5}))
        self._scored: list[int] = []
        self._chunks = 0
        self._fits = 0
        self._stop_after: int | None = None

    def fit(self, source: Source) -> None:
        self._fits += 1

    def score(self, chunk: Chunk) -> Tensor:
        if self._chunks == self._stop_after:
            raise KeyboardInterrupt
        self._chunks += 1
        self._scored += chunk.rows.tolist()
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
def test_scores_are_those_of_the_metadata(pool: Pool, source_of: Make, chunk_samples: int) -> None:
    selector = Counting()
    scores = score_pool(selector, source_of(pool, chunk_samples))
    expected = true_scores(pool)
    assert scores.dtype == np.float32
    assert np.isnan(scores[:2]).all()
    assert np.isnan(scores).sum() == 2
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert sorted(selector._scored) == list(range(2, 20))


def files_of(source: PoolSource, selector: Selector) -> Path:
    return source.scores_root / identity_hash(source.identity(selector))


def test_each_task_has_a_file_and_is_not_scored_twice(pool: Pool, source_of: Make) -> None:
    source, first = source_of(pool), Counting()
    scores = score_pool(first, source)
    folder = files_of(source, first)
    parts = {path.stem: path for path in (Path(pool.root) / "metadata").glob("*.npz")}
    names = {f"{part}-0.npz" for part in parts}
    assert {path.name for path in folder.iterdir()} == {*names, "identity.json"}

    again = Counting()
    reused = score_pool(again, source_of(pool))
    assert (again._chunks, again._fits) == (0, 0)
    assert np.array_equal(reused, scores, equal_nan=True)

    part = sorted(parts)[1]
    (folder / f"{part}-0.npz").unlink()
    third = Counting()
    redone = score_pool(third, source_of(pool))
    assert (third._chunks, third._fits) == (1, 1)
    uids = pq.read_table(parts[part].with_suffix(".parquet"))["uid"].to_pylist()
    rows = {format_uid(uid): row for row, uid in enumerate(pool.uids)}
    assert sorted(third._scored) == sorted(rows[uid] for uid in uids if uid in rows)
    assert np.array_equal(redone, scores, equal_nan=True)


@pytest.mark.parametrize("stop_after", [0, 1, 2, 5])
def test_killed_run_resumes_with_the_task_it_was_in(
    pool: Pool, source_of: Make, stop_after: int
) -> None:
    killed, source = Counting(), source_of(pool, 4)
    killed._stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        score_pool(killed, source)
    done = len(list(files_of(source, killed).glob("*.npz")))
    assert done == stop_after // 2  # each part has 7 rows or fewer in the pool: two chunks of 4
    resumed = Counting()
    scores = score_pool(resumed, source_of(pool, 4))
    assert resumed._chunks == 6 - 2 * done
    np.testing.assert_allclose(scores, true_scores(pool), rtol=0, atol=1e-6)


def test_long_parts_are_several_tasks(
    pool: Pool, source_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siftclip.selectors.core.source.TASK_SAMPLES", 4)
    source = source_of(pool, 3)
    scores = score_pool(Counting(), source)
    np.testing.assert_allclose(scores, true_scores(pool), rtol=0, atol=1e-6)
    assert len(list(files_of(source, Counting()).glob("*.npz"))) == 6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_tasks_and_all_get_all_scores(
    pool: Pool, source_of: Make, run_on_ranks: Make, size: int
) -> None:
    def score(ranks: Ranks) -> tuple[np.ndarray, list[int]]:
        source, selector = source_of(pool, 4), Counting()
        source.ranks = ranks
        return score_pool(selector, source), selector._scored

    answers = run_on_ranks(size, score)
    assert sorted(row for _, scored in answers for row in scored) == list(range(2, 20))
    for scores, _ in answers:
        np.testing.assert_allclose(scores, true_scores(pool), rtol=0, atol=1e-6)


def test_without_features_the_parts_are_the_shards(pool: Pool, source_of: Make) -> None:
    selector, source = Uniform(seed=1, fraction=0.5), source_of(pool, 3)
    scores = score_pool(selector, source)
    names = sorted(path.stem for path in files_of(source, selector).glob("*.npz"))
    assert names == [f"0000000{i}-0" for i in range(4)]
    assert np.array_equal(scores, uniform_score(pool.uids, 1))


def test_samples_without_features_are_never_selected(
    pool: Pool, source_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    selection = run(ClipScore(features="l14", fraction=1.0), source_of(pool))
    kept = {format_uid(uid) for uid in selection.uids}
    assert kept == {format_uid(uid) for uid in pool.uids[2:]}
    assert "2 of 20 samples have no score and cannot be selected" in caplog.text
    assert selection.manifest["unjudged_samples"] == 2
    assert selection.manifest["kept_samples"] == 18
    assert selection.manifest["kept_fraction"] == pytest.approx(0.9)


def test_selection_keeps_the_best_and_says_where_it_comes_from(pool: Pool, source_of: Make) -> None:
    selection = run(ClipScore(features="l14", fraction=0.25), source_of(pool))
    scores = true_scores(pool)
    best = np.argsort(-np.nan_to_num(scores, nan=-9))[:5]
    assert {format_uid(uid) for uid in selection.uids} == {format_uid(pool.uids[i]) for i in best}
    manifest = selection.manifest
    assert manifest["selector"] == "test"
    assert manifest["parameters"] == {"features": "l14"}
    assert manifest["pool"] == {
        "root": str(pool.root),
        "fingerprint": pool.fingerprint,
        "samples": 20,
    }
    assert manifest["kept_distinct"] == 5
    assert manifest["cost"]["ranks"] == 1
    assert manifest["score_quantiles_kept"]["q0"] == pytest.approx(scores[best].min(), abs=1e-6)
    assert manifest["score_quantiles_pool"]["q100"] == pytest.approx(np.nanmax(scores), abs=1e-6)


def test_another_rule_reuses_the_scores(pool: Pool, source_of: Make) -> None:
    selectors = [Counting(fraction=0.5), Counting(threshold=0.1), Counting(fraction=0.2)]
    selectors[2].alpha = 2  # type: ignore[attr-defined]  # a parameter
    for selector in selectors:
        score_pool(selector, source_of(pool))
    assert [selector._chunks for selector in selectors] == [3, 0, 3]
    selections = {identity_hash(source_of(pool).identity(s, with_rule=True)) for s in selectors}
    assert len(selections) == 3


def test_identity_changes_with_everything_that_scores_depend_on(
    pool: Pool, make_samples: Make, write_pool: Make, load_pool: Make, source_of: Make
) -> None:
    def identity(pool: Pool, selector: Selector) -> str:
        return identity_hash(source_of(pool).identity(selector))

    clip, uniform = ClipScore(features="l14", fraction=0.1), Uniform(seed=0, fraction=0.1)
    first = identity(pool, clip)
    assert first == identity(pool, ClipScore(features="l14", threshold=0.7))
    found = {first, identity(pool, uniform)}
    found.add(identity(pool, Uniform(seed=1, fraction=0.1)))
    path = next((Path(pool.root) / "metadata").glob("*.npz"))
    os.utime(path, ns=(0, 0))
    found.add(identity(pool, clip))
    other = load_pool(write_pool(make_samples(19), folder="other"), cache="other")
    found.add(identity(other, uniform))
    source = source_of(pool)
    for rows in ([0, 1], [0, 2]):
        found.add(identity_hash(source.identity((uniform, np.array(rows)))))
    assert len(found) == 7


def test_features_are_looked_for_in_several_folders(
    pool: Pool, write_metadata: Make, tmp_path: Path
) -> None:
    truth = write_metadata(tmp_path / "more", [format_uid(u) for u in pool.uids], keys=("dfn_img",))

    def source(*folders: Path | None) -> PoolSource:
        return PoolSource(
            pool,
            features=folders,
            scores_root=tmp_path / "s",
            chunk_samples=7,
            max_bad_fraction=0.0,
            progress=False,
        )

    requires = Requirements(features=("dfn_img",))
    rows = np.array([3, 0, 19])
    taken = source(None, tmp_path / "more").take(rows, requires).features["dfn_img"].numpy()
    for row, vector in zip(rows, taken, strict=True):
        np.testing.assert_array_equal(vector, truth["dfn_img"][format_uid(pool.uids[row])])
    with pytest.raises(InputError, match=r"lacks the array 'dfn_img'"):
        source(None).take(rows, requires)
    both = ("dfn_img", "l14_img")  # of a composition, whose members read one each
    assert len(source(None, tmp_path / "more")._fingerprints([both])) == 2


def test_samples_that_a_stage_has_dropped_are_not_unscored(
    pool: Pool, source_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stages = [Uniform(seed=1, fraction=0.5), ClipScore(features="l14", fraction=0.2)]
    source = source_of(pool)
    selection = run_selection(Then(stages=stages), "then", {"p": float("inf")}, source)
    members = selection.manifest["members"]
    assert [member["samples"] for member in members] == [20, 10]
    assert [member["kept_distinct"] for member in members] == [10, 4]
    left = Uniform(seed=1, fraction=0.5).select(source).multiplicities > 0
    unscored = int(left[:2].sum())  # those without features
    assert members[1]["unjudged_samples"] == unscored
    assert selection.manifest["unjudged_samples"] == 0
    assert f"ClipScore: {unscored} of 10 samples have no score" in caplog.text or not unscored
    assert selection.manifest["parameters"] == {"p": "inf"}  # JSON has no such number
    write_selection(selection, Path(pool.root) / "selection")


class EveryOther(Selector):
    """A set function without scores: keeps every other uid, in their order, twice."""

    @property
    def requires(self) -> Requirements:
        return Requirements(features=("l14_img",), captions=True)

    def select(self, source: Source) -> Choice:
        self._captions: dict[int, str] = {}
        multiplicities = np.zeros(len(source), dtype=np.int64)
        rows = np.concatenate([part.rows for part in source.parts(self.requires)])
        for chunk in source.chunks(rows, self.requires):
            self._captions.update(zip(chunk.rows.tolist(), chunk.captions or [], strict=True))
        uids = source.uids[source.index_of(rows)]
        multiplicities[rows[np.lexsort((uids[:, 1], uids[:, 0]))[::2]]] = 2
        return Choice(multiplicities=multiplicities)


def test_set_function_without_scores_is_run(pool: Pool, source_of: Make) -> None:
    selector = EveryOther()
    selection = run(selector, source_of(pool, 4))
    ordered = sorted(tuple(uid.tolist()) for uid in pool.uids[2:])  # those with features
    assert [tuple(uid.tolist()) for uid in selection.uids] == ordered[::2]
    assert selection.multiplicities.tolist() == [2] * 9
    assert selection.manifest["kept_samples"] == 18
    assert selection.manifest["kept_distinct"] == 9
    assert selection.manifest["score_quantiles_pool"] == {}
    assert selector._captions == {row: f"caption of sample {row}" for row in range(2, 20)}


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
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], source_of: Make
) -> None:
    samples = make_samples(6)
    samples[4].caption = b""
    samples[5].caption = b"\xff"
    pool = load_pool(write_pool(samples, shards=3))
    selector = CaptionLength(threshold=1.0)
    before = open_files()
    selection = run(selector, source_of(pool, 1))
    assert len(selection) == 4  # a caption that cannot be read is empty
    assert open_files() == before
    half: Iterator[Chunk] = source_of(pool, 1).chunks(np.arange(6), selector.requires)
    next(half)
    half.close()  # type: ignore[attr-defined]  # a generator that is left half-way
    assert open_files() == before


def test_quantiles_leave_out_nan() -> None:
    summary = summarise(np.array([3, np.nan, 1, 2], np.float32))
    assert (summary["q0"], summary["q50"], summary["q100"]) == (1.0, 2.0, 3.0)
    assert set(summary) == {"q0", "q1", "q10", "q25", "q50", "q75", "q90", "q99", "q100"}
    assert summarise(np.full(3, np.nan, np.float32)) == {}


class Doubled(EveryOther):
    """Weighs what it keeps by its place."""

    weighs = True

    def select(self, source: Source) -> Choice:
        choice = super().select(source)
        weights = (1 + np.arange(len(source))).astype(np.float32)
        return Choice(multiplicities=choice.multiplicities, weights=weights)


def test_weights_are_part_of_the_selection(pool: Pool, source_of: Make) -> None:
    plain = run(EveryOther(), source_of(pool, 4))
    for selector in (Doubled(), Then(stages=[Uniform(seed=1, fraction=1), Doubled()])):
        selection = run(selector, source_of(pool, 4))
        rows = pool.table.find(selection.uids)
        assert selection.weights is not None
        assert selection.weights.tolist() == (rows + 1).tolist()
        assert selection.digest != plain.digest
        assert selection.manifest["weights"] == {
            "min": rows.min() + 1,
            "mean": pytest.approx(rows.mean() + 1),
            "max": rows.max() + 1,
        }
    assert "weights" not in plain.manifest


class Rejecting(ScoreSelector):
    """-inf for every second row, +inf for the first, NaN for the last."""

    def score(self, chunk: Chunk) -> Tensor:
        scores = np.where(chunk.rows % 2, -np.inf, chunk.rows / 20)
        scores[chunk.rows == 0] = np.inf
        scores[chunk.rows == 18] = np.nan
        return torch.from_numpy(scores.astype(np.float32))


def test_a_selection_from_infinite_scores_is_written_and_told(
    pool: Pool, source_of: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    selection = run(Rejecting(fraction=0.9), source_of(pool))
    assert len(selection) == 9
    manifest = selection.manifest
    assert (manifest["never_samples"], manifest["unjudged_samples"]) == (10, 1)
    assert manifest["score_quantiles_pool"] == summarise(np.arange(2, 18, 2, np.float32) / 20)
    assert manifest["score_quantiles_kept"] == manifest["score_quantiles_pool"]
    assert manifest["warnings"] == [
        "Rejecting: 1 of 20 samples have no score and cannot be selected",
        "Rejecting: 10 of 20 samples have the score -inf and are never kept",
        "Rejecting: keeps 9 samples where 18 were asked for: no others can be kept",
    ]
    assert all(text in caplog.text for text in manifest["warnings"])
    write_selection(selection, tmp_path / "written")  # NaN and infinity would be an error


def test_scores_without_a_finite_one_have_no_quantiles() -> None:
    assert summarise(np.array([np.nan, np.inf, -np.inf], np.float32)) == {}


def test_a_warning_is_given_once(pool: Pool, source_of: Make, caplog: Any) -> None:
    source = source_of(pool)
    for _ in range(3):
        source.warn("odd")
        source.restrict(np.arange(3)).warn("odd")
    assert caplog.text.count("odd") == 1
    source.ranks = type("Second", (), {"rank": 1, "size": 2})()
    source.warn("of the first rank alone")
    assert "alone" not in caplog.text


def test_only_what_another_process_kept_counts_as_reused(tmp_path: Path) -> None:
    ours, path = FolderCache(tmp_path), tmp_path / "part.npz"
    assert ours.get("part") is None
    ours.put("part", values=np.arange(3))
    later = FolderCache(tmp_path)
    for memo, reused in ((ours, {}), (later, {"part": path})):
        found = memo.get("part")
        assert found is not None
        assert found["values"].tolist() == [0, 1, 2]
        assert memo.reused == reused
