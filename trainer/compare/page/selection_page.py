"""The page of `siftclip show` and `siftclip diff`, and what they print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import spearmanr  # type: ignore[import-untyped]

import siftclip
from siftclip.eval.significance.words import WordShare, telling_words
from siftclip.tables import ruled_table
from siftclip.trainer.compare.page.axes import arm_classes
from siftclip.trainer.compare.page.composition import (
    RATIO_NOTE,
    composition_frame,
    composition_plots,
    ratio_tables,
    recall_rows,
    repetition_rows,
)
from siftclip.trainer.compare.page.galleries import (
    Gallery,
    choose_galleries,
    note_of,
    read_galleries,
)
from siftclip.trainer.compare.page.grouping import CLUSTER, LANGUAGE
from siftclip.trainer.compare.page.pool_view import PoolView
from siftclip.trainer.compare.page.render import render
from siftclip.trainer.compare.page.samples import SHADES
from siftclip.trainer.compare.page.scores import score_frame, score_plots

_WORDS = 12  # of each side
WORDS_NOTE = (
    "Shares of the captions that one selection keeps and the other drops; words of at least five "
    "captions, by the z score of their log odds ratio."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSelections:
    """What the parts of a page call the selections; the first one is the baseline."""

    arms: tuple[str, ...]

    @property
    def baseline(self) -> str:
        """The selection that others are compared with."""
        return self.arms[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What page and terminal both say of one or two selections."""

    headline: str
    composition: pd.DataFrame  # of `composition_frame`
    words: list[list[str]]  # header and rows; empty for one selection


def summarise(view: PoolView, captions: Sequence[Sequence[str]]) -> Summary:
    """Count what page and terminal both show.

    Args:
        view: of the pool, with the selections.
        captions: of what the first keeps alone, and of what the second does; empty for one.
    """
    return Summary(
        headline=headline(view),
        composition=composition_frame(view),
        words=_word_rows(view, captions),
    )


def selection_page(view: PoolView, summary: Summary, shown: np.ndarray) -> str:
    """Format a page of one or two selections.

    Args:
        view: of the pool, with the selections.
        summary: of them.
        shown: int64 [k], rows that a gallery of its own shows; of one selection.
    """
    selections = ShownSelections(arms=tuple(view.kept))
    galleries = choose_galleries(selections, view)
    if len(selections.arms) == 1:
        galleries.insert(0, _own_gallery(view, selections.baseline, shown))
    read = read_galleries(view, galleries)
    parts = {"samples": "Samples", **({"words": "Words"} if summary.words else {})}
    return render(
        what="Selection" if len(selections.arms) == 1 else "Selections",
        title="selection",
        parts=parts,
        name=" and ".join(selections.arms),
        colours=arm_classes(selections.arms, selections.baseline),
        partial="",
        aa="",
        answer=summary.headline,
        differing="",
        budget=f"Of the pool {view.pool.root}, {len(view.pool):,} samples.",
        no_pool="",
        overlap=_overlap(view) if len(selections.arms) > 1 else [],
        overlap_note="Jaccard index of the distinct samples.",
        counted="distinct samples",
        keeper="selection",
        shares=[],
        recall=recall_rows(selections, summary.composition),
        repetitions=repetition_rows(selections, view),
        composition=composition_plots(selections, summary.composition),
        composition_notes=view.groups.notes,
        scores=score_plots(selections, view, score_frame(view)),
        galleries=read,
        with_images=view.images,
        faults=sum(bool(sample.fault) for each in read for sample in each.samples),
        words=summary.words,
        words_note=WORDS_NOTE,
        made_with=f"Made with siftclip {siftclip.__version__}.",
    )


