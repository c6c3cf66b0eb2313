"""Writes a comparison as `report.md`, `report.html` and `results.csv`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from siftclip.eval.reports.seed_comparison import SIGNIFICANCE, least_p_value
from siftclip.files import write_text
from siftclip.redaction import shown
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.tables import (
    MISSING_NOTE,
    as_markdown,
    cost_rows,
    main_rows,
    missing_lines,
    number,
    percent,
    selection_rows,
    spread,
    title,
)
from siftclip.trainer.runtime.environment import CODE, MACHINE, mixed
from siftclip.writing import atomic_path

COST_NOTE = (
    "Means over seeds. Drawn: taken from the selection's order; loaded: read and decoded; scored: "
    "by a forward pass; FLOPs of the towers, a multiplication and an addition being two. Seconds "
    "of training contain those of waiting for data, scoring and selecting; those of the "
    "selection before training come on top, without the embedding of the pool."
)
TEMPLATE_NAME = "report.html.j2"


def resolution_note(comparison: ArmComparison) -> str:
    """Say what the numbers of the tables are, and which differences they can show."""
    count = len(comparison.seeds)
    if count == 1:
        return (
            "Values are percent, from one seed: no estimate of the variance. This compares models, "
            "not methods: another seed of the same method moves the values too."
        )
    least = least_p_value(count, count)
    note = (
        f"Values are percent, mean ± standard deviation over {count} seeds. Differences below "
        "about two standard deviations may be noise: another seed of the same method moves the "
        f"values as much. An exact test of two arms, with {count} seeds of each, has no p value "
        f"below {least:.2g}"
    )
    return (
        f"{note}, so no difference is significant at 5 %." if least > SIGNIFICANCE else f"{note}."
    )


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


def write_report(comparison: ArmComparison, folder: Path) -> None:
    """Write the three files into `folder`, each atomically."""
    with atomic_path(folder / "results.csv") as temporary:
        comparison.results.to_csv(temporary, index=False)
    write_text(folder / "report.md", shown(markdown(comparison)))
    write_text(folder / "report.html", shown(html(comparison)))


def _tasks(comparison: ArmComparison) -> list[str]:
    return list(dict.fromkeys(comparison.results["task"]))


def budget_sentence(comparison: ArmComparison) -> str:
    """Say what all arms had in common."""
    runs = comparison.runs
    trained = int(runs["trained_samples"].iloc[0])
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    word = "seed" if len(comparison.seeds) == 1 else "seeds"
    batch = comparison.settings["scale"]["global_batch_size"]
    limits = {k: v for k, v in comparison.settings["budget"].items() if v is not None}
    if limits:
        ((unit, amount),) = limits.items()
        budget = f"had {amount:,g} {unit.replace('_', ' ')}, in steps of batch {batch}"
    else:
        steps = int(runs["steps"].iloc[0])
        budget = f"trained on {trained:,} samples in {steps:,} steps of batch {batch}"
    return f"{len(comparison.arms)} selectors, {word} {seeds}; every run {budget}."


def markdown(comparison: ArmComparison) -> str:
    """Format the report as Markdown."""
    header, *runs = run_rows(comparison)
    parts = [
        f"# {comparison.name}",
        budget_sentence(comparison),
        as_markdown(main_rows(comparison, comparison.columns)),
        resolution_note(comparison),
        *mixed_notes(comparison),
        *_missing_part(comparison),
        "## All tasks",
        as_markdown(main_rows(comparison, _tasks(comparison))),
        "## What it cost",
        as_markdown(cost_rows(comparison)),
        COST_NOTE,
        "## What was selected",
        as_markdown(selection_rows(comparison)),
        "Overlap is the Jaccard index of the distinct samples, for the first seed.",
        "## Runs",
        as_markdown([header, *([f"`{run}`", *cells] for run, *cells in runs)]),
        "## Settings",
        "```yaml\n" + yaml.safe_dump(comparison.settings, sort_keys=False).rstrip() + "\n```",
        made_with(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def _missing_part(comparison: ArmComparison) -> list[str]:
    lines = missing_lines(comparison)
    return [MISSING_NOTE, "\n".join(f"- {line}" for line in lines)] if lines else []


def html(comparison: ArmComparison) -> str:
    """Format the report as one HTML page without scripts or anything from the network."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE_NAME).render(
        name=comparison.name,
        budget=budget_sentence(comparison),
        note=resolution_note(comparison),
        main=main_rows(comparison, comparison.columns),
        tasks=main_rows(comparison, _tasks(comparison)),
        cost=cost_rows(comparison),
        cost_note=COST_NOTE,
        selected=selection_rows(comparison),
        plots=[plot(comparison, task) for task in comparison.columns],
        missing_note=MISSING_NOTE,
        missing=missing_lines(comparison),
        runs=run_rows(comparison),
        settings=yaml.safe_dump(comparison.settings, sort_keys=False),
        mixed=mixed_notes(comparison),
        made_with=made_with(comparison),
    )


