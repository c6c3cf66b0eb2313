"""From settings to a pool, features, a selector, scores and a selection.

These functions are what the commands share. Each takes the groups of options that it needs, and
calls the part of siftclip that does the work.
"""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siftclip.damaged import set_aside_if_damaged
from siftclip.datamodules.identity.identities import say_reused, say_why_not
from siftclip.datamodules.pool.pool import (
    Coverage,
    Pool,
    metadata_coverage,
)
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.selection.run import read_run_selection, run_selection, score_pool
from siftclip.datamodules.selection.selection import (
    MANIFEST_NAME,
    SCORES_NAME,
    SUBSET_NAME,
    WEIGHTS_NAME,
    SelectedSamples,
    Selection,
    expand_rows,
    write_selection,
)
from siftclip.datamodules.streaming.order import rows_digest
from siftclip.errors import InputError
from siftclip.files import identity_hash
from siftclip.locks import LOCK_NAME, locked
from siftclip.ranks import Ranks, of_first_rank
from siftclip.selectors.core.base import ScoreSelector, Selector
from siftclip.selectors.core.feature_sets import name_features
from siftclip.trainer.builders.needs import require_no_training_loss, told_where_it_works
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.options.objects import BuiltObjects
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.runtime.rank_agreement import require_same
from siftclip.trainer.runtime.selection_ranks import selection_ranks, this_process_alone
from siftclip.trainer.settings.commands import SelectSections
from siftclip.trainer.settings.pool import FeaturesSettings, PoolSettings
from siftclip.trainer.settings.selector import SelectorNode

if TYPE_CHECKING:
    import pandas as pd


def pool_from(pool: PoolSettings, *, progress: bool) -> Pool:
    """Open the pool that the settings name."""
    bounds = ("max_bad_fraction", "max_caption_bytes")
    names = ("root", "shard_cache_gb", "key_split", "storage_options", *bounds)
    workers = None if pool.index_workers == "auto" else pool.index_workers
    with options_of(under("pool", *names)):
        return Pool(
            pool.root,
            cache_dir=pool.cache_dir,
            max_bad_fraction=pool.max_bad_fraction,
            key_split=pool.key_split,
            index_workers=workers,
            storage_options=pool.storage_options,
            shard_cache_gb=pool.shard_cache_gb,
            max_caption_bytes=pool.max_caption_bytes,
            progress=progress,
        )


def features_folder(features: FeaturesSettings, pool: Pool) -> Path | None:
    """Return the folder of the feature set; None means the pool's own metadata."""
    if features.root is not None:
        return Path(features.root)
    if features.model is None:
        return None
    return pool.options.cache_folder / "features" / features.name


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltSelector:
    """A selector of the configuration."""

    selector: Selector
    name: str
    parameters: dict[str, Any]  # that identify it
    objects: BuiltObjects  # it and its members, which are told by their options


def selector_from(node: SelectorNode) -> BuiltSelector:
    """Build the selector that a node describes; its features are the node's where it names none.

    Raises:
        InputError: the class is unknown, or does not take these parameters.
    """
    name, parameters = node.name, {**node.parameters}
    objects = BuiltObjects()
    if node.built is not None:  # a copy, because selectors may learn while they are used
        return BuiltSelector(
            selector=copy.deepcopy(node.built), name=name, parameters=parameters, objects=objects
        )
    selector = objects.build(parameters, node.place)
    if not isinstance(selector, Selector):
        raise InputError(
            f"{node.place}._target_ must be a subclass of siftclip.selectors.Selector. Got "
            f"{parameters.get('_target_')}."
        )
    if node.features is not None:
        name_features(selector, node.features)
    return BuiltSelector(selector=selector, name=name, parameters=parameters, objects=objects)


def source_from(
    settings: SelectSections, *, may_launch: bool, pool: Pool | None = None, alone: bool = False
) -> PoolSource:
    """Open the pool as selectors see it, shared among the ranks, see `selection_ranks`.

    Args:
        settings: of the command.
        may_launch: whether ranks may be started here.
        pool: that `settings` name, where it is open already.
        alone: whether this rank calls it without the others, to read what they have made.
    """
    common, features = settings.common, settings.features
    check_hardware(settings.trainer)
    pool = pool_from(settings.pool, progress=common.progress) if pool is None else pool
    if alone:
        ranks, device = this_process_alone(settings.trainer)
    else:
        ranks, device = selection_ranks(settings.trainer, may_launch=may_launch)
    folder = features_folder(features, pool)
    return PoolSource(
        pool,
        features=[folder, *(None if more is None else Path(more) for more in features.more)],
        scores_root=common.output_root / "scores",
        chunk_samples=features.chunk_samples,
        max_bad_fraction=settings.pool.max_bad_fraction,
        ranks=ranks,
        device=device,
        progress=common.progress,
        reuse=common.reuse,
    )