def headline(view: PoolView) -> str:
    """Say in a sentence what is kept."""
    pool = len(view.pool)
    sentences = []
    for name, times in view.kept.items():
        distinct, samples = int((times > 0).sum()), int(times.sum())
        more = f", {samples:,} with repetitions" if samples > distinct else ""
        sentences.append(f"{name} keeps {distinct:,} samples ({distinct / pool:.1%}){more}")
    text = "; ".join(sentences)
    if len(view.kept) == 2:
        first, second = ((times > 0) for times in view.kept.values())
        text += f"; {int((first & second).sum()):,} are in both"
        both = _rank_correlation(view)
        text += "" if both is None else f", and the ranks of their scores correlate by {both:.2f}"
    return f"{text}."


def describe(view: PoolView, summary: Summary, passing: np.ndarray, *, exported: str | None) -> str:
    """Format what the command prints.

    Args:
        view: of the pool, with the selections.
        summary: of them.
        passing: int64 [m], rows that pass the filters; of one selection.
        exported: the subset that they are kept as.
    """
    parts = [summary.headline]
    if len(view.kept) == 1:
        (times,) = view.kept.values()
        kept = int((times > 0).sum())
        parts += [f"{len(passing):,} of them pass the filters."] if len(passing) < kept else []
    else:
        first, second = ((times > 0) for times in view.kept.values())
        names = [*view.kept]
        rows = [
            ["", "samples"],
            [f"{names[0]} alone", f"{int((first & ~second).sum()):,}"],
            [f"{names[1]} alone", f"{int((second & ~first).sum()):,}"],
            ["both", f"{int((first & second).sum()):,}"],
        ]
        parts.append(ruled_table(rows))
    selections = ShownSelections(arms=tuple(view.kept))
    recall = recall_rows(selections, summary.composition)
    parts += [ruled_table(recall)] if len(recall) > 1 else []
    ratios = ratio_tables(selections, summary.composition)
    tables = [ruled_table(ratios[title]) for title in (CLUSTER, LANGUAGE) if title in ratios]
    parts += [*tables, RATIO_NOTE] if tables else []
    parts += [ruled_table(summary.words)] if len(summary.words) > 1 else []
    parts += [f"subset     {exported}"] if exported is not None else []
    return "\n\n".join(parts)


def _own_gallery(view: PoolView, name: str, shown: np.ndarray) -> Gallery:
    """Return the gallery of what passes the filters, best first where there are scores."""
    scores = view.scores.get(name)
    if scores is not None:
        known = np.where(np.isnan(scores[shown]), -np.inf, scores[shown])
        shown = shown[np.argsort(-known, kind="stable")]
    order = "best first" if scores is not None else "in the order of the pool"
    return Gallery(
        title=name,
        note=f"{len(shown):,} samples of what passes, drawn at random, {order}.",
        rows=tuple(shown.tolist()),
        notes=tuple(note_of(view, int(row), name) for row in shown),
    )


def _overlap(view: PoolView) -> list[tuple[str, list[tuple[str, int]]]]:
    rows = []
    for name, times in view.kept.items():
        cells = []
        for other in view.kept.values():
            common = int(((times > 0) & (other > 0)).sum())
            share = common / max(1, int(((times > 0) | (other > 0)).sum()))
            cells.append((f"{share:.2f}", round(SHADES * share)))
        rows.append((name, cells))
    return rows


def _rank_correlation(view: PoolView) -> float | None:
    """Return Spearman's correlation of two scores over the samples that have both, if any."""
    if len(view.scores) < 2:
        return None
    first, second = view.scores.values()
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 3 or np.ptp(first[known]) == 0 or np.ptp(second[known]) == 0:
        return None
    return float(spearmanr(first[known], second[known]).statistic)


def _word_rows(view: PoolView, captions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return header and one row per word that tells the captions apart."""
    if not captions:
        return []
    shares: list[WordShare] = telling_words(captions[0], captions[1], _WORDS)
    rows = [["word", *(f"{name} alone" for name in view.kept), "z"]]
    rows += [
        [share.word, f"{share.first:.1%}", f"{share.second:.1%}", f"{share.z:+.1f}"]
        for share in shares
    ]
    return rows
