"""Rules, against slow twins written as loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.selectors.core.description import describe
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import (
    AsGiven,
    DataCompFraction,
    Threshold,
    TopCount,
    TopFraction,
    keep_top,
)

# few distinct values, so that ties are the rule, as with CLIP scores stored in fp16
SCORES = st.lists(
    st.sampled_from([0.0, 0.25, -0.25, 0.5, math.nan, math.inf, -math.inf]), min_size=1, max_size=30
)


def make_uids(count: int, seed: int) -> np.ndarray:
    """Distinct uids, some with equal high halves."""
    generator = np.random.default_rng(seed)
    numbers = generator.permutation(count).astype(np.uint64)
    return np.stack([numbers // 3 + np.uint64(2**63), numbers % 3], axis=1)


def keep_top_slowly(scores: np.ndarray, uids: np.ndarray, count: int) -> list[int]:
    """Pick `count` times the best of those left; of equals the one with the smallest uid."""
    kept = [0] * len(scores)
    for _ in range(count):
        best = None
        for i in range(len(scores)):
            if kept[i] or math.isnan(scores[i]) or scores[i] == -math.inf:
                continue
            if best is None or (-scores[i], *uids[i].tolist()) < (
                -scores[best],
                *uids[best].tolist(),
            ):
                best = i
        if best is not None:
            kept[best] = 1
    return kept


@given(SCORES, st.integers(0, 2**32 - 1), st.data())
def test_keep_top_equals_slow_twin(values: list[float], seed: int, data: st.DataObject) -> None:
    scores = np.array(values, dtype=np.float32)
    uids = make_uids(len(scores), seed)
    count = data.draw(st.integers(0, len(scores)))
    kept = keep_top(scores, uids, count)
    assert kept.dtype == np.int64
    assert kept.tolist() == keep_top_slowly(scores, uids, count)


@given(SCORES, st.integers(0, 2**32 - 1))
def test_keep_top_does_not_depend_on_order(values: list[float], seed: int) -> None:
    scores = np.array(values, dtype=np.float32)
    uids = make_uids(len(scores), seed)
    shuffle = np.random.default_rng(seed).permutation(len(scores))
    count = len(scores) // 2
    kept = keep_top(scores, uids, count)
    assert np.array_equal(keep_top(scores[shuffle], uids[shuffle], count), kept[shuffle])


@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_keep_top_of_equal_scores_keeps_smallest_uids(count: int) -> None:
    uids = make_uids(7, seed=4)
    kept = keep_top(np.full(7, 0.5, np.float32), uids, count)
    smallest = sorted(range(7), key=lambda i: tuple(uids[i].tolist()))[:count]
    assert np.flatnonzero(kept).tolist() == sorted(smallest)


def test_keep_top_compares_the_whole_uid() -> None:
    top = 2**64 - 1
    uids = np.array([[1, top], [1, 0], [0, top]], dtype=np.uint64)
    kept = keep_top(np.zeros(3, np.float32), uids, 2)
    assert kept.tolist() == [0, 1, 1]


def test_keep_top_of_one_sample() -> None:
    uids = make_uids(1, seed=0)
    assert keep_top(np.array([0.1], np.float32), uids, 1).tolist() == [1]
    assert keep_top(np.array([0.1], np.float32), uids, 0).tolist() == [0]
    assert keep_top(np.array([np.nan], np.float32), uids, 1).tolist() == [0]


def test_keep_top_keeps_all_scored_when_too_many_are_nan() -> None:
    scores = np.array([np.nan, 0.3, np.nan, -0.1], np.float32)
    assert keep_top(scores, make_uids(4, seed=0), 3).tolist() == [0, 1, 0, 1]


# int(n * f), also where the product lies below the whole number: 100 * 0.29 = 28.999999999999996
@pytest.mark.parametrize(
    ("samples", "fraction", "kept"),
    [(10, 0.3, 3), (100, 0.29, 28), (9, 0.5, 4), (3, 0.3, 0), (7, 1.0, 7), (8000, 0.3, 2400)],
)
def test_top_fraction_keeps_int_of_product(samples: int, fraction: float, kept: int) -> None:
    scores = np.random.default_rng(0).random(samples).astype(np.float32)
    uids = make_uids(samples, seed=1)
    assert TopFraction(fraction)(scores, uids, samples).sum() == kept
    assert TopFraction(fraction)(scores, uids, 2 * samples).sum() == min(
        samples, int(2 * samples * fraction)
    )
    assert TopFraction(fraction, of="left")(scores, uids, 2 * samples).sum() == kept


def test_top_fraction_counts_unscored_samples() -> None:
    scores = np.array([0.9, 0.8, 0.7, np.nan, np.nan, np.nan], np.float32)
    assert TopFraction(0.34)(scores, make_uids(6, seed=1), 6).tolist() == [1, 1, 0, 0, 0, 0]


@given(SCORES, st.sampled_from([-0.25, 0.0, 0.25, 0.3]))
def test_threshold_equals_slow_twin(values: list[float], threshold: float) -> None:
    scores = np.array(values, dtype=np.float32)
    kept = Threshold(threshold)(scores, make_uids(len(scores), seed=0), len(scores))
    expected = [int(not math.isnan(s) and s >= np.float32(threshold)) for s in scores]
    assert kept.dtype == np.int64
    assert kept.tolist() == expected


def test_threshold_compares_in_float32() -> None:
    score = np.float32(0.7)
    assert float(score) < 0.7  # in float64 the sample would be dropped
    assert Threshold(0.7)(np.array([score]), make_uids(1, seed=0), 1).tolist() == [1]


@given(SCORES, st.integers(0, 40), st.integers(0, 99))
def test_top_count_keeps_the_best(values: list[float], count: int, seed: int) -> None:
    scores = np.array(values, dtype=np.float32)
    uids = make_uids(len(scores), seed)
    kept = TopCount(count)(scores, uids, 1000)
    assert kept.tolist() == keep_top_slowly(scores, uids, count)


@given(SCORES, st.sampled_from([0.1, 0.34, 0.5, 1.0]), st.integers(0, 9))
def test_datacomp_fraction_equals_slow_twin(
    values: list[float], fraction: float, removed: int
) -> None:
    scores = np.array(values, dtype=np.float32)
    uids = make_uids(len(scores), seed=0)
    for of, samples in (("pool", len(values) + removed), ("left", len(values))):
        kept = DataCompFraction(fraction, of=of)(scores, uids, len(values) + removed)
        descending = sorted((float(s) for s in scores if s > -math.inf), reverse=True)
        position = int(samples * fraction)
        # where there is no such position, all that may be kept are
        threshold = (descending[position:] or descending[-1:] or [math.inf])[0]
        assert kept.dtype == np.int64
        assert kept.tolist() == [int(float(s) >= threshold) for s in scores]


@pytest.mark.testbed
@pytest.mark.parametrize("fraction", [0.3, 0.2])
def test_fractions_equal_the_authors(
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
    fraction: float,
) -> None:
    inputs, expected = reference("inputs_l14"), reference("clipscore_l14")
    source = reference_source(inputs, "l14")
    scores = inputs["css_f16"].astype(np.float32)
    conformance(
        f"clip score column, DataComp's rule, top {fraction:.0%}",
        kept=np.flatnonzero(DataCompFraction(fraction)(scores, source.uids, len(scores))),
        expected_kept=expected[f"rows_frac{fraction}"],
    )


@pytest.mark.parametrize("rule", [Threshold(0.3), TopFraction(0.3), TopCount(3), AsGiven()])
def test_a_rule_is_known_by_its_parameters(rule: object) -> None:
    assert describe(rule) == describe(rule)
    assert describe(Threshold(0.3)) != describe(Threshold(0.31))


@pytest.mark.parametrize("count", [-1, 1.0, True, None])
def test_top_count_refuses_bad_count(count: object) -> None:
    with pytest.raises(InputError, match=r"count must be an integer of at least 0"):
        TopCount(count)  # type: ignore[arg-type]  # what a YAML file may hold


def test_as_given_takes_whole_numbers_and_reads_nan_as_zero() -> None:
    scores = np.array([0, 2, np.nan, 1], np.float32)
    kept = AsGiven()(scores, make_uids(4, seed=0), 4)
    assert kept.dtype == np.int64
    assert kept.tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("value", [-1.0, 0.5, math.inf, -math.inf])
def test_as_given_refuses_other_numbers(value: float) -> None:
    with pytest.raises(InputError, match="whole numbers of at least 0"):
        AsGiven()(np.array([1.0, value], np.float32), make_uids(2, seed=0), 2)


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.5, math.nan, "0.3", True, None])
def test_top_fraction_refuses_bad_fraction(fraction: object) -> None:
    with pytest.raises(InputError, match=r"fraction must be a number in the range \(0, 1"):
        TopFraction(fraction)  # type: ignore[arg-type]  # what a YAML file may hold


@pytest.mark.parametrize("threshold", [math.nan, math.inf, "0.3", True, None])
def test_threshold_refuses_bad_threshold(threshold: object) -> None:
    with pytest.raises(InputError, match=r"threshold must be a finite number"):
        Threshold(threshold)  # type: ignore[arg-type]  # what a YAML file may hold
