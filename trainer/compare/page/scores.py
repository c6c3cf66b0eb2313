"""Distributions of the scores that the arms have selected by, and where they cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from siftclip.trainer.compare.page.axes import Axis, arm_classes, linear_axis
from siftclip.trainer.compare.page.pool_view import Arms, PoolView

_BINS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlot:
    """The scores of an arm: steps of SVG in a box of 100 x 100."""

    title: str
    colour: str
    summary: str
    x: Axis
    y: Axis
    pool: str
    kept: str
    cut: float  # the lowest score that is kept, in percent of the axis


def score_frame(view: PoolView) -> pd.DataFrame:
    """Count the scores in bins, one row per arm and bin: arm, low, high, pool, kept.

    The ends of the bins leave out a thousandth on both sides, which is in the outer bins.
    """
    rows = []
    for arm, scores in view.scores.items():
        finite = scores[np.isfinite(scores)].astype(np.float64)
        if len(finite) == 0 or finite.min() == finite.max():
            continue
        low, high = np.quantile(finite, [0.001, 0.999])
        if low == high:
            low, high = finite.min(), finite.max()
        edges = np.linspace(low, high, _BINS + 1)
        is_kept = np.isfinite(scores) & (view.kept[arm] > 0)
        pool, kept = (
            np.histogram(np.clip(values, low, high), edges)[0]
            for values in (finite, scores[is_kept])
        )
        rows += [
            {"arm": arm, "low": edges[at], "high": edges[at + 1], "pool": n, "kept": kept[at]}
            for at, n in enumerate(pool.tolist())
        ]
    return pd.DataFrame(rows, columns=["arm", "low", "high", "pool", "kept"])


def score_plots(arms: Arms, view: PoolView, frame: pd.DataFrame) -> list[ScorePlot]:
    """Plot the histograms of `score_frame`, pool and kept, and the lowest kept score."""
    colours = arm_classes(arms.arms, arms.baseline)
    plots = []
    for arm, rows in frame.groupby("arm", sort=False):
        scores = view.scores[str(arm)]
        kept = scores[(view.kept[str(arm)] > 0) & np.isfinite(scores)]
        cut = float(kept.min()) if len(kept) else float(rows["high"].iloc[-1])
        x = linear_axis([rows["low"].iloc[0], rows["high"].iloc[-1]])
        y = linear_axis([0.0, float(rows["pool"].max())], spaces=3)
        plots.append(
            ScorePlot(
                title=str(arm),
                colour=colours[str(arm)],
                summary=(
                    f"Scores of {arm}: {rows['pool'].sum():,} samples, {len(kept):,} kept, "
                    f"the lowest at {cut:.4g}"
                ),
                x=x,
                y=y,
                pool=_steps(rows, "pool", x, y),
                kept=_steps(rows, "kept", x, y),
                cut=x.at(cut),
            )
        )
    return plots


def _steps(rows: pd.DataFrame, name: str, x: Axis, y: Axis) -> str:
    path = f"M{x.at(rows['low'].iloc[0]):g},100"
    for low, high, count in zip(rows["low"], rows["high"], rows[name], strict=True):
        height = 100 - y.at(count)
        path += f" L{x.at(low):g},{height:g} L{x.at(high):g},{height:g}"
    return f"{path} L{x.at(rows['high'].iloc[-1]):g},100 Z"
