"""The tables of a comparison as text: means over seeds, and differences to the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from siftclip.eval.reports.report import p_text
from siftclip.eval.significance.arm_tests import chance_of_best
from siftclip.redaction import printable
from siftclip.tables import ruled_table, wrapped
from siftclip.trainer.compare.answer import (
    aa_sentence,
    answer,
    column_title,
    interval_points,
    more_seeds,
    points,
)
from siftclip.trainer.compare.collect import ArmComparison

BEST = " ★"
BEST_NOTE = "★: better than every other arm, where that is resolved."
MISSING_NOTE = "A mean that lacks a seed is not shown (-). Missing:"


def spread(comparison: ArmComparison, tasks: Sequence[str]) -> pd.DataFrame:
    """Compute mean and standard deviation of main metrics over seeds.

    Returns:
        A frame with one row per arm, in the order of the comparison, and the columns (task,
        `mean`) and (task, `sd`). The deviation is that of a sample, NaN for one seed. A mean is NaN
        where a seed has no value, whatever the reason, never a mean of fewer seeds.
    """
    frame = comparison.results
    main = frame[frame["metric"] == "main_metric"]
    places = pd.MultiIndex.from_tuples(
        [(arm, seed) for arm in comparison.arms for seed in comparison.seeds[arm]]
    )
    wanted = pd.Series({arm: len(comparison.seeds[arm]) for arm in comparison.arms})
    columns = {}
    for task in tasks:
        rows = main[main["task"] == task].set_index(["arm", "seed"])
        groups = rows["value"].astype(float).reindex(places).groupby(level=0)
        complete = groups.count().eq(wanted)
        columns[task, "mean"] = groups.mean().where(complete)
        columns[task, "sd"] = groups.std(ddof=1).where(complete)
    return pd.DataFrame(columns).loc[list(comparison.arms)]


def run_means(comparison: ArmComparison, arm: str, name: str) -> float:
    """Average a number of the runs' summaries over the seeds; NaN where a run lacks it."""
    runs = comparison.runs
    if name not in runs:
        return float("nan")
    values = runs[runs["arm"] == arm][name].dropna()
    return float(values.mean()) if len(values) == len(comparison.seeds[arm]) else float("nan")


def number(value: float, form: str) -> str:
    """Format a number, or return `-` where there is none."""
    return "-" if pd.isna(value) else format(value, form)


def seed_count(comparison: ArmComparison, arm: str) -> str:
    """Count the seeds of an arm: `3`, or `2 of 3`."""
    count, wanted = int((comparison.runs["arm"] == arm).sum()), len(comparison.seeds[arm])
    return str(count) if count == wanted else f"{count} of {wanted}"


def percent(mean: float, deviation: float) -> str:
    """Format as `51.7 ± 1.0` for shares; one seed has no deviation; `-` where there is no value."""
    if pd.isna(mean):
        return "-"
    text = f"{100 * mean:.1f}"
    return text if pd.isna(deviation) else f"{text} ± {100 * deviation:.1f}"


def main_rows(comparison: ArmComparison, tasks: Sequence[str]) -> list[list[str]]:
    """Return header and one row per arm: seeds, kept, passes, tasks in percent, training time."""
    table = spread(comparison, tasks)
    cells = [(table[task, "mean"], table[task, "sd"]) for task in tasks]
    rows = [["arm", "seeds", "kept", "passes", *(column_title(task) for task in tasks), "train s"]]
    for arm in comparison.arms:
        rows.append(
            [
                arm,
                seed_count(comparison, arm),
                number(run_means(comparison, arm, "selected_samples"), ".0f"),
                number(run_means(comparison, arm, "passes"), ".1f"),
                *(
                    percent(float(means[arm]), float(deviations[arm]))
                    for means, deviations in cells
                ),
                number(run_means(comparison, arm, "train_seconds"), ".0f"),
            ]
        )
    return rows


def marked_best(
    rows: Sequence[Sequence[str]], comparison: ArmComparison, columns: Sequence[str]
) -> list[list[str]]:
    """Mark the best arm of each column in the rows of `main_rows`, where that is resolved.

    Args:
        rows: their last column but the tasks' is the training time.
        comparison: of all arms.
        columns: those of the rows.
    """
    marked = [[*row] for row in rows]
    for number, column in enumerate(columns, start=len(rows[0]) - len(columns) - 1):
        best = comparison.tests[column].best if column in comparison.tests else None
        for row in marked[1:]:
            row[number] += BEST if row[0] == best else ""
    return marked


def cost_summary_rows(comparison: ArmComparison) -> list[list[str]]:
    """Return header and one row per arm: what `cost_rows` says, in short."""
    rows = [["arm", "trained", "TFLOP", "train s", "selection s"]]
    for arm in comparison.arms:
        flops = [run_means(comparison, arm, f"{name}_flops") for name in ("training", "scoring")]
        rows.append(
            [
                arm,
                number(run_means(comparison, arm, "trained_samples"), ",.0f"),
                number(sum(flops) / 1e12, ".3g"),
                number(run_means(comparison, arm, "train_seconds"), ",.0f"),
                number(run_means(comparison, arm, "offline_selection_seconds"), ",.1f"),
            ]
        )
    return rows


