"""Learning curves: what the runs logged, against trained samples, FLOPs and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.page.axes import Axis, arm_classes, linear_axis, short

LOSS = "train/loss"
EVALUATION = "eval_during/"
ONLINE = "online/"
_TAKEN = f"{EVALUATION}seconds"  # by evaluating
OFFERED = "_offered"
AGAINST = {"samples": "trained samples", "flops": "FLOPs", "seconds": "seconds of training"}
MOST_POINTS = 150  # of a line: more than the pixels that it has
MOST_CHARTS = 24  # of a section


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An arm in a chart; paths of SVG in a box of 100 x 100."""

    arm: str
    colour: str
    text: str
    path: str
    band: str  # "": of one seed
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over one axis."""

    title: str
    against: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]

    @property
    def summary(self) -> str:
        """What it shows, for those who do not see it."""
        return f"{self.title} against {self.against}. " + "; ".join(
            line.text for line in self.lines
        )


def curve_frame(comparison: ArmComparison) -> pd.DataFrame:
    """Return what the runs logged of losses, evaluations and choices, one row per value.

    Columns: arm, seed, step, samples, flops, seconds, metric, value. What a run has cost at the
    step of an evaluation is interpolated between the records beside it. Of a step that was logged
    twice, as by a continued run, the last record counts.
    """
    rows: list[dict[str, Any]] = []
    for (arm, seed), records in comparison.logs.items():
        costs = _costs(records)
        values = {
            (record["step"], name): value
            for record in records
            for name, value in record.items()
            if name == LOSS or (name.startswith((EVALUATION, ONLINE)) and name != _TAKEN)
        }
        for (step, metric), value in values.items():
            at = {
                name: float(np.interp(step, steps, known)) if len(steps) else np.nan
                for name, (steps, known) in costs.items()
            }
            rows.append(
                {"arm": arm, "seed": seed, "step": step, **at, "metric": metric, "value": value}
            )
    names = ["arm", "seed", "step", *AGAINST, "metric", "value"]
    return pd.DataFrame(rows, columns=names)


def _costs(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return samples, FLOPs and seconds by step, each from 0."""
    by_step = {record["step"]: record for record in records if "train/batch_time" in record}
    steps = sorted(by_step)
    seconds = np.cumsum(
        [
            by_step[step]["train/batch_time"] * (step - before)
            for step, before in zip(steps, [0, *steps], strict=False)
        ]
    )
    found = {"seconds": ([0, *steps], [0.0, *map(float, seconds)])}
    for name, key in (("samples", "cost/trained_samples"), ("flops", "cost/flops")):
        there = [step for step in steps if key in by_step[step]]
        own = [float(by_step[step][key]) for step in there]
        found[name] = ([0, *there], [0.0, *own]) if there else ([], [])
    return found


def learning_charts(comparison: ArmComparison, frame: pd.DataFrame) -> list[list[Chart]]:
    """Chart loss and evaluations during training: a list for each metric, against all three.

    Args:
        comparison: of all arms.
        frame: of `curve_frame`.
    """
    names = frame["metric"].drop_duplicates()
    metrics = [LOSS, *names[names.str.startswith(EVALUATION)]]
    found = []
    for metric in metrics[:MOST_CHARTS]:
        title = "training loss" if metric == LOSS else metric.removeprefix(EVALUATION)
        rows = frame[frame["metric"] == metric]
        charts = [_chart(comparison, title, {"": rows}, against) for against in AGAINST]
        found.append([chart for chart in charts if chart is not None])
    return [charts for charts in found if charts]


def online_charts(comparison: ArmComparison, frame: pd.DataFrame) -> list[Chart]:
    """Chart what was chosen while training went on; dashed: what it was chosen from.

    Args:
        comparison: of all arms.
        frame: of `curve_frame`.
    """
    names = [name for name in frame["metric"].drop_duplicates() if name.startswith(ONLINE)]
    shown = [name for name in names if not name.endswith(OFFERED)]
    shown.sort(key=lambda name: not name.startswith(f"{ONLINE}share_"))
    charts = []
    for name in shown[:MOST_CHARTS]:
        rows = {
            suffix: frame[frame["metric"] == f"{name}{suffix}"]
            for suffix in ("", OFFERED)
            if f"{name}{suffix}" in names
        }
        title = name.removeprefix(ONLINE).replace("share_", "share of ", 1).replace("_", " ")
        charts.append(_chart(comparison, title, rows, "samples"))
    return [chart for chart in charts if chart is not None]


def _chart(
    comparison: ArmComparison, title: str, parts: Mapping[str, pd.DataFrame], against: str
) -> Chart | None:
    """Chart one metric; None where nothing of it is known."""
    colours = arm_classes(comparison.arms, comparison.baseline)
    drawn = []
    for suffix, rows in parts.items():
        for arm in comparison.arms:
            own = rows[rows["arm"] == arm].dropna(subset=[against, "value"])
            if len(own):
                by_step = own.groupby("step").agg(
                    x=(against, "mean"),
                    mean=("value", "mean"),
                    low=("value", "min"),
                    high=("value", "max"),
                    count=("value", "size"),
                )
                by_step = by_step[by_step["count"] == by_step["count"].max()]
                drawn.append((arm, suffix, _thinned(by_step), int(by_step["count"].max())))
    if not drawn:
        return None
    x = linear_axis([0.0, *(v for *_, by_step, _ in drawn for v in by_step["x"])])
    y = linear_axis([v for *_, by_step, _ in drawn for v in [*by_step["low"], *by_step["high"]]])
    lines = []
    for arm, suffix, by_step, seeds in drawn:
        xs = [x.at(value) for value in by_step["x"]]
        low, mean, high = (
            [round(100 - y.at(value), 2) for value in by_step[name]]
            for name in ("low", "mean", "high")
        )
        band = f"M{_points(xs, high)} L{_points(xs[::-1], low[::-1])} Z" if seeds > 1 else ""
        offered = " (offered)" if suffix else ""
        text = f"{arm}{offered}: {by_step['mean'].iloc[-1]:.4g} at {short(by_step['x'].iloc[-1])}"
        path = f"M{_points(xs, mean)}" + (" h0" if len(xs) == 1 else "")
        lines.append(
            Line(
                arm=arm,
                colour=colours[arm],
                text=text,
                path=path,
                band="" if suffix else band,
                dashed=bool(suffix),
            )
        )
    return Chart(title=title, against=AGAINST[against], x=x, y=y, lines=tuple(lines))


def _thinned(rows: pd.DataFrame) -> pd.DataFrame:
    if len(rows) <= MOST_POINTS:
        return rows
    return rows.iloc[np.linspace(0, len(rows) - 1, MOST_POINTS).round().astype(int)]


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in zip(xs, ys, strict=True))
