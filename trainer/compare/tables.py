"""The tables of a comparison: mean and standard deviation over seeds, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from siftclip.trainer.compare.collect import Comparison


def spread(comparison: Comparison, tasks: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation of main metrics over seeds.

    Returns:
        A frame with a row an arm, in the order of the comparison, and the columns (task, `mean`)
        and (task, `sd`). The deviation is that of a sample, NaN for one seed. A
        mean is NaN where a run has no value, never a mean of fewer runs.
    """
    frame = comparison.results
    main = frame[(frame["metric"] == "main_metric") & frame["task"].isin(tasks)]
    columns = {}
    for task in tasks:
        values = main[main["task"] == task].set_index("arm")["value"].astype(float)
        groups = values.groupby(level="arm")
        complete = groups.apply(lambda group: group.notna().all())
        columns[task, "mean"] = groups.mean().where(complete)
        columns[task, "sd"] = groups.std(ddof=1).where(complete)
    return pd.DataFrame(columns).loc[list(comparison.arms)]


def percent(mean: float, deviation: float) -> str:
    """`51.7 ± 1.0` for shares; without a deviation from one seed; `-` where there is no value."""
    if pd.isna(mean):
        return "-"
    text = f"{100 * mean:.1f}"
    return text if pd.isna(deviation) else f"{text} ± {100 * deviation:.1f}"


def title(task: str) -> str:
    """What a table calls a task or an average."""
    return task.removeprefix("average/")


def main_rows(comparison: Comparison, tasks: Sequence[str]) -> list[list[str]]:
    """Header and one row an arm: kept, passes, the tasks in percent, seconds of training."""
    table = spread(comparison, tasks)
    cells = [(table[task, "mean"], table[task, "sd"]) for task in tasks]
    runs = comparison.runs.groupby("arm")
    rows = [["selector", "kept", "passes", *(title(task) for task in tasks), "train s"]]
    for arm in comparison.arms:
        own = runs.get_group(arm)
        rows.append(
            [
                arm,
                f"{own['selected_samples'].mean():.0f}",
                f"{own['passes'].mean():.1f}",
                *(
                    percent(float(means[arm]), float(deviations[arm]))
                    for means, deviations in cells
                ),
                f"{own['train_seconds'].mean():.0f}",
            ]
        )
    return rows


def cost_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row an arm, means over seeds: samples, FLOPs and seconds by their use.

    Published comparisons count by one of them, and which one decides who wins. FLOPs that a run of
    the arm does not know are unknown.
    """
    rows = [
        [
            *("selector", "in the loop", "steps", "drawn", "loaded", "scored", "trained"),
            *("training TFLOP", "scoring TFLOP"),
            *("offline s", "train s", "waiting s", "scoring s", "selecting s"),
        ]
    ]
    runs = comparison.runs.groupby("arm")
    for arm in comparison.arms:
        own = runs.get_group(arm)
        samples = [own[f"{name}_samples"].mean() for name in ("drawn", "loaded", "scored")]
        flops = [
            own[f"{name}_flops"].mean(skipna=False) / 1e12 if f"{name}_flops" in own else math.nan
            for name in ("training", "scoring")
        ]
        names = ("offline_selection", "train", "data_wait", "scoring", "selection")
        rows.append(
            [
                arm,
                str(own["online"].iloc[0]),
                f"{own['steps'].mean():,.0f}",
                *(f"{count:,.0f}" for count in [*samples, own["trained_samples"].mean()]),
                *("unknown" if math.isnan(count) else f"{count:.3g}" for count in flops),
                *(f"{own[f'{name}_seconds'].mean():,.0f}" for name in names),
            ]
        )
    return rows


def selection_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row an arm: Jaccard overlap with the others, kinds where truth is known."""
    rows = [["selector", *(f"overlap with {arm}" for arm in comparison.arms)]]
    for arm in comparison.arms:
        rows.append([arm, *(f"{share:.2f}" for share in comparison.overlap.loc[arm])])
    if comparison.truth is not None:
        for kind in comparison.truth.columns:
            rows[0].append(str(kind))
            for row, share in zip(rows[1:], comparison.truth[kind], strict=True):
                row.append(f"{100 * share:.1f} %")
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def format_main_table(comparison: Comparison) -> str:
    """What the command prints: results, and costs where arms differ by what the loop selects."""
    main = as_text(main_rows(comparison, comparison.columns))
    if (comparison.runs["online"] == "once").all():
        return main
    return f"{main}\n\n{as_text(cost_rows(comparison))}"
