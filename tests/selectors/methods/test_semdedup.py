"""SemDeDup against a loop over pairs, and against planted duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from siftclip.errors import InputError
from siftclip.hashing import uniform_score
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, take
from siftclip.selectors.fitting.clusters import KMeans, assign_all
from siftclip.selectors.methods import semdedup as module
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.semdedup import SemDeDup, largest_earlier_similarity

KEY = "l14_img"
CLUSTERING = KMeans(clusters=5, seed=0, iterations=2)


def pool(samples: int = 120, seed: int = 0) -> Chunk:
    """Random unit vectors in 6 dimensions, of which the last fifth repeats others exactly."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((samples, 6))
    values[-samples // 5 :] = values[: samples // 5]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    other = generator.standard_normal((samples, 6))
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=generator.integers(0, 2**63, size=(samples, 2)).astype(np.uint64),
        features={
            KEY: torch.from_numpy(values.astype(np.float16)),
            "l14_txt": torch.from_numpy(other.astype(np.float16)),
        },
    )


def slow_scores(chunk: Chunk, lateness: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Minus the largest cosine with a sample of the cluster that comes earlier, pair by pair."""
    x = chunk.features[KEY].double().numpy()
    keys = [(float(lateness[i]), *map(int, chunk.uids[i])) for i in range(len(x))]
    scores = np.full(len(x), np.nan)
    for i in np.flatnonzero(clusters >= 0):
        earlier = [
            float(x[i] @ x[j]) for j in np.flatnonzero(clusters == clusters[i]) if keys[j] < keys[i]
        ]
        scores[i] = -max([0.0, *earlier])
    return scores


def test_largest_earlier_similarity_equals_a_triangle() -> None:
    x = torch.nn.functional.normalize(
        torch.randn(70, 5, generator=torch.Generator().manual_seed(0)), dim=1
    )
    x[40] = x[2]
    expected = torch.triu(x @ x.T, diagonal=1).amax(0)
    for block in (1, 7, 70, 8192):
        ours = largest_earlier_similarity(x, block=block)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    assert len(largest_earlier_similarity(x[:0])) == 0
    assert largest_earlier_similarity(x[:1]).tolist() == [0.0]


@pytest.mark.parametrize("keep", ["hard", "easy", "random", "best"])
def test_equals_a_loop_over_pairs(
    keep: str, run_on_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TASK_SAMPLES", 30)
    chunk = pool()
    chunk.features[KEY][9] = torch.nan
    prefer = ClipScore(features="l14", fraction=0.5) if keep == "best" else None
    _, clusters, products = assign_all(MemorySource(chunk), KEY, CLUSTERING)
    lateness = {"hard": products, "easy": -products, "random": uniform_score(chunk.uids, 4)}
    if prefer is not None:
        lateness["best"] = -np.nan_to_num(prefer.scores(MemorySource(chunk)), nan=-9)
    expected = slow_scores(chunk, lateness[keep], clusters)

    def run(ranks: Any, chunk_samples: int = 17) -> Any:
        source = MemorySource(chunk, part_samples=50, chunk_samples=chunk_samples, ranks=ranks)
        selector = SemDeDup(
            key=KEY, clustering=CLUSTERING, eps=0.1, keep=keep, prefer=prefer, seed=4
        )
        return selector.select(source)

    first = run_on_ranks(1, run)[0]
    np.testing.assert_allclose(first.scores, expected, atol=1e-6)
    assert first.multiplicities.tolist() == (expected >= -0.9).astype(int).tolist()
    assert 60 < first.multiplicities.sum() < 100  # 24 exact repeats and some near ones are gone
    for size, samples in ((2, 17), (4, 9), (1, 999)):
        for choice in run_on_ranks(size, lambda ranks, n=samples: run(ranks, n)):
            np.testing.assert_array_equal(choice.scores, first.scores)
            np.testing.assert_array_equal(choice.multiplicities, first.multiplicities)


def test_order_of_samples_does_not_matter() -> None:
    chunk = pool()
    shuffled = take(chunk, np.random.default_rng(5).permutation(len(chunk)))
    moved = Chunk(rows=chunk.rows, uids=shuffled.uids, features=shuffled.features)
    for keep in ("hard", "random"):
        selector = SemDeDup(key=KEY, clustering=CLUSTERING, fraction=0.4, keep=keep)
        kept = selector.select(MemorySource(chunk, part_samples=33)).multiplicities
        other = selector.select(MemorySource(moved)).multiplicities
        assert kept.sum() == other.sum() == 48
        assert {tuple(uid) for uid in chunk.uids[kept > 0].tolist()} == {
            tuple(uid) for uid in moved.uids[other > 0].tolist()
        }


def test_exactly_one_of_equal_samples_stays() -> None:
    chunk = pool(50)
    chunk.features[KEY][:] = chunk.features[KEY][0]
    selector = SemDeDup(key=KEY, clustering=CLUSTERING, eps=0.01)
    kept = selector.select(MemorySource(chunk, chunk_samples=7)).multiplicities
    assert np.flatnonzero(kept).tolist() == [np.lexsort(chunk.uids.T[::-1])[0]]


def test_few_samples() -> None:
    selector = SemDeDup(key=KEY, clustering=CLUSTERING, fraction=1.0)
    for samples in (0, 1, 2):
        chunk = take(pool(), np.arange(samples))
        assert selector.select(MemorySource(chunk)).multiplicities.tolist() == [1] * samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"exactly one of eps and fraction"),
        ({"eps": 0.1, "fraction": 0.1}, r"exactly one of eps and fraction"),
        ({"eps": 0.0}, r"eps must be a number in the range \(0, 1\]\. Got 0\.0"),
        ({"eps": 0.1, "keep": "most"}, r"keep must be one of hard, easy, random, best"),
        ({"eps": 0.1, "keep": "best"}, r"prefer belongs to keep"),
    ],
)
def test_faulty_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SemDeDup(key=KEY, clustering=CLUSTERING, **options)


@pytest.mark.testbed
def test_finds_the_planted_duplicates(reference: Any, reference_source: Any) -> None:
    """`neardup` marks copies with a little noise; 344 of the 355 have their original in the pool.

    A copy and its original have a cosine of 0.9987, everything else at most 0.95. One pair of them
    lies in two of these clusters.
    """
    inputs = reference("inputs_l14")
    x = torch.from_numpy(inputs["img"]).float()
    cosines = x @ x.T
    cosines.fill_diagonal_(-1)
    paired = (cosines.amax(1) > 0.95).numpy()
    selector = SemDeDup(key=KEY, clustering=KMeans(clusters=100, seed=0, iterations=3), eps=0.05)
    removed = selector.select(reference_source(inputs, "l14")).multiplicities == 0
    assert removed[~paired].sum() == 0  # precision 1
    assert (inputs["neardup"] & paired).sum() == 344
    assert removed.sum() == 343  # recall 0.997
    cosines[:, removed] = -1
    assert (cosines[removed].amax(1) > 0.95).all()  # one of each group stays


def test_requires_what_its_preference_requires() -> None:
    selector = SemDeDup(
        key="dino_img",
        clustering=KMeans(clusters=2, seed=0),
        eps=0.1,
        keep="best",
        prefer=ClipScore(features="l14", fraction=1),
    )
    assert selector.requires.features == ("dino_img", "l14_img", "l14_txt")