def made_with(comparison: ArmComparison) -> str:
    """Name the code and versions that all runs have in common; `mixed_notes` has the others."""
    sessions = [of_run for run in comparison.environments.values() for of_run in run]
    common = {
        name: value
        for name, value in (sessions[0] if sessions else {}).items()
        if value and all(session.get(name) == value for session in sessions)
    }
    return f"Made with {', '.join(f'{name} {value}' for name, value in common.items())}."


def mixed_notes(comparison: ArmComparison) -> list[str]:
    """Say in a sentence each what the runs were not all computed with, and what that means."""
    differing = mixed(comparison.environments)
    notes = [
        f"The runs differ in {name}: "
        + "; ".join(f"{value} ({', '.join(runs)})" for value, runs in by_value.items())
        + "."
        for name, by_value in differing.items()
    ]
    if set(differing) & set(CODE):
        notes.append(
            "Differences between arms may be those of the code: train them again with one."
        )
    if set(differing) & set(MACHINE):
        notes.append(
            "Another processor or number of threads moves a run as another seed does, so that "
            "equal seeds are not paired here."
        )
    return notes


def plot(comparison: ArmComparison, task: str) -> dict[str, Any]:
    """Plot one task by dots: for each arm its seeds, mean and deviation on an axis in percent.

    Positions are shares of the axis in [0, 1]; the axis ends at round percentages around the data.
    """
    frame = comparison.results
    main = frame[(frame["metric"] == "main_metric") & (frame["task"] == task)]
    table = spread(comparison, [task]) * 100
    means, deviations = table[task, "mean"], table[task, "sd"].fillna(0.0)
    ends = [main["value"].astype(float) * 100, means - deviations, means + deviations]
    low, high = _axis(pd.concat(ends).dropna())
    arms = []
    for arm in comparison.arms:
        mean = float(means[arm])
        deviation = float(table[task, "sd"][arm])
        values = main[main["arm"] == arm]["value"].astype(float) * 100
        whisker = 0.0 if pd.isna(deviation) else deviation
        arms.append(
            {
                "arm": arm,
                "text": percent(mean / 100, deviation / 100),
                "dots": [(value - low) / (high - low) for value in values.dropna()],
                "mean": None if pd.isna(mean) else (mean - low) / (high - low),
                "start": max(0.0, (mean - whisker - low) / (high - low)),
                "end": min(1.0, (mean + whisker - low) / (high - low)),
            }
        )
    return {"title": title(task), "low": f"{low:g}", "high": f"{high:g}", "arms": arms}


def _axis(values: pd.Series[float]) -> tuple[float, float]:
    """Choose multiples of 5 around the values, at least 5 apart."""
    if len(values) == 0:
        return 0.0, 100.0
    low = 5 * (values.min() // 5)
    high = max(low + 5, 5 * -(-values.max() // 5))
    return max(0.0, float(low)), min(100.0, float(high))
