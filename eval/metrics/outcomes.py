"""What a model did on the units of a task, kept so that a main metric can be taken on a resample.

A unit is what is drawn when a test set is drawn again: an image, or an instance of several images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Metrics = dict[str, float]  # NaN = not defined here

# How a main metric follows from the arrays, which all have one row a unit:
#   mean             value float32 [n]: their mean; NaN is left out
#   class_mean       value float32 [n], cell int32 [n]: the mean over the cells of the cells' means
#   worst_cell       value float32 [n], cell int32 [n]: the lowest of the cells' means; a unit of
#                    cell -1 is in no cell
#   f1_macro         predicted int32 [n], label int32 [n]: the mean over the labels that occur of F1
#   two_means        value float32 [n], hits float32 [n], queries float32 [n]:
#                    (mean of value + sum of hits / sum of queries) / 2
#   average_precision  scores float32 [n, C], labels bool [n, C]: the mean over the classes
Statistic = Literal[
    "mean", "class_mean", "worst_cell", "f1_macro", "two_means", "average_precision"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """The arrays from which one metric of one task is computed."""

    statistic: Statistic
    arrays: dict[str, np.ndarray]

    @property
    def units(self) -> int:
        """How many there are."""
        return len(next(iter(self.arrays.values())))


def mean_metrics(values: Mapping[str, np.ndarray]) -> tuple[Metrics, dict[str, Outcomes]]:
    """Average each array, float or bool [n] with NaN left out.

    Returns:
        Metrics, and Outcomes but for an array of NaN alone, whose metric is NaN.

    Example:
        >>> import numpy as np
        >>> from siftclip.eval.metrics.outcomes import mean_metrics
        >>> metrics, outcomes = mean_metrics({"acc1": np.array([True, False, True, True])})
        >>> metrics, outcomes["acc1"].units
        ({'acc1': 0.75}, 4)
    """
    metrics = {name: float("nan") for name in values}
    outcomes = {}
    for name, array in values.items():
        if not np.isnan(array).all():
            metrics[name] = float(np.nanmean(array, dtype=np.float64))
            outcomes[name] = Outcomes(statistic="mean", arrays={"value": array.astype(np.float32)})
    return metrics, outcomes
