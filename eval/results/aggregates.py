"""Averages over groups of tasks, which say of which tasks they are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from siftclip.errors import ParameterError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.results.files import MAIN_METRIC, TaskResult
from siftclip.eval.tasks.known_tasks import KNOWN_TASKS
from siftclip.eval.tasks.task import require_names

PARTIAL_SUFFIX = " (partial)"
_PROTOCOL = re.compile(r"^(linear_probe|few_shot_[0-9]+)/")  # as tasks of probes are named


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The mean of a group of tasks over those of them that have a value."""

    name: str  # of the group
    value: float | None  # None where no task has a value
    present: tuple[str, ...]  # members of the group, in its order
    missing: tuple[str, ...]

    @property
    def partial(self) -> bool:
        """Whether a task is missing, so that this is not the mean of the group."""
        return bool(self.missing)

    @property
    def complete(self) -> bool:
        """Whether every task of the group has a value."""
        return not self.missing

    def text(self) -> str:
        """Format for people: `0.4321`, `0.4321 (partial: 30 of 38 tasks)`, or `-` for no value."""
        number = "-" if self.value is None else f"{self.value:.4f}"
        if self.complete:
            return number
        total = len(self.present) + len(self.missing)
        return f"{number} (partial: {len(self.present)} of {total} tasks)"


def group_members(groups: object) -> dict[str, list[str]]:
    """Return the members of all groups; one member may stand without a list.

    Raises:
        InputError: this is no mapping from names to names, a group is empty, or its name ends as
            that of a partial average.
    """
    if not isinstance(groups, Mapping):
        raise ParameterError(
            "must be names of averages with their tasks, such as {small: [mnist, cifar10]}",
            parameter="groups",
            value=groups,
        )
    members_of = {}
    for name, given in groups.items():
        members = require_names(f"groups.{name}", given)
        if not members:
            rule = "must name at least one task"
            raise ParameterError(rule, parameter=f"groups.{name}", value=given)
        if not isinstance(name, str):
            rule = "must have names that are texts"
            raise ParameterError(rule, parameter="groups", value=name)
        if name.endswith(PARTIAL_SUFFIX):
            raise ParameterError(
                f"must have names that do not end with {PARTIAL_SUFFIX!r}, which marks averages "
                "over a part of the tasks",
                parameter="groups",
                value=name,
            )
        members_of[name] = members
    return members_of


def check_groups(groups: Mapping[str, Sequence[str]], known: Collection[str], suite: bool) -> None:
    """Raise InputError if a group is not as it must be, before anything is computed.

    Args:
        groups: see `averages`.
        known: names of the tasks that there are, without protocols. Tasks of DataComp's that are
            not among them make an average partial; other names are taken for mistakes.
        suite: whether a suite is evaluated, of which tasks of any name may be missing. Metrics,
            as in `task:metric`, are not checked.
    """
    possible = dict.fromkeys([*known, *KNOWN_TASKS])
    for name, members in group_members(groups).items():
        for member in members:
            task = _PROTOCOL.sub("", member.partition(":")[0])
            if task not in possible and not suite:
                close = get_close_matches(task, possible, n=1)
                hint = f"Did you mean {close[0]!r}? " if close else ""
                raise ParameterError(
                    "must name tasks that are there or DataComp's",
                    parameter=f"groups.{name}",
                    value=member,
                    way_out=f"{hint}There are {sorted(known)}.",
                )


def averages(
    values: Mapping[str, float | None],
    groups: Mapping[str, Sequence[str]],
    *,
    metrics: Mapping[str, Mapping[str, float | None]] | None = None,
) -> dict[str, Average]:
    """Compute the unweighted mean of every group, as DataComp takes it, by name of the group.

    Args:
        values: main metrics by task. None and NaN count as missing.
        groups: tasks by name of the group. `task:metric` takes that metric of the task in place
            of the main metric.
        metrics: all metrics by task, for members `task:metric`.

    Raises:
        InputError: see `group_members`, or a task that is there does not have the metric.

    Example:
        >>> from siftclip.eval import averages
        >>> groups = {"digits": ["mnist"], "all": ["mnist", "cifar10"]}
        >>> found = averages({"mnist": 0.5, "cifar10": 0.75}, groups)
        >>> {name: average.value for name, average in found.items()}
        {'digits': 0.5, 'all': 0.625}
    """
    return {
        name: _average(name, members, values, metrics or {})
        for name, members in group_members(groups).items()
    }


def result_averages(
    results: Iterable[TaskResult], groups: Mapping[str, Sequence[str]]
) -> dict[str, Average]:
    """Compute `averages` of the results of one model, each task at most once."""
    all_results = list(results)
    return averages(
        {result.key: result.main_metric for result in all_results},
        groups,
        metrics={result.key: result.metrics for result in all_results},
    )


def _average(
    name: str,
    members: Sequence[str],
    values: Mapping[str, float | None],
    metrics: Mapping[str, Mapping[str, float | None]],
) -> Average:
    value_of = {member: _member_value(name, member, values, metrics) for member in members}
    known = [value for member in members if (value := value_of[member]) is not None]
    return Average(
        name=name,
        value=math.fsum(known) / len(known) if known else None,
        present=tuple(member for member in members if value_of[member] is not None),
        missing=tuple(member for member in members if value_of[member] is None),
    )


def _member_value(
    group: str,
    member: str,
    values: Mapping[str, float | None],
    metrics: Mapping[str, Mapping[str, float | None]],
) -> float | None:
    task, _, metric = member.partition(":")
    if metric:
        if task not in metrics:
            return None
        if metric not in metrics[task]:
            raise ParameterError(
                f"must not ask for a metric that {task} does not have",
                parameter=f"groups.{group}",
                value=member,
                way_out=f"It has {sorted(metrics[task])}.",
            )
        value = metrics[task][metric]
    else:
        value = values.get(task)
    return None if value is None or math.isnan(value) else value


def named_values(results: Mapping[str, Average]) -> dict[str, float | None]:
    """Name averages for files and loggers: `NAME` if complete, else `NAME (partial)`."""
    return {
        result.name if result.complete else f"{result.name}{PARTIAL_SUFFIX}": result.value
        for result in results.values()
    }


def member_outcomes(
    member: str, by_key: Mapping[str, TaskResult]
) -> tuple[Outcomes | None, np.ndarray | None]:
    """Return what a member of a group is made of and its units, uint64 [n], where they are kept.

    Args:
        member: `task`, or `task:metric`.
        by_key: results by task.
    """
    key, _, metric = member.partition(":")
    if key not in by_key:
        return None, None
    outcomes = by_key[key].outcomes_of(metric or MAIN_METRIC)
    return outcomes, None if outcomes is None else by_key[key].units
