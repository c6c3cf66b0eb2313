"""Density-based pruning: distances, the quadratic program, and the choice within clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.selectors.core.checks import synthetic_chunk
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Requirements, take
from siftclip.selectors.fitting.clusters import KMeans, assign_all
from siftclip.selectors.methods.density import (
    DensityPruning,
    allocate,
    centroid_distances,
    cluster_shares,
    keep_quotas,
    mean_distances,
)

KEY = "l14_img"
REQUIRES = Requirements(features=(KEY,))


def test_centroid_distances_equal_a_loop() -> None:
    centroids = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    unit = (centroids / centroids.norm(dim=1, keepdim=True)).double().numpy()
    expected = []
    for i in range(30):
        cosines = sorted((float(unit[i] @ unit[j]) for j in range(30) if j != i), reverse=True)
        expected.append(np.mean([1 - c for c in cosines[:4]]))
    np.testing.assert_allclose(centroid_distances(centroids, neighbours=4), expected, atol=1e-6)
    assert centroid_distances(centroids[:1]).tolist() == [0.0]
    two = centroid_distances(centroids[:2])
    np.testing.assert_allclose(two, 1 - unit[0] @ unit[1], atol=1e-6)


def test_mean_distances_equal_a_loop() -> None:
    clusters = np.array([0, 2, 2, -1, 0, 2], dtype=np.int32)
    cosines = np.array([0.5, 0.25, 0.75, 9, 0.9, 0.5], dtype=np.float32)
    np.testing.assert_allclose(mean_distances(clusters, cosines, 4), [0.3, 0, 0.5, 0], atol=1e-7)


def test_shares_are_a_softmax() -> None:
    complexity = np.array([0.1, 0.4, 0.2])
    expected = torch.tensor(complexity / 0.05).softmax(0).numpy()
    np.testing.assert_allclose(cluster_shares(complexity, 0.05), expected, rtol=1e-12)
    assert cluster_shares(np.array([1.0, 0.0]), 1e-6).tolist() == [1.0, 0.0]
    assert len(cluster_shares(np.empty(0), 1.0)) == 0


@st.composite
def programs(draw: Any) -> tuple[np.ndarray, np.ndarray, int, int]:
    sizes = np.array(draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)))
    weights = np.array(draw(st.lists(st.integers(1, 20), min_size=len(sizes), max_size=len(sizes))))
    minimum = draw(st.integers(0, 3))
    least = int(np.clip(sizes - 1, 0, minimum).sum())
    return weights / weights.sum(), sizes, draw(st.integers(least, int(sizes.sum()))), minimum


@given(program=programs())
@settings(max_examples=150, deadline=None)
def test_allocation_solves_the_quadratic_program(program: Any) -> None:
    """The exact solution moves by less than one, and no unit can be moved to better effect."""
    shares, sizes, total, minimum = program
    counts = allocate(shares, sizes, total, minimum=minimum)
    lower = np.clip(sizes - 1, 0, minimum)
    assert counts.sum() == total
    assert (counts >= lower).all()
    assert (counts <= sizes).all()
    excess = counts - shares * total
    # Convex and separable: a move of one unit from i to j changes the cost by
    # 2 (excess_j - excess_i) + 2, so that a whole-number optimum has no negative one.
    for i in np.flatnonzero(counts > lower):
        for j in np.flatnonzero(counts < sizes):
            assert i == j or excess[j] - excess[i] + 1 >= -1e-6


def test_allocation_without_bounds_in_reach_is_the_shares() -> None:
    shares = np.array([0.5, 0.3, 0.2])
    assert allocate(shares, np.array([99, 99, 99]), 10).tolist() == [5, 3, 2]
    # The first is capped; what is missing is spread evenly, not in proportion.
    assert allocate(shares, np.array([1, 99, 99]), 10).tolist() == [1, 5, 4]
    assert allocate(np.array([1.0, 0.0]), np.array([50, 50]), 10).tolist() == [9, 1]
    assert allocate(np.full(3, 1 / 3), np.array([5, 5, 5]), 4).tolist() == [2, 1, 1]
    assert allocate(np.empty(0), np.empty(0, np.int64), 0).tolist() == []


def test_allocation_of_many_clusters_keeps_its_optimality() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 3000, 2000)
    shares = cluster_shares(generator.random(2000), 0.2)
    total = int(sizes.sum() * 0.4)
    counts = allocate(shares, sizes, total)
    free = (counts > 1) & (counts < sizes)
    levels = (shares * total - counts)[free]
    assert counts.sum() == total
    assert free.sum() > 100
    assert np.ptp(levels) <= 1  # one level for all, up to rounding
    assert (shares * total - counts)[counts == sizes].min() >= levels.min() - 1


def test_minima_that_do_not_fit() -> None:
    with pytest.raises(
        InputError, match=r"minimum is too large: .* 3 clusters do not fit into 14 samples. Got 5"
    ):
        allocate(np.full(3, 1 / 3), np.array([9, 9, 9]), 14, minimum=5)


def test_quotas_take_the_first_and_ties_by_uid() -> None:
    clusters = np.array([1, 0, 1, 1, -1, 0], dtype=np.int32)
    order = np.array([0.5, 0.1, 0.5, 0.7, 0.0, 0.3], dtype=np.float32)
    uids = np.array([[0, 9], [0, 1], [0, 3], [0, 0], [0, 2], [0, 5]], dtype=np.uint64)
    kept = [
        keep_quotas(clusters, order, uids, np.array(q)).tolist() for q in ([1, 1], [9, 2], [0, 0])
    ]
    assert kept == [[0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1], [0] * 6]


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_selection_on_every_rank(keep: str, run_on_ranks: Any) -> None:
    chunk = synthetic_chunk(REQUIRES)
    chunk.features[KEY][5] = torch.nan
    clustering = KMeans(clusters=6, seed=0, iterations=3, spherical=False)
    options = {"fraction": 0.3, "temperature": 0.05, "keep": keep}
    centroids, clusters, _ = assign_all(MemorySource(chunk), KEY, clustering)
    cosines = torch.nn.functional.cosine_similarity(
        chunk.features[KEY].float(), centroids[torch.from_numpy(clusters).long().clamp(min=0)]
    ).numpy()
    complexity = centroid_distances(centroids) * mean_distances(clusters, cosines, 6)
    sizes = np.bincount(clusters[clusters >= 0], minlength=6)
    quotas = allocate(cluster_shares(complexity, 0.05), sizes, 77)

    def run(ranks: Any) -> np.ndarray:
        source = MemorySource(chunk, part_samples=40, chunk_samples=50, ranks=ranks)
        return (
            DensityPruning(key=KEY, clustering=clustering, **options).select(source).multiplicities
        )

    (first,) = run_on_ranks(1, run)
    assert first.sum() == 77
    assert np.bincount(clusters[first > 0], minlength=6).tolist() == quotas.tolist()
    if keep != "random":
        sign = 1 if keep == "hard" else -1
        for cluster in range(6):
            inside, own = clusters == cluster, sign * cosines
            assert own[inside & (first > 0)].max() <= own[inside & (first == 0)].min()
    for size in (2, 4):
        assert all(np.array_equal(answer, first) for answer in run_on_ranks(size, run))


def test_few_samples_and_all_samples() -> None:
    chunk = synthetic_chunk(REQUIRES, samples=30)
    chunk.features[KEY][5] = 0
    clustering = KMeans(clusters=4, seed=0)
    everything = DensityPruning(key=KEY, clustering=clustering, fraction=1.0)
    kept = everything.select(MemorySource(chunk)).multiplicities
    assert kept.sum() == 29
    assert kept[5] == 0
    for samples in (0, 1, 2):
        few = MemorySource(take(chunk, np.arange(samples)))
        assert everything.select(few).multiplicities.sum() == samples
    half = DensityPruning(key=KEY, clustering=clustering, fraction=0.5, of="left")
    part = MemorySource(chunk).restrict(np.arange(20))
    assert half.select(part).multiplicities.sum() == 10
    of_pool = DensityPruning(key=KEY, clustering=clustering, fraction=0.5)
    assert of_pool.select(part).multiplicities.sum() == 15
    each = DensityPruning(key=KEY, clustering=clustering, fraction=0.1, minimum=20)
    with pytest.raises(InputError, match=r"^DensityPruning: minimum is too large"):
        each.select(MemorySource(chunk))


def test_faulty_options() -> None:
    with pytest.raises(InputError, match=r"temperature must be above 0\. Got 0"):
        DensityPruning(key=KEY, clustering=KMeans(clusters=4, seed=0), fraction=0.5, temperature=0)
