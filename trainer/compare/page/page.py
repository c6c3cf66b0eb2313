"""The page of a comparison: what each of its parts shows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import pandas as pd
import yaml

from siftclip.trainer.compare.answer import aa_sentence, answer_parts, column_title, model_note
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.page.axes import arm_classes
from siftclip.trainer.compare.page.curves import curve_frame, learning_charts, online_charts
from siftclip.trainer.compare.page.dots import difference_facets, mean_plot
from siftclip.trainer.compare.page.pool_view import PoolView
from siftclip.trainer.compare.page.render import render
from siftclip.trainer.compare.page.samples import samples_part
from siftclip.trainer.compare.savings import SAVING_NOTE, front_sentences, saving_rows
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
    cost_rows,
    cost_summary_rows,
    difference_rows,
    main_rows,
    marked_best,
    missing_lines,
    run_rows,
)

PLOT_NOTE = (
    "Large dots are means over seeds, small ones single seeds. A bar is the 95 % interval of an "
    "arm's difference to the baseline, drawn around its mean: where it leaves out the dashed line, "
    "the difference is resolved, and the dot is full."
)


def html(
    comparison: ArmComparison,
    *,
    curves: pd.DataFrame | None = None,
    samples: PoolView | str = "",
    words: Sequence[str] = (),
) -> str:
    """Format the report as one HTML page that asks the network for nothing.

    Args:
        comparison: of all arms.
        curves: of `curve_frame`; None: read here.
        samples: the pool, or why it is not shown.
        words: of the command line that made it; empty: there was none.
    """
    curves = curve_frame(comparison) if curves is None else curves
    first = comparison.columns[0]
    headline, differing = answer_parts(comparison, first)
    tasks = list(dict.fromkeys(comparison.results["task"]))
    learning, online = learning_charts(comparison, curves), online_charts(comparison, curves)
    parts = {
        "results": "Results",
        "tasks": "Every task",
        "samples": "Kept and dropped",
        **({"training": "Learning curves"} if learning else {}),
        **({"loop": "Chosen in the loop"} if online else {}),
        "costs": "Costs",
        "provenance": "Runs and provenance",
    }
    return render(
        what="Comparison",
        title="comparison",
        parts=parts,
        name=comparison.name,
        baseline=comparison.baseline,
        colours=arm_classes(comparison.arms, comparison.baseline),
        partial=partial_sentence(comparison),
        answer=headline,
        differing=differing,
        aa=aa_sentence(comparison, first),
        budget=budget_sentence(comparison),
        main=marked_best(main_rows(comparison, comparison.columns), comparison, comparison.columns),
        best_note=BEST_NOTE,
        cost_summary=cost_summary_rows(comparison),
        plots=[mean_plot(comparison, column) for column in comparison.columns],
        plot_note=PLOT_NOTE,
        note=model_note(comparison, first),
        mixed=mixed_notes(comparison),
        missing_note=MISSING_NOTE,
        missing=missing_lines(comparison),
        facets=difference_facets(comparison),
        tasks=task_rows(comparison, tasks),
        differences=all_difference_rows(comparison),
        difference_note=DIFFERENCE_NOTE,
        **samples_part(comparison, samples),
        learning=learning,
        saved=saving_rows(comparison, curves),
        saving_note=SAVING_NOTE,
        front=front_sentences(comparison),
        online=online,
        cost=transposed(cost_rows(comparison)),
        cost_note=COST_NOTE,
        runs=run_rows(comparison),
        provenance=transposed(provenance_rows(comparison)),
        commands=arm_commands(comparison, words),
        settings=yaml.safe_dump(comparison.settings, sort_keys=False),
        made_with=made_with(comparison),
    )


def transposed(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Swap rows and columns: arms are fewer than what is said about them."""
    return [[*row] for row in zip(*rows, strict=True)]


def task_rows(comparison: ArmComparison, tasks: Sequence[str]) -> list[list[str]]:
    """Return header and one row per task: the mean of each arm, the best one marked."""
    rows = transposed(marked_best(main_rows(comparison, tasks), comparison, tasks))
    first = len(rows) - len(tasks) - 1
    return [["task", *rows[0][1:]], *rows[first:-1]]


def all_difference_rows(comparison: ArmComparison) -> list[list[str]]:
    """Return header and one row per task or average and arm, see `difference_rows`."""
    found: list[list[str]] = []
    for column in comparison.tests:
        header, *rows = difference_rows(comparison, column)
        if not found:
            found.append(["task", header[0], "mean", *header[2:]])
        found += [[column_title(column), *row] for row in rows if row[0] != comparison.baseline]
    return found or [["task"]]


def provenance_rows(comparison: ArmComparison) -> list[list[str]]:
    """Return header and one row per arm: its selector, and hashes of selection and pool."""
    rows = [
        ["arm", "selector", "kept samples", "selection", "pool", "pool's fingerprint", "made by"]
    ]
    for arm in comparison.arms:
        selection = comparison.selections.get(arm)
        if selection is None:
            rows.append([arm, *["-"] * (len(rows[0]) - 1)])
            continue
        manifest = selection.manifest
        pool = manifest.get("pool") or {}
        rows.append(
            [
                arm,
                str(manifest.get("selector", "-")),
                f"{len(selection):,}",
                selection.digest[:16],
                str(pool.get("root", "-")),
                str(pool.get("fingerprint", "-")),
                f"siftclip {manifest.get('siftclip', '-')}",
            ]
        )
    return rows


def arm_commands(comparison: ArmComparison, words: Sequence[str]) -> list[str]:
    """Return the command that trains each arm again; none where there was no command line."""
    kept = [word for word in words if not word.startswith(("compare.only=", "compare.part="))]
    return [
        shlex.join(["siftclip", "compare", *kept, f"compare.only=[{arm}]"])
        for arm in comparison.arms
        if words
    ]
