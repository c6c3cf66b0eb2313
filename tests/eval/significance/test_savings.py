"""Compute saved: costs at which a curve reaches a value, factors, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.eval.significance.savings import cost_to_reach, pareto_front, saving

numbers = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12)


@given(numbers, st.floats(-1, 1, width=32))
def test_a_curve_stays_above_what_it_has_reached(values: list[float], target: float) -> None:
    """Against a search of the polyline on a fine grid."""
    costs = np.arange(1.0, len(values) + 1)
    curve = costs, np.array(values)
    found = cost_to_reach(curve, target)
    grid = np.linspace(1, len(values), 50 * (len(values) - 1) + 1)
    above = np.interp(grid, *curve) >= target
    if not above[-1]:
        assert np.isnan(found)
        return
    first = grid[len(grid) - np.argmin(above[::-1])] if not above.all() else grid[0]
    assert found <= first + 1e-9
    assert first - found <= 1 / 50 + 1e-9


def test_a_known_factor_is_found() -> None:
    """The same curve, at half of the cost."""
    costs, values = np.linspace(1, 100, 34), np.log(np.linspace(1, 100, 34))
    found = saving([(costs / 2, values)] * 3, [(costs, values)] * 2)
    assert found.factor == pytest.approx(2)
    assert found.interval == pytest.approx((2, 2))
    assert found.cost == pytest.approx(50)
    assert (found.reached, found.pairs) == (6, 6)
    single = saving([(costs / 2, values)], [(costs, values)])
    assert (single.factor, single.interval) == (pytest.approx(2), None)
    # what is not reached is not extrapolated
    never = saving([(costs, values - 1), (costs, values + 1)], [(costs, values)])
    assert (never.factor, never.cost, never.reached, never.pairs) == (None, None, 1, 2)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_hold_the_true_factor(seeds: int) -> None:
    """Curves of seeds that differ in speed, with noise at each point: 95 % of 1,000, or more."""
    generator = np.random.default_rng(seeds)
    costs = np.linspace(2, 100, 50)

    def curves(speed: float) -> list[tuple[np.ndarray, np.ndarray]]:
        speeds = speed * np.exp(0.2 * generator.standard_normal(seeds))
        return [
            (costs, np.log(own * costs) + 0.002 * generator.standard_normal(len(costs)))
            for own in speeds
        ]

    held = []
    for _ in range(1000):
        found = saving(curves(4.0), curves(1.0))
        if found.interval is not None:
            held.append(found.interval[0] <= 4 <= found.interval[1])
    assert len(held) > 900
    assert np.mean(held) >= 0.95 - 2.6 * np.sqrt(0.95 * 0.05 / len(held))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9))
def test_the_front_is_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    costs, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    slow = [
        not any(
            c <= own_c and v >= own_v and (c, v) != (own_c, own_v) for c, v in points
        )
        for own_c, own_v in points
    ]  # fmt: skip
    assert pareto_front(costs, values).tolist() == slow


def test_what_has_no_value_is_on_no_front() -> None:
    assert pareto_front(np.array([1, np.nan, 2]), np.array([np.nan, 9, 1])).tolist() == [
        *(False, False, True),
    ]
