"""How sure a main metric is: replicates of it on resampled test sets, and intervals.

The Poisson bootstrap gives each unit an independent Poisson(1) multiplicity (Hanley and MacGibbon,
"Creating non-parametric bootstrap samples using Poisson frequencies", 2006; Chamandy et al.,
"Estimating Uncertainty for Massive Data Streams", 2012). The multiplicity is a hash of the unit,
so one image has the same in all tasks and for all models: replicates of tasks that share images,
and of two models, are joint without any alignment.

Replicates are centred: moved by one number, so that their mean is the metric itself; only those
of a plain mean, which has no bias, stay as they are. Rare classes drop out of a resample, and a
minimum over noisier cells is lower, so that replicates lie above or below the metric on average:
by more than their own spread, where classes are many and rare. This takes off the bootstrap's
estimate of that bias (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 10);
it is not the BC or BCa interval of Efron, 1987, which takes other percentiles. Intervals are for
the expected metric on test sets of this size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.metrics.weighted_metrics import STATISTICS
from siftclip.hashing import mix64, seed_state
from siftclip.purposes import HashPurpose

# Of 65,536 draws, those of at least 1, 2, ... 8. The mean is 1 exactly, the variance 0.99997; 9 or
# more, one in 900,000, never comes.
_AT_LEAST = (41427, 17317, 5263, 1244, 240, 39, 5, 1)
_DRAWS_PER_HASH = 4  # of 16 bits
_ROWS = 128  # units whose draws stay in the cache
_BLOCK = 1 << 24  # multiplicities held at a time: 16 MB, and 64 MB as float32


def poisson_weights(units: np.ndarray, resamples: int, *, seed: int) -> np.ndarray:
    """Draw Poisson(1) multiplicities, a pure function of (seed, unit, number of the resample).

    Args:
        units: uint64 [n]. Equal ones get equal multiplicities.
        resamples: R, at least 1.
        seed: any integer.

    Returns:
        uint8 [R, n], from 0 to 8; the units of a resample are not next to each other in memory.
    """
    return _weights(units, 0, resamples, seed)


def _weights(units: np.ndarray, start: int, stop: int, seed: int) -> np.ndarray:
    """Draw the rows from `start`, a multiple of 4, to `stop` of `poisson_weights`."""
    state = seed_state(seed ^ HashPurpose.BOOTSTRAP)
    of_unit = mix64(units ^ state)
    numbers = np.arange(start // _DRAWS_PER_HASH, -(-stop // _DRAWS_PER_HASH), dtype=np.uint64)
    of_number = mix64(numbers + state)
    weights = np.zeros((len(units), stop - start), dtype=np.uint8)
    for row in range(0, len(units), _ROWS):
        hashes = mix64(of_unit[row : row + _ROWS, None] ^ of_number)
        draws = hashes.astype("<u8", copy=False).view("<u2")[:, : stop - start]
        block = weights[row : row + _ROWS]
        for bound in _AT_LEAST:
            block += draws < bound
    return weights.T


def point_value(outcomes: Outcomes) -> float:
    """Compute the metric itself: each unit once. NaN if it is not defined."""
    once = np.ones((1, outcomes.units), dtype=np.uint8)
    return float(STATISTICS[outcomes.statistic](outcomes.arrays, once)[0])


def replicates(outcomes: Outcomes, units: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Compute the metric on each resample, centred: float64 [R], NaN where it is not defined.

    Their mean is `point_value`; that of the statistic "mean", which has no bias and is left as it
    is, but for the chance of the draws. Values a little outside of [0, 1] occur.

    Args:
        outcomes: of one model on one task.
        units: uint64 [n], which image or instance each row is.
        resamples: R, at least 1.
        seed: any integer; results of equal (resamples, seed) may be combined row by row.
    """
    replicates: np.ndarray = joint_replicates([outcomes], units, resamples=resamples, seed=seed)[0]
    return replicates


