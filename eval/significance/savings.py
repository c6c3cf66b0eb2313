"""How much less an arm needs to reach what a baseline ends with: factors from learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from siftclip.eval.significance.arm_tests import LEVEL

Curve = tuple[np.ndarray, np.ndarray]  # costs, increasing, and values: float64 [n] each


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What an arm needs to reach the final value of a baseline."""

    factor: float | None  # cost of the baseline / cost of the arm; None: it is not always reached
    interval: tuple[float, float] | None  # None: of one seed, or not always reached
    cost: float | None  # of the arm, the geometric mean
    reached: int  # pairs of a seed of the arm and one of the baseline in which it is reached
    pairs: int


def cost_to_reach(curve: Curve, target: float) -> float:
    """Return the cost from which a curve stays at a value or above, interpolated linearly.

    Nothing is extrapolated: a curve that begins above has the cost of its first point, which is an
    upper bound, and one that ends below has NaN.

    Args:
        curve: at least one point.
        target: the value.

    Examples:
        >>> import numpy as np
        >>> from siftclip.eval.significance.savings import cost_to_reach
        >>> cost_to_reach((np.array([10.0, 20.0, 30.0]), np.array([0.3, 0.1, 0.3])), 0.2)
        25.0
        >>> cost_to_reach((np.array([10.0, 20.0, 30.0]), np.array([0.1, 0.3, 0.4])), 0.2)
        15.0
    """
    costs, values = curve
    below = np.flatnonzero(values < target)
    if not len(below):
        return float(costs[0])
    last = int(below[-1])
    if last == len(costs) - 1:
        return float("nan")
    share = (target - values[last]) / (values[last + 1] - values[last])
    return float(costs[last] + share * (costs[last + 1] - costs[last]))


def saving(curves: Sequence[Curve], baseline: Sequence[Curve]) -> Saving:
    """Compare the curves of an arm with those of a baseline.

    The logarithm of the factor is averaged over all pairs of seeds; its variance is that of the
    arm's seeds and of the baseline's, each from the means over the other, and its interval is one
    of Student's t with the freedom of the fewer seeds.

    Args:
        curves: of the arm, one per seed, at least one; costs are positive.
        baseline: of the baseline, the same.
    """
    logs = np.array(
        [
            [
                np.log(costs[-1]) - np.log(cost_to_reach(curve, float(values[-1])))
                for costs, values in baseline
            ]
            for curve in curves
        ]
    )
    reached = int(np.isfinite(logs).sum())
    if reached < logs.size:
        return Saving(factor=None, interval=None, cost=None, reached=reached, pairs=logs.size)
    mean = float(logs.mean())
    end = float(np.mean([np.log(costs[-1]) for costs, _ in baseline]))
    freedom = min(logs.shape) - 1
    interval = None
    if freedom > 0:
        of_arm, of_baseline = logs.mean(axis=1), logs.mean(axis=0)
        variance = of_arm.var(ddof=1) / len(of_arm) + of_baseline.var(ddof=1) / len(of_baseline)
        from scipy.stats import t  # type: ignore[import-untyped]  # a second, as in arm_tests

        half = float(t.ppf(1 - LEVEL / 2, freedom) * np.sqrt(variance))
        interval = (float(np.exp(mean - half)), float(np.exp(mean + half)))
    return Saving(
        factor=float(np.exp(mean)),
        interval=interval,
        cost=float(np.exp(end - mean)),
        reached=reached,
        pairs=logs.size,
    )


def pareto_front(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return which points no other one beats: none costs as little and is worth as much or more.

    Args:
        costs: float64 [n], lower is better; NaN is on no front.
        values: float64 [n], higher is better; NaN is on no front.

    Returns:
        bool [n]; of equal points all are on it.

    Examples:
        >>> import numpy as np
        >>> from siftclip.eval.significance.savings import pareto_front
        >>> pareto_front(np.array([1.0, 2.0, 3.0]), np.array([0.2, 0.1, 0.3])).tolist()
        [True, False, True]
    """
    cheaper = costs[None, :] <= costs[:, None]
    better = values[None, :] >= values[:, None]
    strictly = (costs[None, :] < costs[:, None]) | (values[None, :] > values[:, None])
    beaten = (cheaper & better & strictly).any(axis=1)
    front: np.ndarray = ~beaten & np.isfinite(costs) & np.isfinite(values)
    return front
