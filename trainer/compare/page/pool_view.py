"""The pool of a comparison as its report needs it: which samples the arms keep, by which scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from siftclip.datamodules.index.uids import UidTable
from siftclip.datamodules.pool.image_sizes import read_image_sizes
from siftclip.datamodules.pool.metadata import read_labels
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.run import score_pool
from siftclip.errors import InputError
from siftclip.files import identity_hash
from siftclip.selectors.core.base import ScoreSelector
from siftclip.selectors.core.source import IMAGE
from siftclip.trainer.builders.selection import (
    features_folder,
    pool_from,
    selector_from,
    source_from,
)
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.compare.page.grouping import Groups
from siftclip.trainer.compare.page.groups import first_features, group_samples
from siftclip.trainer.compare.page.in_loop import ChosenInLoop, chosen_in_loop
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import CompareCommand, TrainCommand

log = logging.getLogger(__name__)


class Arms(Protocol):
    """Names of what keeps samples of a pool: arms of a comparison, or single selections."""

    @property
    def arms(self) -> tuple[str, ...]:
        """All of them, in their order."""

    @property
    def baseline(self) -> str:
        """The one that the others are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """A pool of n samples, and what the arms of the first seed keep of it."""

    pool: Pool
    kept: Mapping[str, np.ndarray]  # by arm: int64 [n], how often a sample is kept
    scores: Mapping[str, np.ndarray]  # by arm: float32 [n], NaN where there is none
    kinds: np.ndarray | None  # str [n], what the truth file calls a sample; "" for none
    sizes: np.ndarray | None  # int64 [n, 2], width and height of the original; -1 where unknown
    max_image_pixels: int
    images: bool  # whether the report shows images
    groups: Groups = field(default_factory=Groups)
    in_loop: Mapping[str, ChosenInLoop] = field(default_factory=dict)  # by arm


def open_view(
    settings: CompareCommand, comparison: ArmComparison, arms: Mapping[str, TrainCommand]
) -> PoolView | str:
    """Open the pool of a comparison.

    Args:
        settings: of the comparison.
        comparison: of all arms.
        arms: the settings of the first run of each arm.

    Returns:
        Why there is none, in a sentence, where it cannot be opened.
    """
    try:
        pool = pool_from(settings.pool, progress=settings.common.progress)
    except InputError as error:
        log.warning("the report shows no samples: %s", error)
        return f"The pool could not be opened, so that no samples are shown: {error}"
    kept = {}
    for arm, selection in comparison.selections.items():
        rows = pool.table.find(selection.uids)
        kept[arm] = times_kept(rows, selection.multiplicities, len(pool))
    if not any(times.any() for times in kept.values()):
        return f"The pool {pool.root} holds nothing of what was selected."
    sizes = None
    with suppress(InputError):  # its metadata may say nothing of them
        sizes = read_image_sizes(pool, progress=settings.common.progress)
    truth = settings.compare.truth
    scores = {arm: kept_scores(arms[arm], pool) for arm in kept if arm in arms}
    places = [place for each in (settings, *arms.values()) for place in feature_places(each, pool)]
    features = first_features(pool, places)
    return PoolView(
        pool=pool,
        kept=kept,
        scores={arm: own for arm, own in scores.items() if own is not None},
        kinds=None if truth is None else kinds_of(Path(truth), pool),
        sizes=sizes,
        max_image_pixels=settings.data.max_image_pixels,
        images=settings.compare.images,
        groups=group_samples(pool, features, progress=settings.common.progress),
        in_loop=_in_loop(comparison, pool),
    )


def _in_loop(comparison: ArmComparison, pool: Pool) -> dict[str, ChosenInLoop]:
    """Count what the first run of each arm has chosen in the loop, where it has kept that."""
    found = {}
    runs = comparison.runs.set_index(["arm", "seed"])["run"]
    for arm, selection in comparison.selections.items():
        run = RunDir(path=Path(runs[arm, comparison.seeds[arm][0]]))
        chosen = chosen_in_loop(run, selection, pool)
        if chosen is not None:
            found[arm] = chosen
    return found


def feature_places(settings: TrainCommand, pool: Pool) -> list[tuple[Path | None, str | None]]:
    """Return where a run finds features of images, see `first_features`."""
    features = settings.features
    folders = [features_folder(features, pool)]
    folders += [None if more is None else Path(more) for more in features.more]
    return [(folder, f"{features.name}_{IMAGE}") for folder in folders]


def kept_scores(
    settings: TrainCommand, pool: Pool, *, output_root: Path | None = None
) -> np.ndarray | None:
    """Read the scores that a run has selected by; None without any, or where they are gone.

    Args:
        settings: of the run.
        pool: that it has selected from.
        output_root: the folder of outputs with the scores; None: that of `settings`.

    Returns:
        float32 [n], NaN where there is none.
    """
    if output_root is not None:
        common = replace(settings.common, output_dir=str(output_root))
        settings = replace(settings, common=common)
    try:
        selector = selector_from(settings.selector).selector
        if not isinstance(selector, ScoreSelector):
            return None
        source = source_from(settings, may_launch=False, pool=pool, alone=True)  # rank 0 alone
        folder = source.scores_root / identity_hash(source.identity(selector))
        return score_pool(selector, source) if any(folder.glob("*.npz")) else None
    except InputError as error:
        log.warning("the report shows no scores of %s: %s", settings.selector.name, error)
        return None


def times_kept(rows: np.ndarray, multiplicities: np.ndarray, length: int) -> np.ndarray:
    """Return how often each row of a pool is kept: int64 [length].

    Args:
        rows: int64 [k], of distinct samples; -1 of those that the pool lacks.
        multiplicities: int64 [k], how often they are kept.
        length: samples of the pool.
    """
    times = np.zeros(length, dtype=np.int64)
    times[rows[rows >= 0]] = multiplicities[rows >= 0]
    return times


def kinds_of(path: Path, pool: Pool) -> np.ndarray:
    """Return what a truth file calls the samples of a pool: str [n]."""
    uids, labels = read_labels(path, "kind")
    rows = UidTable.build(uids).find(pool.uids)
    texts = labels.astype(str).to_numpy(dtype=str)
    return np.where(rows >= 0, texts[np.maximum(rows, 0)], "")
