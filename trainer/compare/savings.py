"""What each arm costs for what it reaches: compute saved at equal accuracy, and the front."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from siftclip.eval.significance.savings import Curve, Saving, pareto_front, saving
from siftclip.tables import listed
from siftclip.trainer.compare.answer import column_title
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.page.axes import short
from siftclip.trainer.compare.page.curves import AGAINST, EVALUATION
from siftclip.trainer.compare.tables import run_means, spread

SAVING_NOTE = (
    "The cost at which an arm reaches the final value of the baseline for good, from the "
    "evaluations during training, interpolated and never extrapolated; the factor is the cost of "
    "the baseline by it, with its 95 % interval over seeds. Selecting before training is not in it."
)
_COSTS = {"FLOPs": ("training_flops", "scoring_flops"), "seconds of training": ("train_seconds",)}


def savings(
    comparison: ArmComparison, frame: pd.DataFrame
) -> Iterator[tuple[str, str, str, Saving]]:
    """Yield column, arm, kind of cost and saving, for the columns evaluated during training.

    Args:
        comparison: of all arms.
        frame: of `curve_frame`.
    """
    for column in comparison.columns:
        of_column = frame[frame["metric"] == f"{EVALUATION}{column}"]
        for against in AGAINST:
            curves = {
                arm: _curves(of_column[of_column["arm"] == arm], against) for arm in comparison.arms
            }
            baseline = curves[comparison.baseline]
            for arm, own in curves.items():
                if arm != comparison.baseline and own and baseline:
                    yield column, arm, against, saving(own, baseline)


def _curves(rows: pd.DataFrame, against: str) -> list[Curve]:
    """Return the curve of each seed."""
    known = rows.dropna(subset=[against, "value"])
    known = known[known[against] > 0].sort_values(against)
    return [
        (own[against].to_numpy(np.float64), own["value"].to_numpy(np.float64))
        for _, own in known.groupby("seed")
    ]


def saving_frame(comparison: ArmComparison, frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per column, arm and kind of cost, see `Saving`."""
    rows = [
        {
            "column": column,
            "arm": arm,
            "baseline": comparison.baseline,
            "against": against,
            "factor": found.factor,
            "low": None if found.interval is None else found.interval[0],
            "high": None if found.interval is None else found.interval[1],
            "cost": found.cost,
            "reached": found.reached,
            "pairs": found.pairs,
        }
        for column, arm, against, found in savings(comparison, frame)
    ]
    names = ["column", "arm", "baseline", "against", "factor", "low", "high", "cost", "reached"]
    return pd.DataFrame(rows, columns=[*names, "pairs"])


def saving_rows(comparison: ArmComparison, frame: pd.DataFrame) -> list[list[str]]:
    """Return header and one row per column and arm; the header alone without such evaluations."""
    rows = [["arm", "reaches the baseline's", *AGAINST.values()]]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for column, arm, against, found in savings(comparison, frame):
        cells.setdefault((column, arm), {})[against] = _cell(found)
    rows += [
        [arm, column_title(column), *(own.get(against, "-") for against in AGAINST)]
        for (column, arm), own in cells.items()
    ]
    return rows


def _cell(found: Saving) -> str:
    if found.factor is None or found.cost is None:
        return f"not reached in {found.pairs - found.reached} of {found.pairs} pairs of seeds"
    interval = ""
    if found.interval is not None:
        interval = f" ({found.interval[0]:.2f} to {found.interval[1]:.2f})"
    return f"{short(found.cost)}: {found.factor:.2f} times less{interval}"


def front_sentences(comparison: ArmComparison) -> list[str]:
    """Say for each kind of cost which arms no other one beats, by the means of the first column."""
    column = comparison.columns[0]
    means = spread(comparison, [column])[column, "mean"]
    arms = [arm for arm in comparison.arms if arm != comparison.again]
    found = []
    for cost, names in _COSTS.items():
        costs = np.array([sum(run_means(comparison, arm, name) for name in names) for arm in arms])
        front = pareto_front(costs, means.loc[arms].to_numpy(np.float64))
        order = sorted(np.flatnonzero(front).tolist(), key=lambda at: costs[at])
        if order:
            found.append(
                f"By the means, no arm has more {column_title(column)} for fewer {cost} than "
                f"{listed([arms[at] for at in order])}."
            )
    return found
