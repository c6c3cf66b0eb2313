"""The part of the page about what the arms keep and drop."""

from __future__ import annotations

from typing import Any

import pandas as pd

from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.page.composition import (
    composition_frame,
    composition_plots,
    recall_rows,
    repetition_rows,
)
from siftclip.trainer.compare.page.galleries import (
    choose_galleries,
    gallery_frame,
    read_galleries,
)
from siftclip.trainer.compare.page.pool_view import PoolView
from siftclip.trainer.compare.page.scores import score_frame, score_plots

SHADES = 9  # of the heat map, in page.css
OVERLAP_NOTE = (
    "Jaccard index of the distinct samples that two arms select before training, for the first "
    "seed."
)


def sample_frames(view: PoolView | str, comparison: ArmComparison) -> dict[str, pd.DataFrame]:
    """Return the numbers of this part as tables, by name; none without a pool."""
    if isinstance(view, str):
        return {}
    return {
        "composition": composition_frame(view),
        "scores": score_frame(view),
        "samples": gallery_frame(view, choose_galleries(comparison, view)),
    }


def samples_part(comparison: ArmComparison, view: PoolView | str) -> dict[str, Any]:
    """Return what `samples.html.j2` shows.

    Args:
        comparison: of all arms.
        view: of the pool, or why there is none.
    """
    common = {
        "overlap": heat_rows(comparison),
        "overlap_note": OVERLAP_NOTE,
        "counted": "distinct samples of the first seed",
        "keeper": "arm",
        "shares": share_rows(comparison),
    }
    if isinstance(view, str):
        names = ("recall", "repetitions", "composition", "scores", "galleries")
        empty: dict[str, Any] = {name: [] for name in names}
        notes: dict[str, Any] = {"composition_notes": [], "with_images": False, "faults": 0}
        return {**common, **empty, **notes, "no_pool": view}
    composition = composition_frame(view)
    galleries = read_galleries(view, choose_galleries(comparison, view))
    return {
        **common,
        "no_pool": "",
        "recall": recall_rows(comparison, composition),
        "repetitions": repetition_rows(comparison, view),
        "composition": composition_plots(comparison, composition),
        "composition_notes": view.groups.notes,
        "scores": score_plots(comparison, view, score_frame(view)),
        "galleries": galleries,
        "with_images": view.images,
        "faults": sum(bool(sample.fault) for each in galleries for sample in each.samples),
    }


def heat_rows(comparison: ArmComparison) -> list[tuple[str, list[tuple[str, int]]]]:
    """Return each arm with its overlaps: text, and a shade from 0 to `SHADES`."""
    rows = []
    for arm in comparison.overlap.index:
        shares = [float(share) for share in comparison.overlap.loc[arm]]
        cells = [
            ("-", 0) if pd.isna(share) else (f"{share:.2f}", round(SHADES * share))
            for share in shares
        ]
        rows.append((str(arm), cells))
    return rows


def share_rows(comparison: ArmComparison) -> list[list[str]]:
    """Return header and one row per kind of the truth file: its share of what is trained on."""
    if comparison.truth is None:
        return []
    rows = [["kind", *comparison.arms]]
    for kind in comparison.truth.columns:
        shares = comparison.truth[kind]
        rows.append(
            [str(kind), *("-" if pd.isna(share) else f"{100 * share:.1f} %" for share in shares)]
        )
    return rows
