"""Dot plots: the means of the arms on a column, and their differences on every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from siftclip.trainer.compare.answer import column_title, interval_points, points
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.page.axes import Axis, arm_classes, linear_axis
from siftclip.trainer.compare.significance import ColumnTests
from siftclip.trainer.compare.tables import spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A dot with an interval; places are percent of the axis."""

    colour: str  # a class of page.css
    text: str  # what it says
    at: float | None  # None: there is no value
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()
    solid: bool = True  # False: the interval holds the line


@dataclass(frozen=True, slots=True, kw_only=True)
class DotRow:
    """A line of a dot plot."""

    label: str
    value: str
    marks: tuple[Mark, ...]
    is_group: bool = False  # an average of several tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class DotPlot:
    """Rows with one axis."""

    title: str
    axis: Axis
    line: float | None  # where the baseline is, in percent of the axis
    rows: tuple[DotRow, ...]

    @property
    def summary(self) -> str:
        """What it shows, for those who do not see it."""
        return "; ".join(mark.text for row in self.rows for mark in row.marks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facets:
    """A column of differences for each arm, a row for each task, one axis for all."""

    arms: tuple[str, ...]
    axis: Axis
    line: float
    rows: tuple[DotRow, ...]


def mean_plot(comparison: ArmComparison, column: str) -> DotPlot:
    """Plot the arms on a task or average: seeds, mean, and the interval of its difference.

    The interval is drawn around the mean: one that leaves out the baseline's line is resolved.

    Args:
        comparison: of all arms.
        column: a task, or `average/NAME`.
    """
    colours = arm_classes(comparison.arms, comparison.baseline)
    means = spread(comparison, [column])[column, "mean"] * 100
    frame = comparison.results
    rows = frame[(frame["metric"] == "main_metric") & (frame["task"] == column)]
    seeds = {
        arm: [100 * float(value) for value in own["value"].dropna()]
        for arm, own in rows.groupby("arm")
    }
    tested = comparison.tests.get(column)
    halves = {arm: 100 * _least(tested, arm) for arm in comparison.arms}
    ends = [value for of_arm in seeds.values() for value in of_arm]
    for arm in comparison.arms:
        ends += [means[arm] - halves[arm], means[arm] + halves[arm]]
    axis = linear_axis(ends)
    base = float(means[comparison.baseline])
    plotted = []
    for arm in comparison.arms:
        mean, half = float(means[arm]), halves[arm]
        text = "-" if pd.isna(mean) else f"{mean:.1f}"
        mark = Mark(
            colour=colours[arm],
            text=f"{arm}: {text} %{_difference_text(tested, arm)}",
            at=None if pd.isna(mean) else axis.at(mean),
            low=axis.at(mean - half) if half else None,
            high=axis.at(mean + half) if half else None,
            seeds=tuple(axis.at(value) for value in seeds.get(arm, ())),
            solid=arm == comparison.baseline or _resolved(tested, arm),
        )
        plotted.append(DotRow(label=arm, value=text, marks=(mark,)))
    return DotPlot(
        title=column_title(column),
        axis=axis,
        line=None if pd.isna(base) else axis.at(base),
        rows=tuple(plotted),
    )


def difference_facets(comparison: ArmComparison) -> Facets | None:
    """Plot the differences of all arms to the baseline on all averages and tasks.

    Averages come first; each kind is sorted by the largest difference of an arm.

    Returns:
        None where nothing is compared.
    """
    colours = arm_classes(comparison.arms, comparison.baseline)
    arms = tuple(arm for arm in comparison.arms if arm != comparison.baseline)
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for column, tested in comparison.tests.items():
        values[column] = {
            arm: (100 * tested.tests.of(at).value, 100 * _least(tested, arm))  # type: ignore[union-attr]
            for at, arm in enumerate(tested.arms)
            if tested.tests is not None and tested.tests.of(at) is not None
        }
    known = {column: of_arms for column, of_arms in values.items() if of_arms}
    if not known:
        return None
    pairs = [pair for of_arms in known.values() for pair in of_arms.values()]
    axis = linear_axis(
        [0.0, *(v - half for v, half in pairs), *(v + half for v, half in pairs)], spaces=3
    )

    def order(column: str) -> tuple[bool, float]:
        return not column.startswith("average/"), -max(v for v, _ in known[column].values())

    rows = []
    for column in sorted(known, key=order):
        marks = tuple(
            _difference_mark(comparison.tests[column], arm, known[column], axis, colours)
            for arm in arms
        )
        is_group = column.startswith("average/")
        rows.append(DotRow(label=column_title(column), value="", marks=marks, is_group=is_group))
    return Facets(arms=arms, axis=axis, line=axis.at(0.0), rows=tuple(rows))


def _difference_mark(
    tested: ColumnTests,
    arm: str,
    values: Mapping[str, tuple[float, float]],
    axis: Axis,
    colours: Mapping[str, str],
) -> Mark:
    title = column_title(tested.column)
    if arm not in values:
        return Mark(colour=colours[arm], text=f"{arm}, {title}: no value", at=None)
    value, half = values[arm]
    return Mark(
        colour=colours[arm],
        text=f"{arm}, {title}{_difference_text(tested, arm)}",
        at=axis.at(value),
        low=axis.at(value - half) if half else None,
        high=axis.at(value + half) if half else None,
        solid=_resolved(tested, arm),
    )


def _least(tested: ColumnTests | None, arm: str) -> float:
    """Return half the width of an interval, a share; 0 where there is none."""
    if tested is None or tested.tests is None or arm not in tested.arms:
        return 0.0
    difference = tested.tests.of(tested.arms.index(arm))
    if difference is None or difference.interval is None:
        return 0.0
    return (difference.interval[1] - difference.interval[0]) / 2


def _difference_text(tested: ColumnTests | None, arm: str) -> str:
    if tested is None or tested.tests is None or arm not in tested.arms:
        return ""
    difference = tested.tests.of(tested.arms.index(arm))
    if difference is None:
        return ", the baseline"
    interval = difference.interval
    sure = "" if interval is None else f" (95 % interval {interval_points(interval)})"
    return f": {points(difference.value, '+')} points{sure}"


def _resolved(tested: ColumnTests | None, arm: str) -> bool:
    return bool(tested is not None and tested.resolved(arm))
