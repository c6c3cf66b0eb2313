"""What the arms keep against what the pool holds: shares of kinds, ratios and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from siftclip.eval.significance.resampling import wilson_interval
from siftclip.trainer.compare.page.axes import Axis, arm_classes, ratio_axis, short
from siftclip.trainer.compare.page.dots import DotRow, Mark
from siftclip.trainer.compare.page.pool_view import Arms, PoolView

KIND = "kind"  # of a truth file
RATIO_NOTE = (
    "Share among the distinct samples that are kept, divided by the share of the pool: 2 is twice "
    "as often as by chance. *: the 95 % interval leaves out 1, uncorrected for the number of parts."
)
_BINS = 6
_MOST_KINDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositionPlot:
    """How much each arm keeps of each part of the pool, as a ratio to what the pool holds."""

    title: str
    axis: Axis
    line: float
    rows: tuple[DotRow, ...]


def composition_frame(view: PoolView) -> pd.DataFrame:
    """Count what is kept of each part of the pool; distinct samples, one row per arm and part.

    Columns: property, part, arm, pool_samples, kept_samples, pool_share, kept_share, recall, ratio,
    low, high. `ratio` is kept_share / pool_share, and its interval is that of the kept share by
    Wilson's method: what a draw of as many samples moves it by.
    """
    rows = []
    for name, labels, parts in _properties(view):
        known = labels >= 0
        in_pool = np.bincount(labels[known], minlength=len(parts))
        total = int(in_pool.sum())
        for arm, times in view.kept.items():
            kept = np.bincount(labels[known & (times > 0)], minlength=len(parts))
            of_arm = int(kept.sum())
            if not of_arm:
                continue
            for part, pool_samples, kept_samples in zip(parts, in_pool, kept, strict=True):
                if not pool_samples:
                    continue
                pool_share, kept_share = pool_samples / total, kept_samples / of_arm
                low, high = wilson_interval(kept_share, of_arm)
                rows.append(
                    {
                        "property": name,
                        "part": part,
                        "arm": arm,
                        "pool_samples": int(pool_samples),
                        "kept_samples": int(kept_samples),
                        "pool_share": pool_share,
                        "kept_share": kept_share,
                        "recall": kept_samples / pool_samples,
                        "ratio": kept_share / pool_share,
                        "low": low / pool_share,
                        "high": high / pool_share,
                    }
                )
    return pd.DataFrame(rows)


def composition_plots(arms: Arms, frame: pd.DataFrame) -> list[CompositionPlot]:
    """Plot the ratios of `composition_frame`, a plot for each property."""
    if frame.empty:
        return []
    colours = arm_classes(arms.arms, arms.baseline)
    plots = []
    for name, rows in frame.groupby("property", sort=False):
        axis = ratio_axis(rows["ratio"])
        lines = []
        for part, of_part in rows.groupby("part", sort=False):
            share = of_part["pool_share"].iloc[0]
            marks = [
                Mark(
                    colour=colours[row["arm"]],
                    text=(
                        f"{row['arm']}: {row['ratio']:.2f} times its share of the pool (95 % "
                        f"interval {row['low']:.2f} to {row['high']:.2f}); {row['kept_samples']:,} "
                        f"of {row['pool_samples']:,} kept"
                    ),
                    at=axis.at(row["ratio"]),
                    low=axis.at(row["low"]),
                    high=axis.at(row["high"]),
                    solid=not row["low"] <= 1 <= row["high"],
                )
                for row in of_part.to_dict("records")
            ]
            lines.append(DotRow(label=str(part), value=f"{100 * share:.1f} %", marks=tuple(marks)))
        plots.append(
            CompositionPlot(title=str(name), axis=axis, line=axis.at(1.0), rows=tuple(lines))
        )
    return plots


def ratio_tables(arms: Arms, frame: pd.DataFrame) -> dict[str, list[list[str]]]:
    """Return, by property of `composition_frame`, header and one row per part: the arms' ratios.

    A ratio whose interval leaves out 1 has an asterisk.
    """
    tables: dict[str, list[list[str]]] = {}
    if frame.empty:
        return tables
    for name, rows in frame.groupby("property", sort=False):
        table = [[str(name), "of the pool", *arms.arms]]
        for part, of_part in rows.groupby("part", sort=False):
            cells = {
                row["arm"]: f"{row['ratio']:.2f}{'' if row['low'] <= 1 <= row['high'] else ' *'}"
                for row in of_part.to_dict("records")
            }
            share = f"{100 * of_part['pool_share'].iloc[0]:.1f} %"
            table.append([str(part), share, *(cells.get(arm, "-") for arm in arms.arms)])
        tables[str(name)] = table
    return tables


def recall_rows(arms: Arms, frame: pd.DataFrame) -> list[list[str]]:
    """Return header and one row per kind of the truth file: how much of it each arm keeps."""
    rows = [["kind", "in the pool", *arms.arms]]
    if frame.empty:
        return rows
    of_kinds = frame[frame["property"] == KIND]
    for kind, own in of_kinds.groupby("part", sort=False):
        recall = dict(zip(own["arm"], own["recall"], strict=True))
        cells = [f"{100 * recall[arm]:.1f} %" if arm in recall else "-" for arm in arms.arms]
        rows.append([str(kind), f"{own['pool_samples'].iloc[0]:,}", *cells])
    return rows


def repetition_rows(arms: Arms, view: PoolView) -> list[list[str]]:
    """Return header and one row per number of times that samples are kept: how many are."""
    edges = [0, 1, 2, 3, 5, 9, 17, 33]
    most = max(int(times.max()) for times in view.kept.values())
    edges = [edge for edge in edges if edge <= most]
    rows = [["times kept", *arms.arms]]
    for first, after in zip(edges, [*edges[1:], most + 1], strict=True):
        name = f"{first}" if after - first == 1 else f"{first} to {after - 1}"
        cells = []
        for arm in arms.arms:
            times = view.kept.get(arm)
            there = None if times is None else int(((times >= first) & (times < after)).sum())
            cells.append("-" if there is None else f"{there:,}")
        rows.append([name, *cells])
    return rows


def _properties(view: PoolView) -> list[tuple[str, np.ndarray, list[str]]]:
    """Return the properties: name, the part of each sample, int64 [n] with -1, and their names."""
    found = []
    if view.kinds is not None:
        kinds, places, counts = np.unique(view.kinds, return_inverse=True, return_counts=True)
        order = [at for at in np.argsort(-counts) if kinds[at]][:_MOST_KINDS]
        renamed = np.full(len(kinds), -1, dtype=np.int64)
        renamed[order] = np.arange(len(order))
        found.append((KIND, renamed[places], [str(kinds[at]) for at in order]))
    found += [(each.title, each.labels, [*each.names]) for each in view.groups.groupings]
    lengths = np.asarray(view.pool.text_sizes_bytes)
    found.append(("caption length, bytes", *_binned(lengths)))
    if view.sizes is not None and view.sizes.min(axis=1).max() > 0:
        known = view.sizes.min(axis=1) > 0
        width, height = np.maximum(view.sizes, 1).T
        pixels, aspect = (np.full(len(known), np.nan) for _ in range(2))
        pixels[known] = np.sqrt(width * height.astype(np.float64))[known]
        aspect[known] = (width / height)[known]
        found.append(("resolution, side of a square", *_binned(pixels)))
        found.append(("aspect, width / height", *_binned(aspect, "{:.2f}")))
    return found


def _binned(values: np.ndarray, form: str = "") -> tuple[np.ndarray, list[str]]:
    """Put values in up to six parts of about equal size; -1 for NaN."""
    known = np.isfinite(values)
    inner = np.quantile(values[known], np.linspace(0, 1, _BINS + 1)[1:-1], method="nearest")
    edges = np.unique(inner)
    labels = np.full(len(values), -1, dtype=np.int64)
    labels[known] = np.searchsorted(edges, values[known], side="right")
    texts = [form.format(edge) if form else short(float(edge)) for edge in edges]
    return labels, _names(texts)


def _names(edges: Sequence[str]) -> list[str]:
    inner = [f"{low} to {high}" for low, high in pairwise(edges)]
    return [f"below {edges[0]}", *inner, f"from {edges[-1]}"]
