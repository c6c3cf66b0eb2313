"""Quotas per cluster, against twins written as loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from siftclip.errors import InputError
from siftclip.selectors.core.base import ScoreSelector
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.compose import And
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import AsGiven, keep_top
from siftclip.selectors.core.source import Chunk
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.external import External
from siftclip.selectors.methods.quota import (
    QuotaPerCluster,
    equal_quotas,
    keep_top_of_each,
    proportional_quotas,
)
from siftclip.selectors.methods.uniform import Uniform

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6)


class Given(ScoreSelector):
    """Scores of a test, by row."""

    def __init__(self, values: Any) -> None:
        super().__init__(rule=AsGiven())
        self.values = np.asarray(values, dtype=np.float32)

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(self.values[chunk.rows])


def proportional_slowly(sizes: list[int], total: int) -> list[int]:
    samples = sum(sizes)
    if total >= samples:
        return sizes
    shares = [Fraction(size * total, samples) for size in sizes]
    quotas = [math.floor(share) for share in shares]
    order = sorted(range(len(sizes)), key=lambda c: (quotas[c] - shares[c], -sizes[c], c))
    for c in order[: total - sum(quotas)]:
        quotas[c] += 1
    return quotas


def equal_slowly(sizes: list[int], total: int) -> list[int]:
    """Deal rounds of one to all that have room; the last round begins with the largest."""
    quotas = [0] * len(sizes)
    while total > 0:
        room = [c for c in range(len(sizes)) if quotas[c] < sizes[c]]
        if not room:
            break
        for c in sorted(room, key=lambda c: (-sizes[c], c))[:total]:
            quotas[c] += 1
        total -= min(total, len(room))
    return quotas


@given(SIZES, st.integers(0, 80))
def test_quotas_equal_slow_twins(sizes: list[int], total: int) -> None:
    array = np.array(sizes, dtype=np.int64)
    for share, slowly in (
        (proportional_quotas, proportional_slowly),
        (equal_quotas, equal_slowly),
    ):
        quotas = share(array, total)
        assert quotas.tolist() == slowly(sizes, total)
        assert quotas.sum() == min(total, sum(sizes))
        assert (quotas <= array).all()


def test_proportional_quotas_of_a_large_pool_do_not_overflow() -> None:
    sizes = np.array([1_300_000_000, 100_000_000], dtype=np.int64)
    assert proportional_quotas(sizes, 700_000_000).tolist() == [650_000_000, 50_000_000]


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, -0.5, math.inf, -9.0]), st.integers(0, 3)),
        min_size=1,
        max_size=25,
    ),
    st.integers(0, 99),
    st.data(),
)
def test_keep_top_of_each_equals_keep_top_of_every_cluster(
    samples: list[tuple[float, int]], seed: int, data: st.DataObject
) -> None:
    scores = np.array([score for score, _ in samples], dtype=np.float32)
    clusters = np.array([cluster for _, cluster in samples])
    numbers = np.random.default_rng(seed).permutation(len(samples)).astype(np.uint64)
    uids = np.stack([numbers // 2, numbers % 2], axis=1).astype(np.uint64)
    sizes = np.bincount(clusters, minlength=4)
    quotas = np.array([data.draw(st.integers(0, int(size))) for size in sizes])
    expected = np.zeros(len(samples), dtype=np.int64)
    for cluster, quota in enumerate(quotas):
        members = np.flatnonzero(clusters == cluster)
        expected[members] = keep_top(scores[members], uids[members], int(quota))
    kept = keep_top_of_each(scores, uids, clusters, quotas)
    assert kept.dtype == np.int64
    assert kept.tolist() == expected.tolist()


def make_source(samples: int, **options: Any) -> MemorySource:
    uids = np.stack([np.arange(samples), np.arange(samples)[::-1]], axis=1).astype(np.uint64)
    return MemorySource(Chunk(rows=np.arange(samples), uids=uids), **options)


SCORES = [9.0, 8, 7, 6, 5, 4, 3, 2, np.nan, 1]
CLUSTERS = [0.0, 0, 0, 0, 0, 0, 7, 7, 7, np.nan]  # scored: six of cluster 0 and two of cluster 7


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"fraction": 0.4}, [0, 1, 2, 6]),  # 4 of the pool's 10, by 3 : 1
        ({"fraction": 0.4, "quotas": "equal"}, [0, 1, 6, 7]),
        ({"count": 6, "quotas": "equal"}, [0, 1, 2, 3, 6, 7]),  # cluster 7 hands on one
        ({"count": 0}, []),
        ({"count": 99}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"per_cluster": 1}, [0, 6]),
        ({"per_cluster": 3}, [0, 1, 2, 6, 7]),
    ],
)
def test_selector_shares_the_total(parameters: dict[str, Any], kept: list[int]) -> None:
    selector = QuotaPerCluster(selector=Given(SCORES), clusters=Given(CLUSTERS), **parameters)
    choice = selector.select(make_source(10))
    assert np.flatnonzero(choice.multiplicities).tolist() == kept
    np.testing.assert_array_equal(choice.scores, np.array(SCORES, dtype=np.float32))


def test_fractions_of_the_pool_or_of_what_is_left() -> None:
    left = make_source(20).restrict(np.arange(10))
    for of, kept in (("pool", 8), ("left", 4)):
        selector = QuotaPerCluster(
            selector=Given(SCORES), clusters=Given(CLUSTERS), fraction=0.4, of=of
        )
        assert selector.select(left).multiplicities.sum() == kept


def test_nothing_scored_keeps_nothing() -> None:
    nothing = Given([np.nan] * 3)
    for quotas in ("equal", "proportional"):
        selector = QuotaPerCluster(
            selector=nothing, clusters=Given([0, 1, 1]), fraction=0.5, quotas=quotas
        )
        assert selector.select(make_source(3)).multiplicities.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "exactly one of fraction, count and per_cluster"),
        ({"count": 1, "fraction": 0.5}, "exactly one of"),
        ({"count": -1}, "count must be an integer of at least 0"),
        ({"per_cluster": 0}, "per_cluster must be an integer of at least 1"),
        ({"fraction": 2.0}, "fraction must be a number in the range"),
        ({"count": 1, "quotas": "fair"}, "quotas must be one of proportional, equal"),
        ({"count": 1, "clusters": And(selectors=[Given([1])])}, "must be a ScoreSelector. Got And"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuotaPerCluster(**{"selector": Given([1]), "clusters": Given([1]), **parameters})


def make() -> QuotaPerCluster:
    return QuotaPerCluster(
        selector=ClipScore(features="l14", fraction=1),
        clusters=External(path=None, column="cluster", fraction=1),
        fraction=0.3,
    )


def test_contract() -> None:
    check_selector(make)


def test_requires_both() -> None:
    need = make().requires
    assert need.features == ("l14_img", "l14_txt")
    assert need.column is not None


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree(run_on_ranks: Callable[..., list[Any]], size: int) -> None:
    def select(ranks: Any) -> list[int]:
        selector = QuotaPerCluster(
            selector=Uniform(seed=1, fraction=1), clusters=Given(np.arange(300) % 7), count=50
        )
        source = make_source(300, part_samples=40, ranks=ranks)
        return selector.select(source).multiplicities.tolist()

    alone = run_on_ranks(1, select)[0]
    assert sum(alone) == 50
    assert run_on_ranks(size, select) == [alone] * size
