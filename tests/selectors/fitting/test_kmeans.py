"""Exact nearest vectors, k-means out of core, and the clusters of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from siftclip.errors import InputError
from siftclip.selectors.core.base import FeatureFile
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, DictCache, Requirements, take
from siftclip.selectors.fitting.clusters import ClusterId, GivenCentroids, KMeans, assign_all
from siftclip.selectors.fitting.kmeans import UNIT, assign, fit_kmeans, move_centroids
from siftclip.selectors.kernels import most_similar as module
from siftclip.selectors.kernels.most_similar import most_similar

KEY = "l14_img"


def unit_vectors(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def pool(samples: int = 300, dim: int = 8, seed: int = 0, groups: int = 6) -> Chunk:
    generator = np.random.default_rng(seed)
    centres = unit_vectors(groups, dim, seed)[generator.integers(0, groups, samples)]
    features = torch.nn.functional.normalize(centres + 0.4 * unit_vectors(samples, dim, 99), dim=1)
    return Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=generator.integers(0, 2**63, size=(samples, 2)).astype(np.uint64),
        features={KEY: features.half()},
    )


def source_of(chunk: Chunk, **options: Any) -> MemorySource:
    return MemorySource(chunk, trusted=True, **{"part_samples": 41, "chunk_samples": 16, **options})


def slow_nearest(x: Tensor, others: Tensor, bias: Tensor | None, before: Tensor | None) -> Any:
    indices, products = [], []
    for i in range(len(x)):
        best, index = -float("inf"), -1
        for j in range(len(others) if before is None else min(len(others), int(before[i]))):
            product = float((x[i].double() * others[j].double()).sum())
            product += 0.0 if bias is None else float(bias[j])
            if product > best:
                best, index = product, j
        indices.append(index)
        products.append(best)
    return indices, products


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_before", [False, True])
def test_most_similar_equals_a_loop(
    with_bias: bool, with_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TILE_CPU", 7)
    x, others = unit_vectors(40, 12, 0).half(), unit_vectors(31, 12, 1)
    others[20] = others[3]
    x[:4] = others[3].half()
    bias = torch.rand(31, generator=torch.Generator().manual_seed(2)) if with_bias else None
    before = torch.arange(40) - 2 if with_before else None
    index, product = most_similar(x, others, bias=bias, before=before)
    expected_index, expected_product = slow_nearest(x, others, bias, before)
    assert index.tolist() == expected_index
    np.testing.assert_allclose(product.numpy(), expected_product, rtol=2e-7)


def test_near_ties_respect_bias_and_limit() -> None:
    x = torch.tensor([[1.0, 0.0]])
    others = torch.tensor([[0.5, 0.0], [0.5, 0.0], [1.0, 0.0]])
    index, product = most_similar(x, others, before=torch.tensor([2]))
    assert (index.tolist(), product.tolist()) == ([0], [0.5])  # not the third, which is hidden
    index, product = most_similar(x, others, bias=torch.tensor([2.0, 2.0, 1.0]))
    assert (index.tolist(), product.tolist()) == ([0], [2.5])


@given(
    x=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), max_size=12),
    others=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_equal_products_go_to_the_smaller_index(x: list[Any], others: list[Any]) -> None:
    values, columns = torch.tensor(x).reshape(-1, 3).half(), torch.tensor(others).reshape(-1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_CPU", 4)
        index, product = most_similar(values, columns.float())
    expected_index, expected_product = slow_nearest(values, columns, None, None)
    assert index.tolist() == expected_index
    assert product.tolist() == expected_product


def test_differences_below_float32_rounding_are_decided() -> None:
    x = unit_vectors(200, 64, 0)
    base = unit_vectors(1, 64, 1)
    others = base + 3e-8 * unit_vectors(50, 64, 2)
    index, _ = most_similar(x, others)
    exact = (x.double() @ others.double().T).argmax(1)
    assert torch.equal(index, exact)
    assert not torch.equal((x @ others.T).argmax(1), exact)  # float32 alone would not do


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_other_precisions_of_torch_change_nothing(precision: str) -> None:
    x, others = unit_vectors(300, 64, 0), unit_vectors(200, 64, 1)
    expected = most_similar(x, others)
    torch.set_float32_matmul_precision(precision)
    try:
        index, product = most_similar(x, others)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(index, expected[0])
    assert torch.equal(product, expected[1])


def test_pieces_give_the_same_bits() -> None:
    x, others = unit_vectors(150, 33, 0), unit_vectors(90, 33, 1)
    whole = most_similar(x, others)
    for size in (1, 7, 64):
        pieces = [most_similar(piece, others) for piece in x.split(size)]
        assert torch.equal(torch.cat([piece[0] for piece in pieces]), whole[0])
        assert torch.equal(torch.cat([piece[1] for piece in pieces]), whole[1])


def test_vectors_that_are_not_finite_have_no_nearest() -> None:
    x = torch.tensor([[torch.nan, 1.0], [torch.inf, 0.0], [1.0, 0.0], [0.0, 0.0]])
    index, product = assign(x, torch.eye(2))
    assert index.tolist() == [-1, -1, 0, 0]
    assert product.tolist() == [-torch.inf, -torch.inf, 1.0, 0.0]
    assert assign(x, torch.empty(0, 2))[0].tolist() == [-1, -1, -1, -1]
    assert len(assign(x[:0], torch.eye(2))[0]) == 0


def slow_lloyd(x: np.ndarray, first: np.ndarray, iterations: int, spherical: bool) -> np.ndarray:
    """Textbook iterations in float64; no cluster may become empty."""
    centroids = first.astype(np.float64)
    for _ in range(iterations):
        members: list[list[int]] = [[] for _ in centroids]
        for i, value in enumerate(x):
            near = [
                c @ value if spherical else -np.square(value - c).sum()
                for c in centroids.astype(np.float32).astype(np.float64)
            ]
            members[int(np.argmax(near))].append(i)
        centroids = np.stack([x[own].mean(0) for own in members])
        if spherical:
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids


@pytest.mark.parametrize("spherical", [True, False])
def test_fit_equals_textbook_iterations(spherical: bool) -> None:
    chunk = pool(120)
    # So that the norms of plain means differ.
    chunk.features[KEY].mul_(torch.linspace(0.1, 2, 120)[torch.arange(120) * 7 % 120, None].half())
    source = source_of(chunk)
    options = {"clusters": 5, "seed": 3, "spherical": spherical}
    first = fit_kmeans(source, KEY, iterations=0, **options)
    x = chunk.features[KEY].double().numpy()
    raw = x / np.linalg.norm(x, axis=1, keepdims=True) if spherical else x
    assert all(np.abs(raw - c).max(1).min() < 1e-6 for c in first.numpy()), "samples"
    centroids = fit_kmeans(source, KEY, iterations=6, **options)
    expected = slow_lloyd(x, first.numpy(), 6, spherical)
    np.testing.assert_allclose(centroids.numpy(), expected, atol=1e-6)


def test_centroids_are_the_same_bits_for_ranks_chunks_and_order(run_on_ranks: Any) -> None:
    chunk = pool()
    options = {"clusters": 7, "seed": 0, "sample": 200, "iterations": 5}
    expected = fit_kmeans(source_of(chunk), KEY, **options)
    shuffled = take(chunk, np.random.default_rng(0).permutation(len(chunk)))
    for other in (shuffled, Chunk(rows=chunk.rows, uids=chunk.uids, features=chunk.features)):
        for size in (1, 300):
            source = source_of(other, chunk_samples=size, part_samples=None)
            assert torch.equal(fit_kmeans(source, KEY, **options), expected)
    for size in (2, 4):
        answers = run_on_ranks(
            size, lambda ranks: fit_kmeans(source_of(chunk, ranks=ranks), KEY, **options)
        )
        assert all(torch.equal(answer, expected) for answer in answers)


def test_rows_do_not_matter_but_uids_and_seed_do() -> None:
    chunk = pool()
    moved = Chunk(rows=chunk.rows[::-1].copy(), uids=chunk.uids, features=chunk.features)
    first = fit_kmeans(source_of(chunk), KEY, clusters=7, seed=0)
    assert torch.equal(fit_kmeans(source_of(moved), KEY, clusters=7, seed=0), first)
    assert not torch.equal(fit_kmeans(source_of(chunk), KEY, clusters=7, seed=1), first)


@pytest.mark.parametrize("spherical", [True, False])
def test_unusable_samples_are_in_no_statistic(spherical: bool) -> None:
    chunk = pool(100)
    features = torch.cat([chunk.features[KEY], torch.zeros(30, 8).half()])
    features[100:110], features[110:120] = torch.nan, torch.inf
    uids = np.random.default_rng(1).integers(0, 2**63, size=(130, 2)).astype(np.uint64)
    uids[:100] = chunk.uids
    more = Chunk(rows=np.arange(130), uids=uids, features={KEY: features})
    options = {"clusters": 9, "seed": 0, "spherical": spherical}
    expected = fit_kmeans(source_of(chunk), KEY, **options)
    assert torch.equal(fit_kmeans(source_of(more), KEY, **options), expected)


def test_a_sample_is_all_that_is_read_of_the_pool() -> None:
    chunk = pool(100)
    seen: set[int] = set()

    class Recorder(MemorySource):
        def take(self, rows: np.ndarray, requires: Requirements) -> Chunk:
            seen.update(rows.tolist())
            return super().take(rows, requires)

    fit_kmeans(Recorder(chunk), KEY, clusters=5, seed=0, sample=30)
    assert len(seen) == 30


def test_an_empty_cluster_splits_the_largest() -> None:
    old = torch.eye(4)[:3]
    sums = (torch.tensor([[6.0, 0, 0, 6], [0, 0, 0, 0], [0, 0, 3, 0]]) / UNIT).to(torch.int64)
    counts = torch.tensor([6, 0, 3])
    plain = move_centroids(old, sums, counts, spherical=False)
    step = 1 / 1024
    assert plain[0].tolist() == [1 - step, 0, 0, 1 + step]
    assert plain[1].tolist() == [1 + step, 0, 0, 1 - step]
    assert plain[2].tolist() == [0, 0, 1, 0]
    assert torch.allclose(
        move_centroids(old, sums, counts, spherical=True).norm(dim=1), torch.ones(3)
    )


def test_several_empty_clusters_split_what_is_largest_by_then() -> None:
    """8 samples become 4 + 4, then the first 4 become 2 + 2, the other 4, and the first 2."""
    sums = torch.zeros(5, 2, dtype=torch.int64)
    sums[0] = (torch.tensor([8.0, 16.0]) / UNIT).to(torch.int64)
    found = move_centroids(torch.zeros(5, 2), sums, torch.tensor([8, 0, 0, 0, 0]), spherical=False)
    up = torch.tensor([1 + 1 / 1024, 1 - 1 / 1024])
    down = 2 - up
    mean = torch.tensor([1.0, 2.0])
    first, second = mean * down, mean * up
    expected = [first * down * down, second * down, first * up, second * up, first * down * up]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)


def test_a_mean_of_zero_keeps_the_spherical_centroid() -> None:
    new = move_centroids(
        torch.eye(2), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 1]), spherical=True
    )
    assert torch.equal(new, torch.eye(2))


@pytest.mark.parametrize("spherical", [True, False])
def test_equal_samples_and_few_samples(spherical: bool) -> None:
    chunk = pool(12)
    chunk.features[KEY][:] = chunk.features[KEY][0]
    centroids = fit_kmeans(source_of(chunk), KEY, clusters=5, seed=0, spherical=spherical)
    assert centroids.shape == (5, 8)
    assert bool(centroids.isfinite().all())
    few = fit_kmeans(source_of(pool(3)), KEY, clusters=5, seed=0, spherical=spherical)
    assert few.shape == (3, 8)
    one = fit_kmeans(source_of(pool(1)), KEY, clusters=1, seed=0, spherical=spherical)
    assert torch.allclose(one, pool(1).features[KEY].float(), atol=1e-3)
    nothing = take(pool(3), np.arange(0))
    assert len(fit_kmeans(source_of(nothing), KEY, clusters=5, seed=0)) == 0


def test_large_components_are_refused() -> None:
    chunk = pool(5)
    chunk.features[KEY][2, 1] = 2000
    with pytest.raises(InputError, match=r"at most 1024 .* Got 2000; scale them"):
        fit_kmeans(source_of(chunk), KEY, clusters=2, seed=0, spherical=False)


class Killed(Exception):
    pass


class KeptSource(MemorySource):
    """Keeps caches, and dies after some takes."""

    def __init__(
        self, caches: dict[str, DictCache], takes: int, *args: Any, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.caches, self.takes, self.taken = caches, takes, 0

    def cache(self, selector: object) -> DictCache:
        return self.caches.setdefault(repr(type(selector)), DictCache())

    def take(self, rows: np.ndarray, requires: Requirements) -> Chunk:
        self.taken += 1
        if self.taken > self.takes:
            raise Killed
        return super().take(rows, requires)


def test_a_killed_run_continues() -> None:
    chunk, options = pool(), {"clusters": 7, "seed": 0, "iterations": 6}
    expected = fit_kmeans(MemorySource(chunk), KEY, **options)
    caches: dict[str, DictCache] = {}
    with pytest.raises(Killed):
        KMeans(**options).centroids(
            KeptSource(caches, 4, chunk), KEY
        )  # the first centroids, 3 iterations
    again = KeptSource(caches, 99, chunk)
    assert torch.equal(KMeans(**options).centroids(again, KEY), expected)
    assert again.taken == 3
    finished = KeptSource(caches, 0, chunk)
    assert torch.equal(KMeans(**options).centroids(finished, KEY), expected)


def test_clusters_of_all_samples_on_all_ranks(run_on_ranks: Any) -> None:
    chunk = pool()
    chunk.features[KEY][17] = torch.nan
    clustering = KMeans(clusters=7, seed=0, iterations=3)
    centroids, clusters, products = assign_all(source_of(chunk), KEY, clustering)
    index, product = assign(chunk.features[KEY], centroids)
    assert clusters.tolist() == index.tolist()
    assert clusters[17] == -1
    assert products[17] == 0
    product[17] = 0
    np.testing.assert_array_equal(products, product.numpy())
    for answer in run_on_ranks(
        3, lambda ranks: assign_all(source_of(chunk, ranks=ranks), KEY, clustering)
    ):
        for ours, theirs in zip(answer, (centroids, clusters, products), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    selector = ClusterId(key=KEY, clustering=clustering, threshold=3)
    scores = selector.select(source_of(chunk)).scores
    assert scores is not None
    np.testing.assert_array_equal(np.nan_to_num(scores, nan=-1), clusters)
    assert np.isnan(scores[17])


def test_given_centroids_must_be_finite() -> None:
    file = FeatureFile(path="centroids.npy")
    source = MemorySource(pool(), files={file: torch.tensor([[torch.nan] * 8])})
    with pytest.raises(InputError, match=r"centroids in centroids\.npy must be finite"):
        GivenCentroids(file=file).centroids(source, KEY)