def joint_replicates(
    several: Sequence[Outcomes], units: np.ndarray, *, resamples: int, seed: int
) -> np.ndarray:
    """Compute `replicates` of several outcomes on the same units in one order: float64 [k, R]."""
    step = max(_BLOCK // max(len(units), 1), 1)
    step += -step % _DRAWS_PER_HASH
    blocks = []
    for start in range(0, resamples, step):
        weights = _weights(units, start, min(start + step, resamples), seed)
        blocks.append(
            [STATISTICS[outcomes.statistic](outcomes.arrays, weights) for outcomes in several]
        )
    rows: np.ndarray = np.concatenate(blocks, axis=1)
    return np.stack([_centred(row, outcomes) for row, outcomes in zip(rows, several, strict=True)])


def interval(
    replicates: np.ndarray,
    level: float = 0.95,
    *,
    point: float | None = None,
    lowest: float = 0.0,
) -> tuple[float, float] | None:
    """Compute the percentile interval of centred replicates (Efron and Tibshirani, 1993, ch. 13).

    Args:
        replicates: float64 [R]; NaN is left out.
        level: in (0, 1).
        point: the metric, which the interval always holds. None: the mean of the replicates.
        lowest: the least value that there can be, -1 for a difference. The greatest is 1.

    Returns:
        Its ends, or None if fewer than half of the replicates are defined.
    """
    defined = replicates[~np.isnan(replicates)]
    if 2 * len(defined) < len(replicates) or not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).clip(lowest, 1.0)
    point = float(defined.mean()) if point is None else point
    return min(float(low), point), max(float(high), point)


def wilson_interval(share: float, samples: int, level: float = 0.95) -> tuple[float, float]:
    """Compute the Wilson score interval of a proportion.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927. Unlike
    the normal approximation it stays inside [0, 1] and is not empty at 0 and 1.

    Args:
        share: successes / samples, in [0, 1].
        samples: at least 1.
        level: in (0, 1).
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 / (1 + z**2 / samples)
    centre = shrink * (share + z**2 / (2 * samples))
    radius = shrink * z * math.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    return max(0.0, centre - radius), min(1.0, centre + radius)


def task_interval(
    outcomes: Outcomes, units: np.ndarray, replicates: np.ndarray, *, level: float = 0.95
) -> tuple[float, float] | None:
    """Compute the interval of a task's metric: percentiles of its replicates, but for two cases.

    A share of right and wrong units that is exactly 0 or 1 is so in every resample. Its interval
    is Wilson's, over the distinct units. So is that of a worst cell in which all or nothing is
    right, over the distinct units of the cell: of all such cells the largest if nothing is right,
    as the minimum is not above any cell, and the smallest if all is. Other metrics that no
    resample moves have an interval of no width: a bootstrap cannot say more.

    The interval of a worst cell is for this metric on other images of the same cells. Where the
    lowest cells are nearly tied, the metric is on average less than the lowest true share, which
    the interval then seldom covers if cells are many and small.

    Args:
        outcomes: of one model on one task.
        units: uint64 [n].
        replicates: float64 [R], of these outcomes.
        level: in (0, 1).

    Returns:
        Its ends, or None if fewer than half of the replicates are defined.
    """
    point = point_value(outcomes)
    if point in (0.0, 1.0) and outcomes.statistic in ("mean", "worst_cell"):
        if outcomes.statistic == "mean":
            samples = len(np.unique(units[~np.isnan(outcomes.arrays["value"])]))
        else:
            samples = _units_of_worst_cell(outcomes, units, point)
        return wilson_interval(point, samples, level)
    return interval(replicates, level, point=point)


def average_interval(
    replicates_by_task: Mapping[str, np.ndarray], members: Sequence[str], *, level: float = 0.95
) -> tuple[float, float] | None:
    """Compute the interval of the mean over tasks: their replicates are averaged row by row.

    Tasks of shared images vary together here, as they do when a test set is drawn again.

    Args:
        replicates_by_task: float64 [R] by task, all of the same seed.
        members: the tasks of the average.
        level: in (0, 1).

    Returns:
        Its ends. None if there is no member, one has no replicates, or fewer than half of the
        rows are defined; a row is, if it is in every member.
    """
    if not members or not replicates_by_task.keys() >= set(members):
        return None
    return interval(np.mean([replicates_by_task[name] for name in members], axis=0), level)


def _centred(replicates: np.ndarray, outcomes: Outcomes) -> np.ndarray:
    defined = replicates[~np.isnan(replicates)]
    if outcomes.statistic == "mean" or not len(defined):
        return replicates  # a mean has no bias: only the chance of the draws would be taken off
    centred: np.ndarray = replicates + (point_value(outcomes) - defined.mean())
    return centred


def _units_of_worst_cell(outcomes: Outcomes, units: np.ndarray, point: float) -> int:
    """Count the distinct units of the largest cell of only zeros, or the smallest of only ones."""
    value, cell = outcomes.arrays["value"], outcomes.arrays["cell"]
    kept = ~np.isnan(value) & (cell != -1)
    others = np.unique(cell[kept & (value != point)])
    sizes = [len(np.unique(units[kept & (cell == c)])) for c in np.setdiff1d(cell[kept], others)]
    return max(sizes) if point == 0 else min(sizes)
