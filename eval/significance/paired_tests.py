"""Whether one model is better than another on the same test sets.

A unit is an image, or an instance of several images; rows of one unit are not independent of each
other and stay together in all that is drawn here.

A bootstrap knows nothing beyond the units on which the models differ: if these are few, its p
values are too small. Where such a p value is to be had, the p value of a test is therefore the
larger one of the bootstrap's and an exact one: McNemar's where the metric is a share of right
rows, and else, for fewer than 100 units that differ, that of a paired permutation test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.metrics.weighted_metrics import STATISTICS
from siftclip.eval.significance.resampling import interval, joint_replicates, point_value
from siftclip.hashing import mix64, seed_state
from siftclip.purposes import HashPurpose

# The least p value is 2 / (resamples + 1). After Holm's correction for 40 tasks, 1,000 resamples
# could not find anything at 5 %; these can.
PAIRED_RESAMPLES = 10_000
# For shares of right units, McNemar's test and the bootstrap are about the same from here on, also
# at levels of 0.001. A metric that hangs on a few of the units that differ may need more.
_FEW_DIFFERING = 100
_BLOCK = 1 << 24  # weights held at a time
_ROUNDING = 1e-12  # differences that should be equal are summed in other orders


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """Model b against model a. None = too few resamples define the metrics."""

    difference: float  # b - a; NaN = not defined
    interval: tuple[float, float] | None  # of the bootstrap; with few differing units too narrow
    p_value: float | None  # two-sided, of no difference; at least the exact one, if there is one
    units: int  # distinct ones, of all tasks; images that tasks share count in each
    mcnemar_p_value: float | None = None  # of one task whose metric is a share of right rows
    replicates: np.ndarray = field(repr=False, compare=False)  # float64 [R], of the difference
    # float64 [R], with units swapped at random between the models; None = too many differ
    swapped: np.ndarray | None = field(default=None, repr=False, compare=False)


def compare_task(
    a: Outcomes,
    b: Outcomes,
    units_a: np.ndarray,
    units_b: np.ndarray,
    *,
    resamples: int = PAIRED_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> PairedTest:
    """Test whether two models differ on one task, by resampling its units for both at once.

    Args:
        a: of one model.
        b: of the other, with the same statistic.
        units_a: uint64 [n], which image or instance each row of `a` is.
        units_b: uint64 [n], the same units in any order. Of rows with equal units, the first
            meets the first, the second the second.
        resamples: at least 1.
        seed: any integer.
        level: of the interval, in (0, 1).

    Raises:
        InputError: the units or the statistics differ.
    """
    if a.statistic != b.statistic:
        raise InputError(
            f"A paired test needs two results with the same statistic. "
            f"Got {a.statistic} and {b.statistic}."
        )
    order_a, order_b = (np.argsort(units, kind="stable") for units in (units_a, units_b))
    units = units_a[order_a]
    if not np.array_equal(units, units_b[order_b]):
        raise InputError(
            f"A paired test needs two results on the same units. {_unshared(units_a, units_b)} "
            f"of {len(units_a)} + {len(units_b)} are in one result only. Evaluate both models on "
            f"the same test set."
        )
    a, b = _reordered(a, order_a), _reordered(b, order_b)
    of_a, of_b = joint_replicates([a, b], units, resamples=resamples, seed=seed)
    return _paired_test(
        point_value(b) - point_value(a),
        of_b - of_a,
        level,
        units=len(np.unique(units)),
        swapped=swapped_differences(a, b, units, resamples=resamples, seed=seed),
        mcnemar_p_value=mcnemar_p_value(a, b, units),
    )


def compare_average(
    tests: Mapping[str, PairedTest], members: Sequence[str], *, level: float = 0.95
) -> PairedTest | None:
    """Test whether the means over tasks differ.

    Args:
        tests: of each task, all with the same resamples and seed.
        members: the tasks of the average.
        level: of the interval, in (0, 1).

    Returns:
        The test, or None if there is no member or one has no test.
    """
    if not members or not tests.keys() >= set(members):
        return None
    of_tasks = [tests[name] for name in members]
    swapped = [test.swapped for test in of_tasks if test.swapped is not None]
    return _paired_test(
        float(np.mean([test.difference for test in of_tasks])),
        np.mean([test.replicates for test in of_tasks], axis=0),
        level,
        units=sum(test.units for test in of_tasks),
        swapped=np.mean(swapped, axis=0) if len(swapped) == len(of_tasks) else None,
    )


def bootstrap_p_value(differences: np.ndarray) -> float | None:
    """Compute the two-sided p value of no difference, from replicates of the difference.

    The level at which the percentile interval begins to hold 0. With 1 added to the counts it is
    never 0 (Davison and Hinkley, "Bootstrap Methods and their Application", 1997).

    Args:
        differences: float64 [R]; NaN is left out.

    Returns:
        In (0, 1], or None if fewer than half of the replicates are defined.
    """
    defined = differences[~np.isnan(differences)]
    if 2 * len(defined) < len(differences) or not len(defined):
        return None
    beyond = min((defined <= 0).sum(), (defined >= 0).sum())
    return min(1.0, 2 * (1 + int(beyond)) / (1 + len(defined)))


def swapped_differences(
    a: Outcomes, b: Outcomes, units: np.ndarray, *, resamples: int, seed: int
) -> np.ndarray | None:
    """Compute differences after each unit's outcomes change models or not, with equal chance.

    This is how it is distributed if it does not matter which model an outcome is of (Fisher, "The
    Design of Experiments", 1935, section 21). Whether a unit is swapped is a hash of (seed, unit,
    number of the row), so tasks that share images are swapped together.

    Args:
        a: of one model.
        b: of the other, the same units in the same order.
        units: uint64 [n]. Rows of equal units are swapped together.
        resamples: R, at least 1.
        seed: any integer.

    Returns:
        float64 [R], or None if 100 units or more differ.
    """
    differs = _differing(a, b)
    if len(np.unique(units[differs])) >= _FEW_DIFFERING:
        return None
    arrays = {
        name: np.concatenate([of_a[~differs], of_a[differs], b.arrays[name][differs]])
        for name, of_a in a.arrays.items()
    }
    metric = STATISTICS[a.statistic]
    state = seed_state(seed ^ HashPurpose.PERMUTATION)
    of_unit = mix64(units[differs] ^ state)
    step = max(_BLOCK // max(len(units), 1), 1)
    blocks = []
    for start in range(0, resamples, step):
        numbers = np.arange(start, min(start + step, resamples), dtype=np.uint64)
        swaps = (mix64(of_unit ^ mix64(numbers + state)[:, None]) & np.uint64(1)).astype(np.uint8)
        ones = np.ones((len(numbers), len(units) - swaps.shape[1]), dtype=np.uint8)
        of_a = metric(arrays, np.hstack([ones, 1 - swaps, swaps]))
        blocks.append(metric(arrays, np.hstack([ones, swaps, 1 - swaps])) - of_a)
    return np.concatenate(blocks)


def mcnemar_p_value(a: Outcomes, b: Outcomes, units: np.ndarray) -> float | None:
    """Compute the exact two-sided p value of no difference between two shares of right rows.

    McNemar's exact test, 1947, where each row is a unit of its own: whether the rows that one model
    only has right are even. Rows of one unit change models together (a sign-flip test of the units'
    differences, Fisher, 1935), since models are right or wrong on all rows of an image alike.

    Args:
        a: of one model.
        b: of the other, the same units in the same order.
        units: uint64 [n].

    Returns:
        In (0, 1], or None if the metric is not the mean of zeros and ones. Rows that either model
        lacks are left out.
    """
    if a.statistic != "mean":
        return None
    value_a, value_b = a.arrays["value"], b.arrays["value"]
    known = ~np.isnan(value_a) & ~np.isnan(value_b)
    if not np.isin([value_a[known], value_b[known]], (0, 1)).all():
        return None
    _, unit = np.unique(units[known], return_inverse=True)
    gained = (value_b[known] - value_a[known]).astype(np.int64)
    return sign_flip_p_value(np.bincount(unit.reshape(-1), weights=gained).astype(np.int64))


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Compute the exact two-sided p value of a sum of differences whose signs come by chance.

    The sum of m differences of one size k is k (2 B - m) with B binomial(m, 1/2): for one size this
    is McNemar's test. The distributions of several sizes are convolved, to an absolute error of
    1e-12, in O(S log S) for absolute differences that sum to S.

    Args:
        differences: int64 [n].
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    from scipy.signal import convolve  # type: ignore[import-untyped]
    from scipy.stats import binom, binomtest  # type: ignore[import-untyped]

    if len(sizes) == 1:
        return float(binomtest(int((differences > 0).sum()), int(counts[0])).pvalue)
    # chances of (sum + S) / 2 = 0, ..., S, where S is the greatest sum
    chances = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, spread).clip(min=0.0)
    total = len(chances) - 1
    sums = 2 * np.arange(total + 1) - total
    return min(1.0, float(chances[np.abs(sums) >= abs(int(differences.sum()))].sum()))


def permutation_p_value(difference: float, swapped: np.ndarray) -> float | None:
    """Compute the two-sided p value of no difference, from differences with swapped units.

    The share of rows that are as far from 0, with 1 added to the counts (Phipson and Smyth,
    "Permutation P-values Should Never Be Zero", 2010).

    Args:
        difference: between the models.
        swapped: float64 [R], see `swapped_differences`; NaN is left out.

    Returns:
        In (0, 1], or None if fewer than half of the rows or no difference is defined.
    """
    defined = swapped[~np.isnan(swapped)]
    if np.isnan(difference) or 2 * len(defined) < len(swapped) or not len(defined):
        return None
    as_far = int((np.abs(defined) >= abs(difference) - _ROUNDING).sum())
    return (1 + as_far) / (1 + len(defined))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Correct p values of many tests by Holm's step-down method, to compare with the level as is.

    Holm, "A simple sequentially rejective multiple test procedure", 1979. The chance of one false
    finding or more stays below the level, whatever the tests have to do with each other.

    Args:
        p_values: each in [0, 1], none NaN.

    Returns:
        float64 [m], each at least as large as before and at most 1.
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    factors = np.arange(len(given), 0, -1)
    corrected = np.empty_like(given)
    corrected[order] = np.minimum(np.maximum.accumulate(factors * given[order]), 1.0)
    return corrected


def _paired_test(
    difference: float,
    differences: np.ndarray,
    level: float,
    *,
    units: int,
    swapped: np.ndarray | None,
    mcnemar_p_value: float | None = None,
) -> PairedTest:
    p_value, exact = bootstrap_p_value(differences), mcnemar_p_value
    if exact is None and swapped is not None:
        exact = permutation_p_value(difference, swapped)
    return PairedTest(
        difference=difference,
        interval=interval(differences, level, point=difference, lowest=-1.0),
        p_value=p_value if p_value is None or exact is None else max(p_value, exact),
        units=units,
        mcnemar_p_value=mcnemar_p_value,
        replicates=differences,
        swapped=swapped,
    )


def _differing(a: Outcomes, b: Outcomes) -> np.ndarray:
    """Find the units whose outcomes are not the same, bool [n]. NaN is the same as NaN."""
    differs = np.zeros(a.units, dtype=bool)
    for name, x in a.arrays.items():
        y = b.arrays[name]
        unequal = (x != y) & ((x == x) | (y == y))
        differs |= unequal.reshape(a.units, -1).any(axis=1)
    return differs


def _reordered(outcomes: Outcomes, order: np.ndarray) -> Outcomes:
    return replace(outcomes, arrays={name: a[order] for name, a in outcomes.arrays.items()})


def _unshared(units_a: np.ndarray, units_b: np.ndarray) -> int:
    """Count the rows of either that have no partner in the other."""
    _, inverse = np.unique(np.concatenate([units_a, units_b]), return_inverse=True)
    surplus = np.bincount(inverse, weights=np.repeat([1, -1], [len(units_a), len(units_b)]))
    return int(np.abs(surplus).sum())
