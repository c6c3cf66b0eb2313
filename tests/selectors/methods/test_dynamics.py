"""DynamiCS: quotas of clusters, and the samples that fill them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import SubBatch
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk
from siftclip.selectors.methods.dynamics import (
    DynamicClusterSampling,
    power_quotas,
    sample_clusters,
)


def make_uids(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, (samples, 2)).astype(np.uint64)


def source_of(clusters: list[float], *, epoch: int = 0, **options: Any) -> MemorySource:
    samples = len(clusters)
    chunk = Chunk(
        rows=np.arange(samples), uids=make_uids(samples, epoch), column=np.array(clusters, float)
    )
    return MemorySource(chunk, **options)


def make(**parameters: Any) -> DynamicClusterSampling:
    return DynamicClusterSampling(path=None, column="cluster", seed=1, **parameters)


def test_contract() -> None:
    check_selector(make)
    check_selector(lambda: make(fraction=0.3, alpha=0.2, max_repeats=2))


def slow_quotas(sizes: list[int], total: int, alpha: float, max_repeats: int) -> list[int]:
    limits = [size * max_repeats for size in sizes]
    if total >= sum(limits):
        return limits
    full: set[int] = set()
    while True:
        weight = sum(size**alpha for i, size in enumerate(sizes) if i not in full)
        left = total - sum(limits[i] for i in full)
        shares = {i: left * size**alpha / weight for i, size in enumerate(sizes) if i not in full}
        more = {i for i, share in shares.items() if share >= limits[i]}
        if not more:
            break
        full |= more
    quotas = [limits[i] if i in full else int(shares[i]) for i in range(len(sizes))]
    ranking = sorted(shares, key=lambda i: (-round(shares[i] % 1, 9), -sizes[i], i))
    for i in ranking[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


cluster_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(
    sizes=cluster_sizes,
    alpha=st.sampled_from([0.1, 0.37, 0.5, 1.0]),
    max_repeats=st.integers(1, 5),
    fraction=st.floats(0, 1),
)
def test_quotas(sizes: list[int], alpha: float, max_repeats: int, fraction: float) -> None:
    total = int(sum(sizes) * fraction)
    quotas = power_quotas(np.array(sizes), total, alpha=alpha, max_repeats=max_repeats)
    assert quotas.dtype == np.int64
    assert quotas.sum() == total
    assert (quotas >= 0).all()
    assert (quotas <= np.array(sizes) * max_repeats).all()
    for size, quota in zip(sizes, quotas, strict=True):  # their order is kept
        for other, its in zip(sizes, quotas, strict=True):
            assert size <= other or quota >= its
    # rounding may decide otherwise between remainders that are equal but for it
    expected = slow_quotas(sizes, total, alpha, max_repeats)
    assert np.abs(quotas - expected).max() <= 1
    assert sorted(quotas.tolist()) == sorted(expected)


def test_quotas_by_hand() -> None:
    sizes = np.array([100, 1, 25, 4])
    assert power_quotas(sizes, 54, alpha=0.5, max_repeats=9).tolist() == [30, 3, 15, 6]
    # 29.4, 2.9, 14.7, 5.9
    assert power_quotas(sizes, 53, alpha=0.5, max_repeats=9).tolist() == [29, 3, 15, 6]
    # the second can only give 1 and the last 4, and 10 : 5 of the rest is 32.7, 16.3 or 33.3, 16.7
    assert power_quotas(sizes, 54, alpha=0.5, max_repeats=1).tolist() == [33, 1, 16, 4]
    assert power_quotas(sizes, 55, alpha=0.5, max_repeats=1).tolist() == [33, 1, 17, 4]
    assert power_quotas(sizes, 1000, alpha=0.5, max_repeats=2).tolist() == [200, 2, 50, 8]
    assert power_quotas(sizes, 130, alpha=1.0, max_repeats=3).tolist() == [100, 1, 25, 4]
    # 1.7, 5.3: the remainder of a cluster at its limit does not count
    assert power_quotas(np.array([1, 10]), 7, alpha=0.5, max_repeats=1).tolist() == [1, 6]
    # 0.5, 1.5: of equal remainders, the larger cluster comes first
    assert power_quotas(np.array([1, 3]), 2, alpha=1.0, max_repeats=1).tolist() == [0, 2]
    assert power_quotas(sizes[:0], 7, alpha=0.5, max_repeats=2).tolist() == []


@given(seed=st.integers(0, 10_000), clusters=st.integers(1, 6))
def test_samples_fill_the_quotas_evenly(seed: int, clusters: int) -> None:
    generator = np.random.default_rng(seed)
    names = np.concatenate([np.arange(clusters), generator.integers(0, clusters, 40)])
    quotas = generator.integers(0, 40, clusters)
    kept = sample_clusters(names, make_uids(len(names), seed), quotas, seed=3)
    for cluster, quota in enumerate(quotas):
        own = kept[names == cluster]
        assert own.sum() == quota
        assert own.max() - own.min() <= 1


def test_each_sample_is_drawn_as_often_as_the_others() -> None:
    names = np.array([0] * 6 + [1] * 4)
    counts = np.zeros(10)
    draws = 2000
    for epoch in range(draws):
        counts += sample_clusters(names, make_uids(10, epoch), np.array([2, 6]), seed=0)
    expected = np.array([1 / 3] * 6 + [1.5] * 4)
    assert np.abs(counts / draws - expected).max() < 4.5 * np.sqrt(0.25 / draws)


def test_alpha_1_keeps_every_sample_once() -> None:
    clusters = np.random.default_rng(0).integers(0, 7, 100).astype(float).tolist()
    assert make(alpha=1.0).select(source_of(clusters)).multiplicities.tolist() == [1] * 100


def test_large_clusters_give_less_and_epochs_differ() -> None:
    clusters = [0.0] * 900 + [5.0] * 90 + [2.5] * 10
    choice = make(alpha=0.5).select(source_of(clusters))
    counts = [int(choice.multiplicities[a:b].sum()) for a, b in ((0, 900), (900, 990), (990, 1000))]
    # in proportion to 30, 9.487, 3.162: 703.4, 222.4, 74.1, and the second remainder is the largest
    assert counts == [703, 223, 74]
    assert choice.scores is not None
    assert choice.scores.dtype == np.float32
    np.testing.assert_allclose(choice.scores[[0, 900, 990]], [703 / 900, 223 / 90, 7.4], rtol=1e-6)
    assert choice.multiplicities[:900].max() == 1
    again = make(alpha=0.5).select(source_of(clusters)).multiplicities
    np.testing.assert_array_equal(again, choice.multiplicities)
    later = make(alpha=0.5).select(source_of(clusters, epoch=1)).multiplicities
    assert (later != choice.multiplicities).any()
    assert later[:900].sum() == 703


def test_samples_without_cluster_are_left_out_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nan = float("nan")
    with caplog.at_level(logging.WARNING):
        choice = make(max_repeats=1).select(source_of([1.0, nan, 1.0, 2.0, nan]))
    assert "2 of 5 samples have no cluster and are left out" in caplog.text
    assert choice.multiplicities.tolist() == [1, 0, 1, 1, 0]
    assert choice.scores is not None
    assert np.isnan(choice.scores).tolist() == [False, True, False, False, True]
    assert make().select(source_of([nan, nan])).multiplicities.tolist() == [0, 0]


def test_fraction_is_of_the_whole_pool() -> None:
    source = source_of([float(i % 3) for i in range(40)])
    choice = make(fraction=0.3).select(source.restrict(np.arange(0, 40, 2)))
    assert choice.multiplicities.shape == (20,)
    assert choice.multiplicities.sum() == 12


def test_ranks_choose_alike(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]],
) -> None:
    clusters = np.random.default_rng(1).integers(0, 9, 90).astype(float).tolist()

    def decide(ranks: Ranks) -> list[int]:
        source = source_of(clusters, ranks=ranks, part_samples=9)
        return make(alpha=0.3).select(source).multiplicities.tolist()

    answers = [answer for size in (1, 2, 4) for answer in run_on_ranks(size, decide)]
    assert all(answer == answers[0] for answer in answers)


def test_wrong_parameters() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"alpha": 0}, r"alpha must be a number in the range \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction must be a number in the range \(0, 1\]"),
        ({"max_repeats": 0}, r"max_repeats must be an integer of at least 1. Got 0"),
    ]
    for parameters, message in wrong:
        with pytest.raises(InputError, match=message):
            make(**parameters)
    with pytest.raises(InputError, match=r"path must end in .parquet or .npy, or be null. Got 'x'"):
        DynamicClusterSampling(path="x", column="c", seed=0)
    with pytest.raises(InputError, match=r"decides by itself how many samples it keeps"):
        make().draw(source_of([1.0]), SubBatch(samples=1))
