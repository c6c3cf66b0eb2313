"""Two methods, each with several seeds of training: the seeds are the units.

A test on images says how sure a difference between two models is. Another seed of the same method
is another model, so a difference between methods has to be larger than what seeds alone make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb, sqrt
from statistics import fmean, stdev

import numpy as np

from siftclip.eval.results.aggregates import PARTIAL_SUFFIX, averages
from siftclip.eval.results.files import TaskResult
from siftclip.eval.significance.paired_tests import holm

SIGNIFICANCE = 0.05
_ALL_SPLITS = 200_000  # up to which all ways to split the seeds are tried
_DRAWN_SPLITS = 20_000
_TWO_SIDED_95 = 1.96
_ROUNDING = 1e-12  # differences that should be equal are summed in other orders


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedDifference:
    """The values of two methods on one task, or on the average of several, by seed."""

    key: str
    title: str
    values_a: tuple[float, ...]  # of the seeds that have one, that of the model compared first
    values_b: tuple[float, ...]
    p_value: float | None  # two-sided, of no difference; None: too few seeds for any at 5 %
    p_holm: float | None = None  # corrected for all tasks, or for all averages

    @property
    def value(self) -> float:
        """The mean over the seeds of b less that of a."""
        return fmean(self.values_b) - fmean(self.values_a)

    @property
    def significant(self) -> bool:
        """Whether it is at 5 %, after Holm's correction."""
        return self.p_holm is not None and self.p_holm <= SIGNIFICANCE

    @property
    def seed_deviation(self) -> float | None:
        """The standard deviation between seeds of one method, pooled; None: one seed of each."""
        groups = [values for values in (self.values_a, self.values_b) if len(values) > 1]
        freedom = sum(len(values) - 1 for values in groups)
        if not freedom:
            return None
        squares = sum((len(values) - 1) * stdev(values) ** 2 for values in groups)
        return sqrt(squares / freedom)

    @property
    def between_seeds(self) -> float | None:
        """By how much two seeds of one method differ on average; None: one seed of each."""
        pairs = [
            abs(x - y)
            for values in (self.values_a, self.values_b)
            for x, y in combinations(values, 2)
        ]
        return fmean(pairs) if pairs else None

    def made_by_seeds(self, difference: float) -> bool | None:
        """Return whether a difference is within what 95 % of all pairs of seeds of one method have.

        As far as a normal distribution with `seed_deviation` describes them; None: not known.
        """
        deviation = self.seed_deviation
        if deviation is None:
            return None
        return abs(difference) <= _TWO_SIDED_95 * sqrt(2) * deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedComparison:
    """Two methods by their seeds. `same_method`: a and b are two seeds of one."""

    runs_a: int
    runs_b: int
    same_method: bool
    tasks: tuple[SeedDifference, ...]
    averages: tuple[SeedDifference, ...]

    @property
    def compares_methods(self) -> bool:
        """Whether there are two methods, and several seeds of one of them."""
        return not self.same_method and max(self.runs_a, self.runs_b) > 1

    @property
    def by_key(self) -> dict[str, SeedDifference]:
        """Tasks and averages."""
        return {difference.key: difference for difference in (*self.tasks, *self.averages)}

    @property
    def least_p_value(self) -> float:
        """The least p value that so many runs can have."""
        return least_p_value(self.runs_a, self.runs_b)


def compare_seeds(
    a: Sequence[Sequence[TaskResult]],
    b: Sequence[Sequence[TaskResult]],
    titles: Mapping[str, str],
    groups: Mapping[str, Sequence[str]],
    *,
    same_method: bool = False,
    level: float = SIGNIFICANCE,
) -> SeedComparison:
    """Compare two methods on tasks and averages, with a run of each seed as a unit.

    Values of a task count that are of the same samples, texts and metric as the first run's; an
    average is over all of its members or not there.

    Args:
        a: results of each seed of one method, at least one.
        b: of the other, at least one.
        titles: what to call the tasks that are compared, by key.
        groups: tasks, or `task:metric`, by the key of the average.
        same_method: whether both are seeds of one method, so that there is nothing to test.
        level: of the tests.
    """
    runs_a, runs_b = (_alike(runs) for runs in (a, b))
    tasks = []
    for key, title in titles.items():
        values = [_values(runs, key) for runs in (runs_a, runs_b)]
        tasks.append(_difference(key, title, *values))
    means = [_averages(runs, groups) for runs in (runs_a, runs_b)]
    of_groups = [
        _difference(key, key.removeprefix("average/"), *(of_runs[key] for of_runs in means))
        for key in groups
    ]
    tested = [] if same_method else [tasks, of_groups]
    for differences in tested:
        _test(differences, level)
    return SeedComparison(
        runs_a=len(a),
        runs_b=len(b),
        same_method=same_method,
        tasks=tuple(
            difference for difference in tasks if difference.values_a and difference.values_b
        ),
        averages=tuple(
            difference for difference in of_groups if difference.values_a and difference.values_b
        ),
    )


