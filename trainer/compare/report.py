"""Writes a comparison as `report.md`, `report.html` and `results.csv`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from siftclip.eval.significance.arm_tests import chance_of_best
from siftclip.files import write_text
from siftclip.redaction import shown
from siftclip.trainer.compare.answer import aa_sentence, answer, column_title, model_note
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.run_notes import RESULTS_NAME
from siftclip.trainer.compare.tables import (
    MISSING_NOTE,
    as_markdown,
    cost_rows,
    difference_rows,
    main_rows,
    missing_lines,
    number,
    percent,
    selection_rows,
    spread,
)
from siftclip.trainer.runtime.environment import CODE, MACHINE, mixed
from siftclip.writing import atomic_path

COST_NOTE = (
    "Means over seeds. Drawn: taken from the selection's order; loaded: read and decoded; scored: "
    "by a forward pass; FLOPs of the towers, a multiplication and an addition being two. Seconds "
    "of training contain those of waiting for data, scoring and selecting; those of the "
    "selection before training come on top, without the embedding of the pool."
)
DIFFERENCE_NOTE = (
    "Least resolved: the smallest difference that would have been. Chance to be best: how often "
    "the arm is the highest of all if true means are drawn as these data allow, each as likely "
    "before. Seeds needed: of each arm, for a true difference of this size to be resolved with a "
    "chance of 80 %. * marks what is resolved."
)
TEMPLATE_NAME = "report.html.j2"


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
    """Write the report and its numbers into `folder`, each file atomically."""
    with atomic_path(folder / RESULTS_NAME) as temporary:
        comparison.results.to_csv(temporary, index=False)
    with atomic_path(folder / "differences.csv") as temporary:
        difference_frame(comparison).to_csv(temporary, index=False)
    write_text(folder / "report.md", shown(markdown(comparison)))
    write_text(folder / "report.html", shown(html(comparison)))


def difference_frame(comparison: ArmComparison) -> pd.DataFrame:
    """Return all statistics, one row per column and arm; shares, not percent.

    `variance` is that of the difference, seed_variance (1 / seeds + 1 / seeds of the baseline) +
    image_variance; the interval is the difference ± `least`. p_holm is that of tasks.
    """
    rows: list[dict[str, Any]] = []
    for name, tested in comparison.tests.items():
        tests = tested.tests
        chances = None if tests is None else chance_of_best(tests.model)
        for at, arm in enumerate(tested.arms if tests is not None else ()):
            if tests is None:
                continue
            model, difference = tests.model, tests.of(at)
            row: dict[str, Any] = {
                "column": name,
                "arm": arm,
                "baseline": tested.baseline,
                "seeds": int(model.seeds[at]),
                "mean": float(model.means[at]),
                "chance_of_best": None if chances is None else float(chances[at]),
            }
            rows.append(row)
            if difference is None:
                continue
            variance, freedom = model.variance(at, tests.baseline)
            shares = 1 / model.seeds[at] + 1 / model.seeds[tests.baseline]
            low, high = difference.interval or (None, None)
            row |= {
                "difference": difference.value,
                "low": low,
                "high": high,
                "p_value": difference.p_value,
                "p_single": difference.p_single,
                "p_holm": tested.p_holm.get(arm),
                "resolved": tested.resolved(arm),
                "least": difference.least,
                "least_with_power": difference.least_with_power,
                "seed_variance": model.seed_variance,
                "image_variance": variance - model.seed_variance * shares,
                "freedom": freedom,
            }
    return pd.DataFrame(rows)


def _tasks(comparison: ArmComparison) -> list[str]:
    return list(dict.fromkeys(comparison.results["task"]))


def budget_sentence(comparison: ArmComparison) -> str:
    """Say what all arms had in common."""
    runs = comparison.runs
    trained = int(runs["trained_samples"].iloc[0])
    of_arms = dict.fromkeys(comparison.seeds.values())
    seeds = " or ".join(", ".join(map(str, of_arm)) for of_arm in of_arms)
    word = "seed" if seeds.isdecimal() else "seeds"
    batch = comparison.settings["scale"]["global_batch_size"]
    limits = {k: v for k, v in comparison.settings["budget"].items() if v is not None}
    if limits:
        ((unit, amount),) = limits.items()
        budget = f"had {amount:,g} {unit.replace('_', ' ')}, in steps of batch {batch}"
    else:
        steps = int(runs["steps"].iloc[0])
        budget = f"trained on {trained:,} samples in {steps:,} steps of batch {batch}"
    return f"{len(comparison.arms)} arms, {word} {seeds}; every run {budget}."


def markdown(comparison: ArmComparison) -> str:
    """Format the report as Markdown."""
    header, *runs = run_rows(comparison)
    first = comparison.columns[0]
    parts = [
        f"# {comparison.name}",
        f"**{answer(comparison, first)}**",
        *filter(None, [aa_sentence(comparison, first)]),
        budget_sentence(comparison),
        as_markdown(main_rows(comparison, comparison.columns)),
        *filter(None, [model_note(comparison, first)]),
        *(as_markdown(difference_rows(comparison, column)) for column in comparison.columns),
        DIFFERENCE_NOTE,
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
        answer=answer(comparison, comparison.columns[0]),
        aa=aa_sentence(comparison, comparison.columns[0]),
        note=model_note(comparison, comparison.columns[0]),
        differences=[difference_rows(comparison, column) for column in comparison.columns],
        difference_note=DIFFERENCE_NOTE,
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
    return {"title": column_title(task), "low": f"{low:g}", "high": f"{high:g}", "arms": arms}


def _axis(values: pd.Series[float]) -> tuple[float, float]:
    """Choose multiples of 5 around the values, at least 5 apart."""
    if len(values) == 0:
        return 0.0, 100.0
    low = 5 * (values.min() // 5)
    high = max(low + 5, 5 * -(-values.max() // 5))
    return max(0.0, float(low)), min(100.0, float(high))
