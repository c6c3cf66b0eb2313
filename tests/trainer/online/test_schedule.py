"""Courses over training, the window, the warm-up, and sizes of super-batches."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.trainer.online.schedule import Schedule, StepSettings, course_values

RAMP = [[0.2, 0.0], [0.6, 0.8], [0.8, 0.4]]


def slow_value(course: Any, share: float) -> float:
    if isinstance(course, (int, float)):
        return float(course)
    if share <= course[0][0]:
        return float(course[0][1])
    for (left, low), (right, high) in pairwise(course):
        if share <= right:
            return float(low + (high - low) * (share - left) / (right - left))
    return float(course[-1][1])


def slow_size(ratio: float, sub_batch: int, multiple_of: int) -> int:
    """The nearest multiple that is not below the sub-batch; of two, the larger."""
    wanted = sub_batch / (1 - ratio)
    lower = int(wanted // multiple_of) * multiple_of
    upper = lower + multiple_of
    nearest = lower if wanted - lower < upper - wanted else upper
    return max(nearest, sub_batch)


def test_a_number_holds_throughout() -> None:
    schedule = Schedule(filter_ratio=0.8, temperature=0.5, uniform_fraction=0.1)
    expected = StepSettings(filter_ratio=0.8, temperature=0.5, uniform_fraction=0.1)
    assert {schedule.at(step, 7) for step in range(7)} == {expected}
    assert Schedule(filter_ratio=0.5).at(3, 7) == StepSettings(
        filter_ratio=0.5, temperature=None, uniform_fraction=0.0
    )


def test_knots_are_joined_by_straight_lines() -> None:
    schedule = Schedule(
        filter_ratio=RAMP, temperature=[[0.5, 2]], uniform_fraction=[[0, 1], [1, 0]]
    )
    for step in range(40):
        found = schedule.at(step, 40)
        assert found.filter_ratio == pytest.approx(slow_value(RAMP, step / 40), abs=1e-12)
        assert found.temperature == 2.0
        assert found.uniform_fraction == pytest.approx(1 - step / 40)
    assert course_values(RAMP, np.array([0.0, 0.4, 0.6, 0.7, 1.0])) == pytest.approx(
        [0.0, 0.4, 0.8, 0.6, 0.4]
    )


def test_selection_is_off_outside_the_window_and_in_the_warm_up() -> None:
    schedule = Schedule(filter_ratio=0.8, start=0.3, stop=0.7, temperature=2, warmup_steps=4)
    ratios = [schedule.at(step, 10).filter_ratio for step in range(10)]
    assert ratios == [0, 0, 0, 0, 0.8, 0.8, 0.8, 0, 0, 0]
    assert schedule.at(0, 10).temperature == 2.0  # for the records; nothing is drawn
    early = Schedule(filter_ratio=0.8, start=0.3, stop=0.7)
    assert [early.at(step, 10).filter_ratio > 0 for step in (2, 3, 6, 7)] == [0, 1, 1, 0]
    sizes = schedule.super_batch_samples(10, 8, 4)
    assert sizes.tolist() == [8, 8, 8, 8, 40, 40, 40, 8, 8, 8]


@given(
    ratio=st.floats(0, 0.95),
    last=st.floats(0, 0.95),
    parts=st.integers(1, 20),
    multiple_of=st.integers(1, 64),
    total=st.integers(1, 30),
    warmup=st.integers(0, 29),
)
def test_sizes_are_the_nearest_multiples(
    ratio: float, last: float, parts: int, multiple_of: int, total: int, warmup: int
) -> None:
    warmup = min(warmup, total - 1)
    schedule = Schedule(filter_ratio=[[0, ratio], [1, last]], warmup_steps=warmup)
    sub_batch = parts * multiple_of
    sizes = schedule.super_batch_samples(total, sub_batch, multiple_of)
    assert sizes.dtype == np.int64
    assert len(sizes) == total
    for step, size in enumerate(sizes.tolist()):
        wanted = sub_batch / (1 - schedule.at(step, total).filter_ratio)
        assert size % multiple_of == 0
        assert size >= sub_batch
        assert abs(size - wanted) <= multiple_of / 2 + 1e-9 * wanted
        if step < warmup:
            assert size == sub_batch


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize(
    ("sub_batch", "multiple_of"), [(8, 8), (8, 4), (64, 8), (96, 4), (1000, 1)]
)
def test_sizes_against_the_slow_twin(ratio: float, sub_batch: int, multiple_of: int) -> None:
    sizes = Schedule(filter_ratio=ratio).super_batch_samples(3, sub_batch, multiple_of)
    assert sizes.tolist() == [slow_size(ratio, sub_batch, multiple_of)] * 3


def test_filter_ratio_0_is_the_sub_batch() -> None:
    assert Schedule(filter_ratio=0.0).super_batch_samples(5, 24, 8).tolist() == [24] * 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"filter_ratio": 1.0}, r"filter_ratio must be in the range \[0, 1\)"),
        ({"filter_ratio": -0.1}, "online.schedule.filter_ratio must be"),
        ({"filter_ratio": True}, "online.schedule.filter_ratio must be a finite number"),
        ({"filter_ratio": math.nan}, "online.schedule.filter_ratio must be a finite number"),
        ({"filter_ratio": "0.8"}, "online.schedule.filter_ratio must be a number, or knots"),
        ({"filter_ratio": []}, "online.schedule.filter_ratio must be a number, or knots"),
        ({"filter_ratio": [0.1, 0.8]}, "online.schedule.filter_ratio must be a number, or knots"),
        ({"filter_ratio": [[0.5, 0.1], [0.5, 0.8]]}, "knots with ascending shares"),
        ({"filter_ratio": [[0.6, 0.1], [0.5, 0.8]]}, "knots with ascending shares"),
        ({"filter_ratio": [[0, 0.1], [1.5, 0.8]]}, r"filter_ratio must be a share of training"),
        ({"filter_ratio": [[0, 0.1], [1, 1]]}, r"filter_ratio must be in the range \[0, 1\)"),
        ({"temperature": -1}, "online.schedule.temperature must be at least 0, or null"),
        ({"temperature": math.inf}, "online.schedule.temperature must be a finite number"),
        ({"uniform_fraction": 1.1}, r"online.schedule.uniform_fraction must be in the range"),
        ({"uniform_fraction": None}, "online.schedule.uniform_fraction must be a number, or knots"),
        ({"start": -0.1}, "online.schedule.start must be a share of training"),
        ({"stop": 2}, "online.schedule.stop must be a share of training"),
        ({"start": 0.5, "stop": 0.5}, "online.schedule.start must be below"),
        ({"warmup_steps": -1}, "online.schedule.warmup_steps must be an integer of at least 0"),
        ({"warmup_steps": 1.5}, "online.schedule.warmup_steps must be an integer"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule(**{"filter_ratio": 0.8, **values})


def test_the_limits_are_allowed() -> None:
    found = Schedule(filter_ratio=0, temperature=0, uniform_fraction=1).at(0, 1)
    assert found == StepSettings(filter_ratio=0.0, temperature=0.0, uniform_fraction=1.0)


def test_a_run_without_selection_is_refused() -> None:
    schedule = Schedule(filter_ratio=0.8, stop=0.5, warmup_steps=5)
    with pytest.raises(InputError, match=r"online.schedule.warmup_steps=5 .* none of the 10 steps"):
        schedule.check_length(10)
    assert schedule.super_batch_samples(12, 8, 8)[5] == 40


def test_a_sub_batch_that_is_no_multiple_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="sub_batch=12 is not a multiple of 8"):
        Schedule(filter_ratio=0.5).super_batch_samples(3, 12, 8)