def difference_rows(comparison: ArmComparison, column: str) -> list[list[str]]:
    """Return header and one row per arm: its mean and its difference to the baseline, in percent.

    Args:
        comparison: of all arms.
        column: a task, or `average/NAME`.
    """
    tested = comparison.tests[column]
    rows = [
        [
            *("arm", column_title(column), "difference", "95 % interval", "p", "least resolved"),
            *("chance to be best", "seeds needed"),
        ]
    ]
    chances = None if tested.tests is None else chance_of_best(tested.tests.model)
    for arm in comparison.arms:
        row = [arm] + ["-"] * (len(rows[0]) - 1)
        rows.append(row)
        if tested.tests is None or arm not in tested.arms:
            continue
        at, tests = tested.arms.index(arm), tested.tests
        row[1] = points(float(tests.model.means[at]))
        if chances is not None:
            row[6] = f"{100 * float(chances[at]):.0f} %"
        difference = tests.of(at)
        if difference is None:
            row[2] = "baseline"
            continue
        row[2] = points(difference.value, "+") + ("*" if tested.resolved(arm) else "")
        if difference.interval is not None:
            row[3] = interval_points(difference.interval)
            row[4] = p_text(difference.p_value)
            row[5] = points(difference.least or 0.0)
            row[7] = more_seeds(tested, arm)
    return rows


def cost_rows(comparison: ArmComparison) -> list[list[str]]:
    """Return header and one row per arm, means over seeds: samples, FLOPs, the time breakdown.

    Published comparisons count by one of them, and which one decides who wins. FLOPs that a run of
    the arm does not know are unknown.
    """
    rows = [
        [
            *("arm", "seeds", "in the loop", "steps", "drawn", "loaded", "scored", "trained"),
            *("training TFLOP", "scoring TFLOP"),
            *("selection before training s", "train s", "waiting s", "scoring s"),
            "selection during training s",
        ]
    ]
    counts = [f"{name}_samples" for name in ("drawn", "loaded", "scored", "trained")]
    seconds = [
        f"{name}_seconds"
        for name in ("offline_selection", "train", "data_wait", "scoring", "selection")
    ]
    for arm in comparison.arms:
        runs = comparison.runs[comparison.runs["arm"] == arm]
        means = {
            name: run_means(comparison, arm, name)
            for name in ("steps", *counts, "training_flops", "scoring_flops", *seconds)
        }
        flops = [
            "unknown"
            if len(runs) and runs.reindex(columns=[name])[name].isna().any()
            else number(means[name] / 1e12, ".3g")
            for name in ("training_flops", "scoring_flops")
        ]
        rows.append(
            [
                arm,
                seed_count(comparison, arm),
                _online(str(runs["online"].iloc[0])) if len(runs) else "-",
                *(number(means[name], ",.0f") for name in ("steps", *counts)),
                *flops,
                *(number(means[name], ",.0f") for name in seconds),
            ]
        )
    return rows


def _online(name: str) -> str:
    return "selected before training" if name == "once" else name


def selection_rows(comparison: ArmComparison) -> list[list[str]]:
    """Return header and one row per arm: Jaccard overlap with the others, kinds if known."""
    rows = [["arm", *(f"overlap with {arm}" for arm in comparison.arms)]]
    for arm in comparison.arms:
        rows.append(
            [arm, *(number(share, ".2f") for share in np.asarray(comparison.overlap.loc[arm]))]
        )
    if comparison.truth is not None:
        for kind in comparison.truth.columns:
            rows[0].append(str(kind))
            for row, share in zip(rows[1:], comparison.truth[kind], strict=True):
                row.append("-" if pd.isna(share) else f"{100 * share:.1f} %")
    return rows


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; pipes in cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def missing_lines(comparison: ArmComparison) -> list[str]:
    """Say what has no value and why, one line each; all characters are printable."""
    return [printable(missing.text()) for missing in comparison.missing]


def format_main_table(comparison: ArmComparison) -> str:
    """Format what the command prints: results, costs of online selection, missing values."""
    first = comparison.columns[0]
    sentences = [answer(comparison, first), aa_sentence(comparison, first)]
    parts = ["\n".join(line for text in sentences if text for line in wrapped(text))]
    parts.append(ruled_table(main_rows(comparison, comparison.columns)))
    tests = comparison.tests[first].tests
    if tests is not None and tests.model.freedom and len(comparison.arms) > 1:
        parts.append(ruled_table(difference_rows(comparison, first)))
    if (comparison.runs["online"] != "once").any():
        parts.append(ruled_table(cost_rows(comparison)))
    if comparison.missing:
        parts.append("\n".join([MISSING_NOTE, *missing_lines(comparison)]))
    return "\n\n".join(parts)


def run_rows(comparison: ArmComparison) -> list[list[str]]:
    """Return the header and one row per finished run."""
    rows = [["run", "arm", "seed", "selected", "coverage", "passes", "train s"]]
    for run in comparison.runs.to_dict("records"):
        rows.append(
            [
                str(run["run"]),
                str(run["arm"]),
                str(run["seed"]),
                number(run["selected_samples"], ".0f"),
                f"{number(100 * run['coverage'], '.1f')} %",
                number(run["passes"], ".2f"),
                number(run["train_seconds"], ".1f"),
            ]
        )
    return rows
