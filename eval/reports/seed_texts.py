"""What a comparison of two models says about the methods that made them: texts about seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from siftclip.eval.reports.report import number_text, p_text
from siftclip.eval.reports.seed_comparison import SIGNIFICANCE, SeedComparison, SeedDifference
from siftclip.redaction import printable
from siftclip.tables import NARROW, listed, table_width, text_table

SIGNED = "+.4f"
_HEADER = ("by seed", "method of a", "method of b", "b - a", "Holm p", "p")
_NARROW_COLUMNS = 4


def seed_sentence(seeds: SeedComparison | None) -> str:
    """Say by how much seeds alone move the tasks; empty where that is not known."""
    tasks = () if seeds is None else seeds.tasks
    moved = [(task.between_seeds, task.title) for task in tasks if task.between_seeds is not None]
    if seeds is None or not moved:
        return ""
    largest, title = max(moved)
    counts = f"{seeds.runs_a} seeds"
    if not seeds.same_method:
        counts += f" of a's method, {seeds.runs_b} of b's"
    return (
        f"Seeds alone: two runs of one method differ by {fmean(size for size, _ in moved):.4f} "
        f"on a task on average, by {largest:.4f} on {printable(title)} ({counts})."
    )


def seed_table(seeds: SeedComparison | None) -> list[str]:
    """Format the methods by their seeds, after an empty line, if one of them has several."""
    if seeds is None or not seeds.compares_methods:
        return []
    rows = [
        (
            difference.title,
            _mean_text(difference.values_a),
            _mean_text(difference.values_b),
            number_text(difference.value, SIGNED),
            p_text(difference.p_holm) + ("*" if difference.significant else " "),
            p_text(difference.p_value),
        )
        for difference in (*seeds.tasks, *seeds.averages)
    ]
    columns = _NARROW_COLUMNS if table_width() < NARROW else len(_HEADER)
    shown = [row[:columns] for row in rows]
    return ["", *text_table(_HEADER[:columns], shown, right=(1, 2, 3, 4, 5))]


def within_seeds(
    significant: Iterable[tuple[str, str, float]], seeds: SeedComparison | None
) -> list[str]:
    """Say which significant differences of two models are no larger than those that seeds make.

    Args:
        significant: key, title and difference of each.
        seeds: of the methods.
    """
    known = {} if seeds is None or seeds.same_method else seeds.by_key
    small = [
        title
        for key, title, difference in significant
        if key in known and known[key].made_by_seeds(difference)
    ]
    if not small:
        return []
    return [f"no larger than what another seed of the same method makes (95 %): {listed(small)}"]


def about_methods(seeds: SeedComparison | None) -> list[str]:
    """Say what can be said about the methods, with seeds as the units."""
    if seeds is None or not seeds.compares_methods:
        return []
    least = seeds.least_p_value
    start = f"methods, by {seeds.runs_a} seeds of a's and {seeds.runs_b} of b's: "
    if least > SIGNIFICANCE:
        return [
            f"{start}an exact test over so few seeds has no p value below {least:.2g}, so nothing "
            "can be said at 5 %. Train more seeds: 4 of each have 0.029."
        ]
    lines = []
    for what, differences in (("tasks", seeds.tasks), ("averages", seeds.averages)):
        tested = [difference for difference in differences if difference.p_holm is not None]
        sure = [difference for difference in tested if difference.significant]
        if not tested:
            continue
        lines.append(
            f"{start}{len(sure)} of {len(tested)} differences of {what} are significant at 5 % "
            "after Holm's correction (permutations of the seeds)"
        )
        if len(tested) * least > SIGNIFICANCE:
            lines.append(
                f"So few seeds have no p value below {least:.2g}, which is not small enough "
                f"for {len(tested)} tests: train more, or name fewer tasks."
            )
        for name, sign in (("b", 1), ("a", -1)):
            won = [difference.title for difference in sure if sign * difference.value > 0]
            lines += [f"{name}'s method is better on {listed(won)}"] if won else []
    return lines


def seed_record(difference: SeedDifference | None) -> dict[str, Any]:
    """Return the columns of a table about seeds; None where there is no value."""
    return {
        "seeds_a": None if difference is None else len(difference.values_a),
        "seeds_b": None if difference is None else len(difference.values_b),
        "mean_a": None if difference is None else fmean(difference.values_a),
        "mean_b": None if difference is None else fmean(difference.values_b),
        "seed_sd": None if difference is None else difference.seed_deviation,
        "p_seeds": None if difference is None else difference.p_value,
        "p_seeds_holm": None if difference is None else difference.p_holm,
    }


def _mean_text(values: Sequence[float]) -> str:
    """Format as `0.6210 ± 0.0200 (3)`, or `0.6210 (1)`."""
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread} ({len(values)})"
