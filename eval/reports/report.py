"""What an evaluation says: main metrics and averages with intervals, and what is missing.

As a table for the terminal, as names for loggers, as rows for wandb, and as CSV.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftclip.errors import InputError, require_int
from siftclip.eval.probes.probe_scores import IN_TRAIN
from siftclip.eval.results.aggregates import (
    Average,
    group_members,
    member_outcomes,
    named_values,
    result_averages,
)
from siftclip.eval.results.files import MAIN_METRIC, TaskResult
from siftclip.eval.significance.resampling import average_interval, replicates
from siftclip.eval.tasks.kinds.values import OWN_FAMILY
from siftclip.eval.tasks.known_tasks import KNOWN_TASKS
from siftclip.eval.tasks.preparation import TaskFailure
from siftclip.redaction import printable
from siftclip.tables import (
    NARROW,
    NOTHING,
    cut,
    listed,
    table_width,
    text_table,
    wrapped,
    write_csv_rows,
)

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]

# In the order of a table; families of other tools come last.
FAMILY_TITLES = {
    "imagenet": "ImageNet",
    "imagenet_shifts": "ImageNet distribution shifts",
    "vtab": "VTAB",
    "retrieval": "Retrieval",
    "wilds": "WILDS",
    "fairness": "Fairness",
    "other": "Other",
    OWN_FAMILY: "Custom tasks",
    "linear_probe": "Linear probes",
    "few_shot": "Few-shot",
}
_COLUMNS = (
    "task", "title", "family", "metric", "value", "low", "high", "chance", "samples", "seconds",
    "tasks_present", "tasks_total", "note",
)  # fmt: skip
_METRIC_WIDTH = 24
_NO_METRIC = "no main metric"
_FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Summary:
    """The results of one model with the averages over groups of tasks."""

    results: tuple[TaskResult, ...]
    averages: Mapping[str, Average]  # by group
    average_intervals: Mapping[str, Interval | None]  # 95 %, by group
    average_chances: Mapping[str, float | None]  # what guessing scores, by group
    average_notes: Mapping[str, str]  # why an average has no interval, by group
    missing: tuple[str, ...]  # tasks without a result that have not failed
    failures: tuple[TaskFailure, ...]

    def table(self) -> str:
        """Format for people: tasks by family, averages, what is missing or wrong, why tasks failed.

        As wide as the terminal, from 72 to 100 columns, but for words that are longer; below 92
        the chance levels are left out. All characters are printable.
        """
        rows = (*self.results, *self.failures)
        lines = _task_lines(self.results, self.failures) if rows else ["no results"]
        if self.averages:
            of_averages = [
                (
                    name,
                    average.text(),
                    interval_text(self.average_intervals[name]),
                    number_text(self.average_chances[name]),
                )
                for name, average in self.averages.items()
            ]
            header = ("average", "value", "95 % interval", "chance")
            lines += ["", *text_table(header, of_averages, right=(3,))]
        notes = [(result.key, note) for result in self.results if (note := result_note(result))]
        notes += [(name, note) for name, note in self.average_notes.items() if note]
        if self.missing or self.failures or notes:
            lines.append("")
        for key, note in notes:
            lines += wrapped(f"{key}: {note}")
        if self.missing:
            lines += wrapped(f"missing: {', '.join(self.missing)}")
        for failure in self.failures:
            lines += wrapped(f"failed: {failure.key}: {failure.message}")
        return "\n".join(lines)

    @property
    def frame(self) -> pd.DataFrame:
        """The rows of `records` as a table of pandas."""
        import pandas as pd

        return pd.DataFrame(self.records(), columns=[*_COLUMNS])

    def __repr__(self) -> str:
        return f"Summary of {len(self.results)} tasks\n{self.table()}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"

    def metrics(self) -> dict[str, float]:
        """Return all numbers that are defined, by the name they are logged under.

        `eval/<task>/<metric>` and `eval/average/<group>`; the name of a partial average says so,
        so that its curve is not continued by that of other tasks.
        """
        values = {
            f"eval/{result.key}/{name}": value
            for result in self.results
            for name, value in result.metrics.items()
        }
        for name, value in named_values(self.averages).items():
            values[f"eval/average/{name}"] = value
        return {name: value for name, value in values.items() if value is not None}

    def records(self) -> list[dict[str, Any]]:
        """Return one row per task, then one per average, all with the same keys; None for no value.

        task, title, family, metric, value, low, high (95 %), chance, samples, seconds; of averages
        tasks_present and tasks_total; note, why a task has no value, or what is wrong with it.
        """
        rows = [_task_record(result) for result in self.results]
        rows += [_failure_row(failure) for failure in self.failures]
        names = named_values(self.averages)
        for name, (group, average) in zip(names, self.averages.items(), strict=True):
            low, high = self.average_intervals[group] or (None, None)
            rows.append(
                {
                    **dict.fromkeys(_COLUMNS),
                    "task": f"average/{name}",
                    "title": name,
                    "value": average.value,
                    "low": low,
                    "high": high,
                    "chance": self.average_chances[group],
                    "note": self.average_notes[group] or None,
                    "tasks_present": len(average.present),
                    "tasks_total": len(average.present) + len(average.missing),
                }
            )
        return rows


def summarise(
    results: Sequence[TaskResult],
    groups: Mapping[str, Sequence[str]],
    *,
    missing: Sequence[str] = (),
    failures: Sequence[TaskFailure] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Summary:
    """Summarise results with averages and their intervals.

    An interval of an average stands for the test sets that could have been drawn, as those of the
    tasks do; a partial average has that of the tasks which it is of. There is none where it is not
    kept what a member is made of; a note says so.

    Args:
        results: of one model, each task once.
        groups: tasks, or `task:metric`, by name of the average.
        missing: tasks that were asked for and are not there. Members of groups without a result
            are added.
        failures: what failed.
        resamples: for the intervals; 0: none.
        seed: of the resamples.

    Raises:
        InputError: a task has two results, or see `averages`.
    """
    require_int("resamples", resamples, minimum=0)
    groups = group_members(groups)
    by_key = results_by_key(results)
    averages = result_averages(by_key.values(), groups)
    members = {name: average.present for name, average in averages.items()}
    intervals = _average_intervals(members, by_key, resamples, seed) if resamples else {}
    wanted = [*missing, *(m.partition(":")[0] for group in groups.values() for m in group)]
    accounted = by_key.keys() | {failure.key for failure in failures}
    return Summary(
        results=tuple(results),
        averages=averages,
        average_intervals={name: intervals.get(name) for name in averages},
        average_chances={name: average_chance(of, by_key) for name, of in members.items()},
        average_notes={
            name: interval_note(of, by_key) if resamples else "" for name, of in members.items()
        },
        missing=tuple(name for name in dict.fromkeys(wanted) if name not in accounted),
        failures=tuple(failures),
    )


def write_csv(path: Path, summary: Summary) -> None:
    """Write `Summary.records` as CSV, atomically, see `write_csv_rows`."""
    write_csv_rows(path, _COLUMNS, [[*record.values()] for record in summary.records()])


def results_by_key(results: Iterable[TaskResult]) -> dict[str, TaskResult]:
    """Index results by task.

    Raises:
        InputError: a task has two.
    """
    by_key: dict[str, TaskResult] = {}
    for result in results:
        if result.key in by_key:
            raise InputError(
                f"Each task must have one result. {result.key!r} has two: remove one of the lines "
                "of the results file."
            )
        by_key[result.key] = result
    return by_key


def result_note(result: TaskResult) -> str:
    """Say what is wrong with a result, if anything: why it has no value, or why it is too high."""
    if result.note:
        return f"no value: {result.note}"
    in_train = result.metrics.get(IN_TRAIN)
    if in_train:
        return f"{in_train:,.0f} of {result.samples:,} test images are in the train split, too"
    return ""


def chance_level(result: TaskResult, metric: str = MAIN_METRIC) -> float | None:
    """Return what guessing scores on a metric, where its kind or DataComp's list says so.

    In the list it depends on the frequency of the classes: a set of another size has another level.
    """
    name = result.main_metric_name if metric == MAIN_METRIC else metric
    if name is not None and name in result.chances:
        return result.chances[name]
    known = KNOWN_TASKS.get(result.key)
    if known is None or name not in (known.main_metric, MAIN_METRIC):
        return None
    if result.samples and result.samples != known.samples:  # files of DataComp's do not say
        return None
    return known.chance


def average_chance(members: Sequence[str], by_key: Mapping[str, TaskResult]) -> float | None:
    """Return what guessing scores on the average of members; None where one is not known."""
    levels = []
    for member in members:
        key, _, metric = member.partition(":")
        if key not in by_key:
            return None
        levels.append(chance_level(by_key[key], metric or MAIN_METRIC))
    known = [level for level in levels if level is not None]
    return sum(known) / len(known) if known and len(known) == len(levels) else None


def by_family(families: Iterable[str]) -> list[str]:
    """Return each family once, in the order of a table."""
    order = list(FAMILY_TITLES)
    given = list(dict.fromkeys(families))
    return sorted(given, key=lambda family: order.index(family) if family in order else len(order))


def shown_titles(results: Sequence[TaskResult]) -> dict[str, str]:
    """Return what a table calls each task, by key: its title, or its key where titles are equal."""
    titles = [result.dataset for result in results]
    return {
        result.key: result.dataset if titles.count(result.dataset) == 1 else result.key
        for result in results
    }


def number_text(value: float | None, form: str = ".4f") -> str:
    """Format a number with four decimals, or `-`."""
    return NOTHING if value is None else f"{value:{form}}"


def p_text(p_value: float | None) -> str:
    """Format a p value with four decimals, `<1e-4`, or `-`."""
    if p_value is None:
        return NOTHING
    return "<1e-4" if p_value < 1e-4 else f"{p_value:.4f}"


def interval_text(interval: Interval | None, form: str = ".4f") -> str:
    """Format as `[0.1234, 0.2345]`, or `-`."""
    return NOTHING if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _task_lines(results: Sequence[TaskResult], failures: Sequence[TaskFailure]) -> list[str]:
    titles = shown_titles(results)
    failed = [_failure_row(failure) for failure in failures]
    rows: list[Sequence[str] | str] = []
    families = [*(result.family for result in results), *(row["family"] for row in failed)]
    for family in by_family(families):
        rows.append(FAMILY_TITLES.get(family, family))
        rows += [
            (
                titles[result.key],
                f"{result.samples:,}" if result.samples else NOTHING,  # not in DataComp's files
                cut(printable(result.main_metric_name or _NO_METRIC), _METRIC_WIDTH),
                number_text(result.main_metric),
                interval_text(result.interval),
                number_text(chance_level(result)),
            )
            for result in results
            if result.family == family
        ]
        rows += [
            (row["title"], NOTHING, _FAILED, NOTHING, NOTHING, NOTHING)
            for row in failed
            if row["family"] == family
        ]
    header = ("task", "n", "metric", "value", "95 % interval", "chance")
    columns = len(header) - 1 if table_width() < NARROW else len(header)
    shown = [row if isinstance(row, str) else row[:columns] for row in rows]
    return text_table(header[:columns], shown, right=(1, 3, 5))


def _average_intervals(
    members: Mapping[str, Sequence[str]],
    by_key: Mapping[str, TaskResult],
    resamples: int,
    seed: int,
) -> dict[str, Interval | None]:
    """Compute intervals of averages over members of which all outcomes are kept, by group."""
    possible = {name: group for name, group in members.items() if not _unkept(group, by_key)}
    drawn = {}
    for member in dict.fromkeys(member for group in possible.values() for member in group):
        outcomes, units = member_outcomes(member, by_key)
        if outcomes is not None and units is not None:
            drawn[member] = replicates(outcomes, units, resamples=resamples, seed=seed)
    return {name: average_interval(drawn, group) for name, group in possible.items()}


def _unkept(members: Iterable[str], by_key: Mapping[str, TaskResult]) -> list[str]:
    """List the members of which it is not kept what they are made of."""
    return [member for member in members if member_outcomes(member, by_key)[0] is None]


def interval_note(members: Sequence[str], by_key: Mapping[str, TaskResult]) -> str:
    """Say why an average of members has no interval, if it has none."""
    unkept = _unkept(members, by_key)
    return f"no interval: what {listed(unkept)} is made of is not kept" if unkept else ""


def _task_record(result: TaskResult) -> dict[str, Any]:
    low, high = result.interval or (None, None)
    return {
        **dict.fromkeys(_COLUMNS),
        "task": result.key,
        "title": result.dataset,
        "family": result.family,
        "metric": result.main_metric_name,
        "value": result.main_metric,
        "low": low,
        "high": high,
        "chance": chance_level(result),
        "samples": result.samples,
        "seconds": result.seconds,
        "note": result_note(result) or None,
    }


def _failure_row(failure: TaskFailure) -> dict[str, Any]:
    known = KNOWN_TASKS.get(failure.key)
    return {
        **dict.fromkeys(_COLUMNS),
        "task": failure.key,
        "title": known.title if known else failure.key,
        "family": known.family if known else OWN_FAMILY,
        "note": f"{_FAILED}: {failure.message}",
    }
