"""Writes a comparison as `report.md`, `report.html` and tables of all their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from siftclip.eval.significance.arm_tests import chance_of_best
from siftclip.files import write_text
from siftclip.redaction import shown
from siftclip.trainer.compare.answer import aa_sentence, answer_parts, model_note
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.frames import write_frame
from siftclip.trainer.compare.page.composition import RATIO_NOTE, ratio_tables
from siftclip.trainer.compare.page.curves import curve_frame
from siftclip.trainer.compare.page.page import html
from siftclip.trainer.compare.page.pool_view import PoolView
from siftclip.trainer.compare.page.samples import sample_frames
from siftclip.trainer.compare.run_notes import RESULTS_NAME
from siftclip.trainer.compare.savings import (
    SAVING_NOTE,
    front_sentences,
    saving_frame,
    saving_rows,
)
from siftclip.trainer.compare.sentences import (
    COST_NOTE,
    DIFFERENCE_NOTE,
    budget_sentence,
    made_with,
    mixed_notes,
    partial_sentence,
)
from siftclip.trainer.compare.tables import (
    BEST_NOTE,
    MISSING_NOTE,
    as_markdown,
    cost_rows,
    difference_rows,
    main_rows,
    marked_best,
    missing_lines,
    run_rows,
    selection_rows,
)

TABLES = "tables"


def write_report(
    comparison: ArmComparison,
    folder: Path,
    *,
    samples: PoolView | str = "",
    words: Sequence[str] = (),
) -> None:
    """Write the report and its numbers into `folder`, each file atomically.

    Args:
        comparison: of all arms.
        folder: of the comparison.
        samples: the pool, or why it is not shown.
        words: of the command line that made it; empty: there was none.
    """
    curves = curve_frame(comparison)
    frames: Mapping[str, pd.DataFrame] = {
        Path(RESULTS_NAME).stem: comparison.results,
        "differences": difference_frame(comparison),
        f"{TABLES}/runs": comparison.runs,
        f"{TABLES}/curves": curves,
        f"{TABLES}/savings": saving_frame(comparison, curves),
        f"{TABLES}/overlap": overlap_frame(comparison),
        **{f"{TABLES}/{name}": frame for name, frame in sample_frames(samples, comparison).items()},
    }
    for name, frame in frames.items():
        write_frame(folder / name, frame)
    composition = frames.get(f"{TABLES}/composition")
    text = markdown(comparison, curves=curves, composition=composition)
    write_text(folder / "report.md", shown(text))
    # The page is redacted where its texts are: what it embeds must stay as it is.
    write_text(
        folder / "report.html", html(comparison, curves=curves, samples=samples, words=words)
    )


def overlap_frame(comparison: ArmComparison) -> pd.DataFrame:
    """Return the overlap of the arms' selections, one row per pair."""
    return pd.DataFrame(
        [
            {"arm": arm, "other": other, "jaccard": comparison.overlap.loc[arm, other]}
            for arm in comparison.overlap.index
            for other in comparison.overlap.columns
        ]
    )


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


def markdown(
    comparison: ArmComparison,
    *,
    curves: pd.DataFrame | None = None,
    composition: pd.DataFrame | None = None,
) -> str:
    """Format the report as Markdown.

    Args:
        comparison: of all arms.
        curves: of `curve_frame`; None: read here.
        composition: of `composition_frame`; None: without a pool.
    """
    saved = saving_rows(comparison, curve_frame(comparison) if curves is None else curves)
    header, *runs = run_rows(comparison)
    first = comparison.columns[0]
    headline, differing = answer_parts(comparison, first)
    main = main_rows(comparison, comparison.columns)
    parts = [
        f"# {comparison.name}",
        *filter(None, [partial_sentence(comparison)]),
        f"**{headline}**",
        *filter(None, [differing]),
        *filter(None, [aa_sentence(comparison, first)]),
        budget_sentence(comparison),
        as_markdown(marked_best(main, comparison, comparison.columns)),
        BEST_NOTE,
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
        *front_sentences(comparison),
        *(["## Compute saved", as_markdown(saved), SAVING_NOTE] if len(saved) > 1 else []),
        "## What was selected",
        as_markdown(selection_rows(comparison)),
        "Overlap is the Jaccard index of the distinct samples, for the first seed.",
        *_composition_part(comparison, composition),
        "## Runs",
        as_markdown([header, *([f"`{run}`", *cells] for run, *cells in runs)]),
        "## Settings",
        "```yaml\n" + yaml.safe_dump(comparison.settings, sort_keys=False).rstrip() + "\n```",
        made_with(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def _composition_part(comparison: ArmComparison, frame: pd.DataFrame | None) -> list[str]:
    tables = {} if frame is None else ratio_tables(comparison, frame)
    if not tables:
        return []
    return ["### Kept against the pool", RATIO_NOTE, *map(as_markdown, tables.values())]


def _missing_part(comparison: ArmComparison) -> list[str]:
    lines = missing_lines(comparison)
    return [MISSING_NOTE, "\n".join(f"- {line}" for line in lines)] if lines else []