def least_p_value(first: int, second: int) -> float:
    """Return the least p value of `split_p_value` for so many values on either side."""
    return (2 if first == second else 1) / comb(first + second, first)


def split_p_value(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> float:
    """Test for no difference of two means by permuting the seeds: the two-sided p value.

    The share of all ways to split the values into groups of these sizes whose means are as far
    apart (Fisher, "The Design of Experiments", 1935). Beyond 200,000 ways, 20,000 are drawn.

    Args:
        first: values, at least one.
        second: values, at least one.
        seed: of the draws.
    """
    values = np.asarray([*first, *second], dtype=np.float64)
    size, total = len(first), len(values)
    observed = abs(values[:size].mean() - values[size:].mean()) - _ROUNDING
    drawn = comb(total, size) > _ALL_SPLITS
    if drawn:
        order = np.random.default_rng(seed).random((_DRAWN_SPLITS, total)).argsort(axis=1)
        rows = order[:, :size]
    else:
        rows = np.asarray([*combinations(range(total), size)])
    sums = values[rows].sum(axis=1)
    apart = np.abs(sums / size - (values.sum() - sums) / (total - size))
    as_far = int((apart >= observed).sum())
    return (as_far + drawn) / (len(rows) + drawn)  # 1 more where not all were tried


def _alike(runs: Sequence[Sequence[TaskResult]]) -> list[dict[str, TaskResult]]:
    """Select the results by task of each run that are asked as in the first run."""
    by_key = [{result.key: result for result in run} for run in runs]
    first = by_key[0]
    return [
        {
            key: of_run
            for key, of_run in run.items()
            if key in first and _asked_alike(of_run, first[key])
        }
        for run in by_key
    ]


def _asked_alike(result: TaskResult, other: TaskResult) -> bool:
    return (result.task, result.samples, result.main_metric_name) == (
        other.task,
        other.samples,
        other.main_metric_name,
    )


def _values(runs: Sequence[Mapping[str, TaskResult]], key: str) -> tuple[float, ...]:
    values = [run[key].main_metric for run in runs if key in run]
    return tuple(value for value in values if value is not None)


def _averages(
    runs: Sequence[Mapping[str, TaskResult]], groups: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, ...]]:
    """Compute the averages of the runs that have all members, by the key of the group."""
    names = {key.removesuffix(PARTIAL_SUFFIX): key for key in groups}  # no name may end with it
    values_of: dict[str, list[float]] = {key: [] for key in groups}
    for run in runs:
        metrics = {
            key: {name: result.metrics.get(name) for name in runs[0][key].metrics}
            for key, result in run.items()
        }
        of_run = averages(
            {key: result.main_metric for key, result in run.items()},
            {name: groups[key] for name, key in names.items()},
            metrics=metrics,
        )
        for name, average in of_run.items():
            if average.complete and average.value is not None:
                values_of[names[name]].append(average.value)
    return {key: tuple(values) for key, values in values_of.items()}


def _difference(
    key: str, title: str, values_a: tuple[float, ...], values_b: tuple[float, ...]
) -> SeedDifference:
    return SeedDifference(key=key, title=title, values_a=values_a, values_b=values_b, p_value=None)


def _test(differences: list[SeedDifference], level: float) -> None:
    """Give those p values that have enough seeds for one at the level, in place."""
    places = [
        place
        for place, difference in enumerate(differences)
        if difference.values_a
        and difference.values_b
        and least_p_value(len(difference.values_a), len(difference.values_b)) <= level
    ]
    p_values = [split_p_value(differences[i].values_a, differences[i].values_b) for i in places]
    for place, p_value, corrected in zip(places, p_values, holm(p_values).tolist(), strict=True):
        differences[place] = replace(differences[place], p_value=p_value, p_holm=corrected)
