"""Which arms of a comparison differ, on each task and on each average, and how surely.

The statistics are those of `siftclip.eval.significance`; here they get the values of the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from siftclip.eval.results.aggregates import Average, member_outcomes, result_averages
from siftclip.eval.results.files import MAIN_METRIC, TaskResult
from siftclip.eval.significance.arm_model import ArmValues, fit_arms
from siftclip.eval.significance.arm_tests import (
    LEVEL,
    ArmTests,
    compare_with_baseline,
    holm_of_arms,
    single_p_value,
)
from siftclip.eval.significance.resampling import joint_replicates, replicates

RESAMPLES = 1000  # of the images; variances are right to 5 %

Place = tuple[str, int]  # an arm and a seed
Results = Mapping[Place, Mapping[str, TaskResult]]  # of each run, by task


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnTests:
    """The arms that have values on one task or average, compared."""

    column: str  # a task, or `average/NAME`
    arms: tuple[str, ...]
    tests: ArmTests | None  # None: the baseline has no values
    p_holm: Mapping[str, float | None]  # of a task, by arm: corrected for all arms and tasks
    is_first: bool = False  # what the answer is about: one of many tasks, but chosen before

    def resolved(self, arm: str) -> bool | None:
        """Return whether an arm differs from the baseline; None where that is not known."""
        if self.tests is None or arm not in self.arms or arm == self.baseline:
            return None
        difference = self.tests.of(self.arms.index(arm))
        if difference is None or difference.p_value is None:
            return None
        if self.p_holm and not self.is_first:
            p_value = self.p_holm.get(arm)
            return p_value is not None and p_value <= LEVEL
        return difference.resolved

    @property
    def baseline(self) -> str | None:
        """The arm that the others are compared with."""
        return None if self.tests is None else self.arms[self.tests.baseline]

    @property
    def best(self) -> str | None:
        """The arm that is better than all others, where that is resolved."""
        best = None if self.tests is None else self.tests.best
        return None if best is None else self.arms[best]


def member_replicates(
    results: Results, members: Iterable[str]
) -> dict[Place, dict[str, np.ndarray]]:
    """Compute replicates of each member of groups for each run: float64 [R].

    All are of the same resamples of the images. What a member is made of is not always kept: it is
    left out then.

    Args:
        results: of each run.
        members: `task`, or `task:metric`.
    """
    found: dict[Place, dict[str, np.ndarray]] = {place: {} for place in results}
    for member in dict.fromkeys(members):
        kept = {}
        for place, by_key in results.items():
            outcomes, units = member_outcomes(member, by_key)
            if outcomes is not None and units is not None:
                kept[place] = (outcomes, units)
        first = next(iter(kept.values()), None)
        together = [
            place
            for place, (outcomes, units) in kept.items()
            if first is not None
            and outcomes.statistic == first[0].statistic
            and np.array_equal(units, first[1])
        ]
        if first is not None:
            drawn = joint_replicates(
                [kept[place][0] for place in together], first[1], resamples=RESAMPLES, seed=0
            )
            for place, row in zip(together, drawn, strict=True):
                found[place][member] = row
        for place in kept.keys() - set(together):
            outcomes, units = kept[place]
            found[place][member] = replicates(outcomes, units, resamples=RESAMPLES, seed=0)
    return found


def compare_columns(
    results: Results,
    drawn: Mapping[Place, Mapping[str, np.ndarray]],
    seeds: Mapping[str, Sequence[int]],
    baseline: str,
    tasks: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    *,
    first: str,
) -> dict[str, ColumnTests]:
    """Compare the arms on all averages and tasks, by `average/NAME` and task.

    An arm counts where all of its runs have a value. Averages, and what the answer is about, are
    corrected for the number of arms, each by itself; other tasks for arms and tasks together.

    Args:
        results: of each run.
        drawn: see `member_replicates`.
        seeds: by arm, in the order of the arms.
        baseline: the arm that the others are compared with.
        tasks: whose main metrics are compared.
        groups: members by name of the average.
        first: the column that the answer is about.
    """
    averages = {
        place: result_averages(by_key.values(), groups) for place, by_key in results.items()
    }
    columns = {f"average/{name}": tuple(members) for name, members in groups.items()}
    columns |= {task: (task,) for task in tasks}
    found = {}
    for column, members in columns.items():
        arms: dict[str, ArmValues] = {}
        for arm, of_arm in seeds.items():
            places = [(arm, seed) for seed in of_arm]
            values = [_value(column, place, results, averages) for place in places]
            if None in values:
                continue
            rows = [_mean_replicates(drawn.get(place, {}), members) for place in places]
            whole = [row for row in rows if row is not None]
            arms[arm] = ArmValues(
                values=np.asarray(values, dtype=np.float64),
                replicates=np.stack(whole) if len(whole) == len(rows) else None,
            )
        units = _units(next(iter(results.values()), {}), members)
        tests = None
        if baseline in arms:
            model = fit_arms([*arms.values()], units)
            tests = compare_with_baseline(model, [*arms].index(baseline))
        found[column] = ColumnTests(
            column=column, arms=tuple(arms), tests=tests, p_holm={}, is_first=column == first
        )
    return _corrected(found, tasks)


def _corrected(columns: dict[str, ColumnTests], tasks: Sequence[str]) -> dict[str, ColumnTests]:
    """Add p values of tasks that are corrected for all arms and tasks."""
    places, p_values = [], []
    for task in tasks:
        column = columns[task]
        if column.tests is None:
            continue
        for arm in column.arms:
            if arm != column.baseline:
                places.append((task, arm))
                at = column.arms.index(arm)
                p_values.append(single_p_value(column.tests.model, at, column.tests.baseline))
    corrected: dict[str, dict[str, float | None]] = {}
    for (task, arm), p_value in zip(places, holm_of_arms(p_values), strict=True):
        corrected.setdefault(task, {})[arm] = p_value
    return {
        name: replace(column, p_holm=corrected.get(name, {})) for name, column in columns.items()
    }


def _value(
    column: str, place: Place, results: Results, averages: Mapping[Place, Mapping[str, Average]]
) -> float | None:
    """Return what a run has on a task or average; None for no value, or a part of an average."""
    if place not in results:
        return None
    if not column.startswith("average/"):
        result = results[place].get(column)
        return None if result is None else result.metrics[MAIN_METRIC]
    average = averages[place][column.removeprefix("average/")]
    return average.value if average.complete else None


def _mean_replicates(drawn: Mapping[str, np.ndarray], members: Sequence[str]) -> np.ndarray | None:
    if not drawn.keys() >= set(members):
        return None
    mean: np.ndarray = np.mean([drawn[member] for member in members], axis=0)
    return mean


def _units(by_key: Mapping[str, TaskResult], members: Sequence[str]) -> int:
    """Count the distinct images of members; those that tasks share count once."""
    units = [
        units for member in members if (units := member_outcomes(member, by_key)[1]) is not None
    ]
    return len(np.unique(np.concatenate(units))) if units else 0
