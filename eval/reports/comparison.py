"""Two models on the same test sets: which differences there are, and which of them are sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from siftclip.errors import InputError, require_int
from siftclip.eval.reports.report import (
    FAMILY_TITLES,
    by_family,
    interval_text,
    number_text,
    p_text,
    results_by_key,
    shown_titles,
)
from siftclip.eval.reports.seed_comparison import SIGNIFICANCE, SeedComparison, compare_seeds
from siftclip.eval.reports.seed_texts import (
    SIGNED,
    about_methods,
    seed_record,
    seed_sentence,
    seed_table,
    within_seeds,
)
from siftclip.eval.results.aggregates import averages, group_members, member_outcomes, named_values
from siftclip.eval.results.files import MAIN_METRIC, TaskResult
from siftclip.eval.significance.paired_tests import (
    PAIRED_RESAMPLES,
    PairedTest,
    compare_average,
    compare_task,
    holm,
)
from siftclip.redaction import printable
from siftclip.tables import (
    NARROW,
    display_width,
    listed,
    table_width,
    text_table,
    wrapped,
)

_HEADER = ("a", "b", "b - a", "95 % interval", "Holm p", "p")
_WIDTHS = (6, 6, 7, 18, 7, 6, 8)
_RIGHT = (1, 2, 3, 5, 6, 7)
_NARROW_COLUMNS = 6  # the task, and what a verdict rests on
_HEADLINE = "This compares two models, not the two methods that made them"
_SAME_MODEL = (
    "Both are results of one model, whose weights are equal: whatever differs is how it was asked."
)
_SAME_METHOD = (
    "These are two seeds of one method: whatever differs is the doing of the seed, however sure a "
    "test on images is of it."
)
_CAVEAT = (
    "This is about these two models on other test images of the same kind, not about the methods "
    "that made them: another seed of training moves the values too. To compare methods, train "
    "several seeds of each (siftclip compare)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Model b against model a on one task, or on the average of several."""

    key: str  # of the task; `average/<name>`, a partial one says so
    title: str
    family: str | None  # None: an average
    metric: str | None
    value_a: float | None
    value_b: float | None
    comparable: bool  # whether both values are there and of the same metric and test set
    note: str = ""  # why it is not comparable or not tested; "30 of 38", the tasks of an average
    test: PairedTest | None = None
    p_holm: float | None = None  # corrected for all tasks, or for all averages

    @property
    def value(self) -> float | None:
        """b - a, or None if the two are not comparable."""
        if not self.comparable or self.value_a is None or self.value_b is None:
            return None
        return self.value_b - self.value_a

    @property
    def significant(self) -> bool:
        """Whether it is at 5 %, after Holm's correction."""
        return self.p_holm is not None and self.p_holm <= SIGNIFICANCE

    def record(self) -> dict[str, Any]:
        """Return a row for tables and CSV; None where there is no value."""
        test = self.test
        low, high = (None, None) if test is None or test.interval is None else test.interval
        return {
            "task": self.key,
            "title": self.title,
            "family": self.family,
            "metric": self.metric,
            "value_a": self.value_a,
            "value_b": self.value_b,
            "difference": self.value,
            "low": low,
            "high": high,
            "p_value": None if test is None else test.p_value,
            "p_holm": self.p_holm,
            "p_mcnemar": None if test is None else test.mcnemar_p_value,
            "units": None if test is None else test.units,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """Two models on the tasks that both have results of, and on averages over these."""

    name_a: str
    name_b: str
    tasks: tuple[Difference, ...]
    averages: tuple[Difference, ...]
    only_a: tuple[str, ...]  # tasks that only one has a result of
    only_b: tuple[str, ...]
    asked_otherwise: tuple[str, ...]  # tasks whose labels or texts were not the same for both
    resamples: int
    failed: Mapping[str, str] = field(default_factory=dict)  # why a task failed, by `a: TASK`
    seeds: SeedComparison | None = None  # with other seeds of a or b, where there are any
    same_model: bool = False  # whether the weights are equal, so that no method is compared

    def headline(self) -> str:
        """Say what is compared, and by how much seeds alone move these tasks, if known."""
        if self.same_model:
            return _SAME_MODEL
        moved = seed_sentence(self.seeds)
        if self.seeds is not None and self.seeds.same_method:
            return f"{_SAME_METHOD} {moved}".rstrip()
        if not moved:
            return (
                f"{_HEADLINE}: one seed of each, so there is no estimate of the variance between "
                "seeds (seeds_a and seeds_b name other seeds)."
            )
        return f"{_HEADLINE}. {moved}"

    def table(self) -> str:
        """Format differences by family and of averages, what was not tested, and a verdict.

        Above all what is compared, and below the methods by their seeds, where there are several.

        As wide as the terminal, from 72 to 100 columns, but for words that are longer; below 92
        the last two columns are left out. All characters are printable.
        """
        lines = [*wrapped(f"a = {self.name_a}"), *wrapped(f"b = {self.name_b}")]
        lines += [*wrapped(self.headline()), ""]
        rows: list[Sequence[str] | str] = []
        for family in by_family(difference.family or "" for difference in self.tasks):
            rows.append(FAMILY_TITLES.get(family, family))
            rows += [
                (*_cells(difference), _mcnemar(difference))
                for difference in self.tasks
                if difference.family == family
            ]
        of_averages = [(*_cells(difference), difference.note) for difference in self.averages]
        titles = [printable(difference.title) for difference in (*self.tasks, *self.averages)]
        widths = (max(map(display_width, ["", *titles])) + 2, *_WIDTHS)  # for both to be aligned
        lines += _table(("task", *_HEADER, "McNemar"), rows, widths)
        if of_averages:
            lines += ["", *_table(("average", *_HEADER, "tasks"), of_averages, widths)]
        if table_width() < NARROW:
            lines += wrapped(
                "(p and McNemar: in a wider terminal, or in the file of the comparison)"
            )
        lines += seed_table(self.seeds)
        lines.append("")
        for task, message in self.failed.items():
            lines += wrapped(f"failed in {task}: {message}")
        for name, keys in (("a", self.only_a), ("b", self.only_b)):
            if keys:
                lines += wrapped(f"only in {name}: {', '.join(keys)}")
        if self.asked_otherwise:
            lines += wrapped(
                f"asked otherwise: {', '.join(self.asked_otherwise)}: labels, class names, "
                "templates or settings of the probe are not the same for a and b, so that "
                "differences are not those of the models alone"
            )
        reasons = dict.fromkeys(difference.note for difference in self.tasks if difference.note)
        for reason in reasons:
            keys = tuple(difference.key for difference in self.tasks if difference.note == reason)
            lines += wrapped(f"not tested: {', '.join(keys)}: {reason}")
        return "\n".join([*lines, *self.verdict()])

    def verdict(self) -> list[str]:
        """Say in sentences what b wins and loses, what the p values are, and what they omit."""
        lines = _conclusion("tasks", self.tasks) + within_seeds(
            _significant(self.tasks), self.seeds
        )
        if self.averages:
            lines += _conclusion("averages", self.averages)
            lines += within_seeds(_significant(self.averages), self.seeds)
        tests = sum(difference.p_holm is not None for difference in self.tasks)
        least = 2 / (self.resamples + 1)
        if tests * least > SIGNIFICANCE:
            lines.append(
                f"With {self.resamples:,} resamples no p value is small enough for {tests} tests: "
                "take more."
            )
        tested = any(difference.p_holm is not None for difference in (*self.tasks, *self.averages))
        if tested:
            lines.append(
                "p: how often models that are equally good would differ by as much, by resampling "
                f"the test images {self.resamples:,} times; so it is never below {least:.2g}, nor "
                "below McNemar's. Holm p: p corrected for the number of tasks, or of averages; go "
                f"by this one, * marks those of at most {SIGNIFICANCE}. McNemar: an exact p value "
                "from the images that one model only has right, for accuracies; rows that share an "
                "image count together; not corrected."
            )
        one_method = self.same_model or (self.seeds is not None and self.seeds.same_method)
        lines += about_methods(self.seeds) or ([_CAVEAT] if tested and not one_method else [])
        return [line for text in lines for line in wrapped(text)]

    def records(self) -> list[dict[str, Any]]:
        """Return one row per task, then one per average, see `Difference.record`, and seed data.

        seeds_a and seeds_b count the runs; mean_a and mean_b are over them, seed_sd is the standard
        deviation between seeds of one method, p_seeds and p_seeds_holm compare the methods.
        """
        known = {} if self.seeds is None else self.seeds.by_key
        return [
            difference.record() | seed_record(known.get(difference.key))
            for difference in (*self.tasks, *self.averages)
        ]


def compare_results(
    a: Sequence[TaskResult],
    b: Sequence[TaskResult],
    groups: Mapping[str, Sequence[str]],
    *,
    name_a: str = "the first model",
    name_b: str = "the second model",
    resamples: int = PAIRED_RESAMPLES,
    seed: int = 0,
    seeds_a: Sequence[Sequence[TaskResult]] = (),
    seeds_b: Sequence[Sequence[TaskResult]] = (),
    same_method: bool = False,
) -> PairedComparison:
    """Test model b against model a, on each task that both have and on averages.

    p values are two-sided; Holm's correction is over all tasks, and over all averages. An average
    is over those of its tasks that can be compared, and says so where it is a part; one without a
    shared task is left out.

    Args:
        a: of one model, each task once.
        b: of the other.
        groups: tasks, or `task:metric`, by name of the average.
        name_a: what to call the first one.
        name_b: what to call the second one.
        resamples: at least 1.
        seed: of the resamples.
        seeds_a: results of other seeds of a's method, see `compare_seeds`.
        seeds_b: of b's.
        same_method: whether a and b are two seeds of one method, of which `seeds_a` has the rest.

    Raises:
        InputError: no task is shared, a model has two results of a task, or see `averages`. What
            is wrong between two results of a task is a note of that task.
    """
    require_int("resamples", resamples, minimum=1)
    all_a, all_b = results_by_key(a), results_by_key(b)
    shared = [key for key in all_a if key in all_b]
    if not shared:
        raise InputError(
            "Two models must have results of at least one task in common to be compared. "
            f"{name_a} has {listed([*all_a])}; {name_b} has {listed([*all_b])}."
        )
    titles = shown_titles([all_a[key] for key in shared])
    tasks = [
        replace(_compare(all_a[key], all_b[key], resamples, seed), title=titles[key])
        for key in shared
    ]
    comparable = [difference.key for difference in tasks if difference.comparable]
    of_averages, members_by_key = _compare_averages(
        {key: all_a[key] for key in comparable},
        {key: all_b[key] for key in comparable},
        {
            name: members
            for name, members in group_members(groups).items()
            if any(member.partition(":")[0] in shared for member in members)
        },
        {difference.key: difference.test for difference in tasks if difference.test is not None},
        resamples,
        seed,
    )
    by_seed = compare_seeds(
        [a, *([b] if same_method else []), *seeds_a],
        [b, *seeds_b],
        {key: titles[key] for key in comparable},
        members_by_key,
        same_method=same_method,
    )
    return PairedComparison(
        name_a=name_a,
        name_b=name_b,
        tasks=_corrected(tasks),
        averages=_corrected(of_averages),
        only_a=tuple(key for key in all_a if key not in all_b),
        only_b=tuple(key for key in all_b if key not in all_a),
        asked_otherwise=tuple(key for key in shared if _asked_otherwise(all_a[key], all_b[key])),
        resamples=resamples,
        seeds=by_seed,
        same_model=_same_model(a, b),
    )


def _compare(a: TaskResult, b: TaskResult, resamples: int, seed: int) -> Difference:
    test, obstacle, untested = None, _obstacle(a, b), ""
    if a.outcomes is None or a.units is None or b.outcomes is None or b.units is None:
        if a.main_metric is not None and b.main_metric is not None:
            untested = "what the metric is made of is not kept for both models"
    elif not obstacle:
        try:
            test = compare_task(
                a.outcomes, b.outcomes, a.units, b.units, resamples=resamples, seed=seed
            )
        except InputError as error:
            obstacle = str(error)
    defined = a.main_metric is not None and b.main_metric is not None
    return Difference(
        key=a.key,
        title=a.dataset,
        family=a.family,
        metric=a.main_metric_name,
        value_a=a.main_metric,
        value_b=b.main_metric,
        comparable=defined and not obstacle,
        note=obstacle or untested,
        test=test,
    )


def _same_model(a: Sequence[TaskResult], b: Sequence[TaskResult]) -> bool:
    models = {result.model for result in (*a, *b)}
    return len(models) == 1 and None not in models


def _asked_otherwise(a: TaskResult, b: TaskResult) -> bool:
    return a.task is not None and b.task is not None and a.task != b.task


def _obstacle(a: TaskResult, b: TaskResult) -> str:
    """Say why two results of a task cannot be compared, as far as can be seen without outcomes."""
    names = {a.main_metric_name, b.main_metric_name}
    if len(names) > 1 and MAIN_METRIC not in names:  # the name in files of other tools
        return f"the main metrics differ: {a.main_metric_name} and {b.main_metric_name}"
    if (a.main_metric is None) != (b.main_metric is None):
        name, lacking = ("a", a) if a.main_metric is None else ("b", b)
        return f"the metric is not defined for {name}" + (lacking.note and f": {lacking.note}")
    if a.samples != b.samples and a.samples and b.samples:
        return f"the test sets differ: {a.samples:,} and {b.samples:,} samples"
    return ""


def _compare_averages(
    a: Mapping[str, TaskResult],
    b: Mapping[str, TaskResult],
    groups: Mapping[str, Sequence[str]],
    tests: Mapping[str, PairedTest],
    resamples: int,
    seed: int,
) -> tuple[list[Difference], dict[str, tuple[str, ...]]]:
    """Compare averages over the tasks that can be compared, and return their members by key."""
    metrics_a, metrics_b = _shared_metrics(a, b), _shared_metrics(b, a)
    of_a = averages({k: item.main_metric for k, item in a.items()}, groups, metrics=metrics_a)
    of_b = averages({k: item.main_metric for k, item in b.items()}, groups, metrics=metrics_b)
    by_key = {
        f"average/{name}": average
        for name, average in zip(named_values(of_a), of_a.values(), strict=True)
    }
    differences = [
        Difference(
            key=key,
            title=key.removeprefix("average/"),
            family=None,
            metric=None,
            value_a=average.value,
            value_b=of_b[average.name].value,
            comparable=average.value is not None,
            note=f"{len(average.present)} of {len(average.present) + len(average.missing)}",
            test=_average_test(average.present, a, b, tests, resamples, seed),
        )
        for key, average in by_key.items()
    ]
    return differences, {key: item.present for key, item in by_key.items() if item.present}


def _average_test(
    members: Sequence[str],
    a: Mapping[str, TaskResult],
    b: Mapping[str, TaskResult],
    of_tasks: Mapping[str, PairedTest],
    resamples: int,
    seed: int,
) -> PairedTest | None:
    """Test an average; None where it is not kept what a member is made of."""
    tests: dict[str, PairedTest] = {}
    for member in members:
        key, _, metric = member.partition(":")
        if metric in ("", a[key].main_metric_name) and key in of_tasks:
            tests[member] = of_tasks[key]
            continue
        (of_a, units_a), (of_b, units_b) = (member_outcomes(member, of) for of in (a, b))
        if of_a is None or of_b is None or units_a is None or units_b is None:
            return None
        try:
            tests[member] = compare_task(
                of_a, of_b, units_a, units_b, resamples=resamples, seed=seed
            )
        except InputError:  # the difference of the task says what
            return None
    return compare_average(tests, members)


def _shared_metrics(
    of: Mapping[str, TaskResult], other: Mapping[str, TaskResult]
) -> dict[str, dict[str, float | None]]:
    """Return all metrics by task, None where the other model lacks the value."""
    return {
        key: {
            name: result.metrics.get(name) if other[key].metrics.get(name) is not None else None
            for name in result.metrics.keys() | other[key].metrics.keys()
        }
        for key, result in of.items()
    }


def _corrected(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    """Add Holm's correction for all of them."""
    p_values = [
        None if difference.test is None else difference.test.p_value for difference in differences
    ]
    corrected = iter(holm([p for p in p_values if p is not None]).tolist())
    return tuple(
        difference if p is None else replace(difference, p_holm=next(corrected))
        for difference, p in zip(differences, p_values, strict=True)
    )


def _cells(difference: Difference) -> tuple[str, ...]:
    test = difference.test
    return (
        difference.title,
        number_text(difference.value_a),
        number_text(difference.value_b),
        number_text(difference.value, SIGNED),
        interval_text(None if test is None else test.interval, SIGNED),
        p_text(difference.p_holm) + ("*" if difference.significant else " "),
        p_text(None if test is None else test.p_value),
    )


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str] | str], widths: Sequence[int]
) -> list[str]:
    columns = _NARROW_COLUMNS if table_width() < NARROW else len(header)
    shown = [row if isinstance(row, str) else row[:columns] for row in rows]
    return text_table(header[:columns], shown, right=_RIGHT, least=widths[:columns])


def _mcnemar(difference: Difference) -> str:
    return p_text(None if difference.test is None else difference.test.mcnemar_p_value)


def _significant(differences: Sequence[Difference]) -> list[tuple[str, str, float]]:
    return [
        (difference.key, difference.title, difference.value or 0.0)
        for difference in differences
        if difference.significant
    ]


def _conclusion(what: str, differences: Sequence[Difference]) -> list[str]:
    tested = [difference for difference in differences if difference.p_holm is not None]
    if not tested:
        return [f"{what}: no difference was tested"]
    sure = [difference for difference in tested if difference.significant]
    won = [difference.title for difference in sure if (difference.value or 0.0) > 0]
    lost = [difference.title for difference in sure if (difference.value or 0.0) < 0]
    lines = [
        f"{what}: {len(sure)} of {len(tested)} differences are significant at 5 % after Holm's "
        f"correction, {len(won)} for b and {len(lost)} for a"
    ]
    lines += [f"model b is better on {listed(won)}"] if won else []
    lines += [f"model a is better on {listed(lost)}"] if lost else []
    if not sure:
        lines.append("Neither model is shown to be better, which may be noise, or too few images.")
    return lines