def _once(folder: Path, what: str, ranks: Ranks) -> AbstractContextManager[None]:
    """Lock a folder, so that no other command makes what is kept in it; no work is done twice."""
    return locked(folder / LOCK_NAME, owner=f"{what} {folder}", ranks=ranks, wait=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutcome:
    """What the score stage made."""

    source: PoolSource
    scores: np.ndarray  # float32 [n]
    folder: Path  # where they are kept


def score_stage(settings: SelectSections, *, pool: Pool | None = None) -> ScoreOutcome:
    """Open the pool, find what the selector requires, and score.

    Args:
        settings: of the command.
        pool: that `settings` name, where it is open already.

    Raises:
        InputError: the selector chooses sets and has no scores, or an option or file is wrong.
    """
    built = selector_from(settings.selector)  # first: it fails without touching a file
    selector = built.selector
    if not isinstance(selector, ScoreSelector):
        raise InputError(
            f"selector={built.name} chooses sets and has no scores of single samples. "
            "Use siftclip select."
        )
    require_no_training_loss(selector, built.name)
    source = source_from(settings, may_launch=True, pool=pool)
    with built.objects.told_as_options(), told_where_it_works(selector, built.name):
        folder = source.scores_root / identity_hash(source.identity(selector))
        there = of_first_rank(source.ranks, any(folder.glob("*.npz")))
        with nullcontext() if there else _once(folder, "The scores", source.ranks):
            scores = score_pool(selector, source)
    return ScoreOutcome(source=source, scores=scores, folder=folder)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PoolSelection(SelectedSamples):
    """A selection of an open pool, `rows` being the pool's."""

    pool: Pool
    source: PoolSource
    folder: Path  # where it is kept
    coverage: Coverage  # of the selection in the pool
    settings: SelectSections  # by which it was made

    @property
    def frame(self) -> pd.DataFrame:
        """One row per distinct sample, see `Selection`, with its row, tar and key in the pool.

        The row is -1, and tar and key are empty, where the pool lacks it.
        """
        rows, pool = self.pool.table.find(self.selection.uids), self.pool
        there = rows >= 0
        tars, keys = np.full((2, len(rows)), "", dtype=object)
        names = np.array([shard.name for shard in pool.shards], dtype=object)
        tars[there] = names[pool.shard_of_row[rows[there]]]
        keys[there] = [key.decode(errors="replace") for key in pool.keys[rows[there]].tolist()]
        return self.selection.frame.assign(row=rows, tar=tars, key=keys)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._summary()} of {self.pool.root!r})"


def select_stage(
    settings: SelectSections, *, may_launch: bool = False, pool: Pool | None = None
) -> PoolSelection:
    """Select, and write the selection with its manifest; reuse one that is there.

    With `reuse=false` the selection and the scores behind it are computed again.

    Args:
        settings: of the command.
        may_launch: whether ranks may be started here.
        pool: that `settings` name, where it is open already.
    """
    built = selector_from(settings.selector)  # first: it fails without touching a file
    require_no_training_loss(built.selector, built.name)
    source = source_from(settings, may_launch=may_launch, pool=pool)
    with built.objects.told_as_options(), told_where_it_works(built.selector, built.name):
        return _select(built, source, settings)


def _select(built: BuiltSelector, source: PoolSource, settings: SelectSections) -> PoolSelection:
    selector, name, pool = built.selector, built.name, source.pool
    root = settings.common.output_root / "selections"
    identity = source.identity(selector, with_rule=True)
    folder = root / f"{name}-{identity_hash(identity)}"
    ranks, path = source.ranks, folder / MANIFEST_NAME
    selection = _kept_selection(folder, source) if source.reuse else None
    with nullcontext() if selection is not None else _once(folder, "The selection", ranks):
        if selection is None and source.reuse:
            selection = _kept_selection(folder, source, mends=True)
        if selection is None:
            if ranks.rank == 0 and not os.path.lexists(path):
                kept = root.glob(f"{name}-*/{MANIFEST_NAME}")
                say_why_not("the selection", identity, kept, like="selector")
            selection = _new_selection(built, source, folder)
        else:
            if ranks.rank == 0:
                say_reused("the selection", path)
            for text in selection.manifest.get("warnings", ()):
                source.warn(text)
    rows, coverage = expand_rows(selection, pool)
    return PoolSelection(
        pool=pool,
        source=source,
        selection=selection,
        folder=folder,
        rows=rows,
        coverage=coverage,
        settings=settings,
    )


def _kept_selection(folder: Path, source: PoolSource, *, mends: bool = False) -> Selection | None:
    """Read a kept selection, the same answer on all ranks; None if there is none, or a damaged one.

    Args:
        folder: of the selection.
        source: whose ranks call this together.
        mends: whether a damaged one is set aside, which takes the folder's lock.
    """
    ranks, selection = source.ranks, None
    if ranks.rank == 0 and os.path.lexists(folder / MANIFEST_NAME):
        files = (folder / name for name in (MANIFEST_NAME, SUBSET_NAME, WEIGHTS_NAME, SCORES_NAME))
        with set_aside_if_damaged(*files) if mends else suppress(InputError):
            selection = read_run_selection(folder)
    if not of_first_rank(ranks, selection is not None):
        return None
    return read_run_selection(folder) if selection is None else selection


def _new_selection(built: BuiltSelector, source: PoolSource, folder: Path) -> Selection:
    """Select, and write the selection with its manifest."""
    ranks, pool = source.ranks, source.pool
    selection = run_selection(built.selector, built.name, built.parameters, source)
    available = metadata_coverage(pool)
    if available is not None:
        selection.manifest["pool"]["metadata_samples"] = available.named
        selection.manifest["pool"]["metadata_present_fraction"] = available.fraction
    require_same(
        ranks,
        [rows_digest(selection.uids, selection.multiplicities, selection.weights)],
        ["samples for the selection"],
    )
    if ranks.rank == 0:
        write_selection(selection, folder, scores=True)
    ranks.barrier()
    return selection
