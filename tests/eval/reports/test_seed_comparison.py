from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from siftclip.eval.reports.seed_comparison import SeedDifference, least_p_value, split_p_value

values = st.lists(st.integers(0, 6), min_size=1, max_size=4)


@given(values, values)
def test_against_all_orders(first: list[int], second: list[int]) -> None:
    orders = np.array([*permutations([*first, *second])])
    apart = np.abs(orders[:, : len(first)].mean(axis=1) - orders[:, len(first) :].mean(axis=1))
    expected = np.mean(apart >= apart[0] - 1e-12)
    assert split_p_value(first, second) == pytest.approx(expected)
    assert split_p_value(second, first) == pytest.approx(expected)
    tenths = ([one / 10 for one in each] for each in (first, second))  # with errors of rounding
    assert split_p_value(*tenths) == pytest.approx(expected)
    assert split_p_value(first, second) >= least_p_value(len(first), len(second))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 3), (3, 3), (2, 4), (4, 4)])
def test_the_least_p_value_is_reached(first: int, second: int) -> None:
    low, high = 2.0 ** np.arange(first), 1000 + 2.0 ** np.arange(second)
    assert split_p_value(low, high) == pytest.approx(least_p_value(first, second))


def test_many_seeds_are_drawn() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.standard_normal(12), rng.standard_normal(12) + 5
    assert 0 < split_p_value(low, high) == split_p_value(low, high) < 1e-3
    assert split_p_value(low, low + 1e-3) > 0.5


@pytest.mark.parametrize("skewed", [False, True])
def test_equal_methods_are_rejected_at_the_level(skewed: bool) -> None:
    rng = np.random.default_rng(1)
    trials, rejected = 400, 0
    for _ in range(trials):
        seeds = rng.standard_normal(10)
        seeds = np.exp(2 * seeds) if skewed else seeds
        rejected += split_p_value(seeds[:5], seeds[5:]) <= 0.05
    low, high = binom.ppf([0.001, 0.999], trials, 12 / 252)  # of 252 ways, in pairs
    assert low <= rejected <= high


def difference(a: tuple[float, ...], b: tuple[float, ...]) -> SeedDifference:
    return SeedDifference(key="k", title="k", values_a=a, values_b=b, p_value=None)


@pytest.mark.parametrize(
    ("p_holm", "expected"), [(None, False), (0.0, True), (0.05, True), (0.0501, False), (1, False)]
)
def test_significant_is_at_5_percent_after_the_correction(
    p_holm: float | None, expected: bool
) -> None:
    one = replace(difference((0.5,), (0.8,)), p_value=0.001, p_holm=p_holm)
    assert one.significant is expected


def test_how_far_seeds_move() -> None:
    one = difference((0.5, 0.6, 0.7), (0.8,))
    assert one.value == pytest.approx(0.2)
    assert one.seed_deviation == pytest.approx(0.1)
    assert one.between_seeds == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    # 1.96 * sqrt(2) * 0.1 = 0.277
    assert [one.made_by_seeds(size) for size in (0.27, -0.27, 0.28)] == [True, True, False]
    both = difference((0.5, 0.6, 0.7), (0.8, 0.8))
    assert both.seed_deviation == pytest.approx(np.sqrt(0.02 / 3))
    alone = difference((0.5,), (0.8,))
    assert (alone.seed_deviation, alone.between_seeds, alone.made_by_seeds(1)) == (None, None, None)
