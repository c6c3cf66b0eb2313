"""From a configuration to a pool, features, a selector, scores and a selection.

These functions are what the commands share. Each takes the resolved configuration, reads its own
part of it, checks it, and calls the part of siftclip that does the work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.files import identity_hash
from siftclip.datamodules.identities import say_reused, say_why_not
from siftclip.datamodules.locks import LOCK_NAME, locked
from siftclip.datamodules.order import rows_digest
from siftclip.datamodules.pool import (
    Coverage,
    Pool,
    make_storage,
    metadata_coverage,
    open_pool,
)
from siftclip.datamodules.pool_source import PoolSource
from siftclip.datamodules.scoring import run_selection, score_pool
from siftclip.datamodules.selection import (
    MANIFEST_NAME,
    Selection,
    expand_rows,
    read_selection,
    write_selection,
)
from siftclip.datamodules.storage import default_cache
from siftclip.selectors.base import ScoreSelector, Selector
from siftclip.selectors.errors import InputError, require_bool, require_int
from siftclip.selectors.ranks import Ranks, of_first_rank
from siftclip.trainer.agreement import require_same
from siftclip.trainer.build.objects import BuiltObjects
from siftclip.trainer.build.options import options_of, under
from siftclip.trainer.cores import cores_of_rank
from siftclip.trainer.selection_ranks import selection_ranks


def plain(node: Any) -> Any:
    """A part of the configuration as plain Python values, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def output_root(config: DictConfig) -> Path:
    """Where everything is written."""
    return Path(config.output_dir)


def pool_cache(config: DictConfig) -> Path:
    """Where indices and features of the pool are kept."""
    if config.pool.cache_dir is not None:
        return Path(config.pool.cache_dir)
    return default_cache(str(config.pool.root))


def pool_from(config: DictConfig) -> Pool:
    """Open the pool that the configuration names."""
    if OmegaConf.is_missing(config.pool, "root"):
        raise InputError(
            "pool.root must name the folder of the pool, such as pool.root=/data/datacomp_small."
        )
    cache = pool_cache(config)
    workers = config.pool.index_workers
    if workers == "auto":
        workers = cores_of_rank()
    require_int("pool.index_workers", workers, minimum=1)
    own = ("root", "shard_cache_gb", "max_bad_fraction", "key_split")
    with options_of(under("pool", *own, options="storage_options")):
        storage = make_storage(
            str(config.pool.root),
            cache_dir=cache,
            options=plain(config.pool.storage_options),
            shard_cache_gb=config.pool.shard_cache_gb,
        )
        return open_pool(
            storage,
            cache_dir=cache,
            max_bad_fraction=config.pool.max_bad_fraction,
            key_split=config.pool.key_split,
            workers=workers,
            progress=config.progress,
        )


def features_folder(config: DictConfig) -> Path | None:
    """The folder of the feature set; None means the pool's own metadata."""
    if config.features.root is not None:
        return Path(config.features.root)
    if config.features.model is None:
        return None
    return pool_cache(config) / "features" / str(config.features.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltSelector:
    """A selector of the configuration."""

    selector: Selector
    name: str
    parameters: dict[str, Any]  # that identify it
    objects: BuiltObjects  # it and its members, which are told by their options


def selector_from(config: DictConfig, node: str = "selector") -> BuiltSelector:
    """Build the selector of a part of the configuration.

    Args:
        config: of the command.
        node: the part of it that describes the selector.

    Raises:
        InputError: the class is unknown, or does not take these parameters.
    """
    missing = sorted(key for key in OmegaConf.missing_keys(config) if key.startswith(f"{node}."))
    if missing:
        needs = " ".join(f"{key}=..." for key in missing)
        raise InputError(f"The selector needs {needs}; see configs/selector for what they are.")
    parameters: dict[str, Any] = plain(OmegaConf.select(config, node))
    name = str(parameters.pop("name"))
    objects = BuiltObjects()
    selector = objects.build(parameters, node)
    if not isinstance(selector, Selector):
        raise InputError(
            f"{node}._target_ must be a subclass of siftclip.selectors.base.Selector. Got "
            f"{parameters.get('_target_')}."
        )
    return BuiltSelector(selector=selector, name=name, parameters=parameters, objects=objects)


def source_from(config: DictConfig, pool: Pool, *, may_launch: bool) -> PoolSource:
    """The pool as selectors see it, shared among the ranks, see `selection_ranks`."""
    chunk_samples = require_int("features.chunk_samples", config.features.chunk_samples, minimum=1)
    ranks, device = selection_ranks(config, may_launch=may_launch)
    return PoolSource(
        pool,
        features=[features_folder(config), *(f and Path(f) for f in config.features.more)],
        scores_root=output_root(config) / "scores",
        chunk_samples=chunk_samples,
        max_bad_fraction=config.pool.max_bad_fraction,
        ranks=ranks,
        device=device,
        progress=config.progress,
        reuse=require_bool("reuse", config.reuse),
    )


def _once(folder: Path, what: str, ranks: Ranks) -> AbstractContextManager[None]:
    """Inside, no other command makes what is kept in a folder; the work is not done twice."""
    return locked(folder / LOCK_NAME, owner=f"{what} {folder}", ranks=ranks, wait=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutcome:
    """What the score stage made."""

    source: PoolSource
    scores: np.ndarray  # float32 [n]
    folder: Path  # where they are kept


def score_stage(config: DictConfig) -> ScoreOutcome:
    """Open the pool, find what the selector requires, and score.

    Raises:
        InputError: the selector chooses sets and has no scores, or an option or file is wrong.
    """
    built = selector_from(config)  # first: it fails without touching a file
    selector = built.selector
    if not isinstance(selector, ScoreSelector):
        raise InputError(
            f"selector={built.name} chooses sets and has no scores of single samples. "
            "Use siftclip select."
        )
    source = source_from(config, pool_from(config), may_launch=True)
    with built.objects.told_as_options():
        folder = source.scores_root / identity_hash(source.identity(selector))
        there = of_first_rank(source.ranks, any(folder.glob("*.npz")))
        with nullcontext() if there else _once(folder, "The scores", source.ranks):
            scores = score_pool(selector, source)
    return ScoreOutcome(source=source, scores=scores, folder=folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOutcome:
    """What the select stage made."""

    pool: Pool
    source: PoolSource
    selection: Selection
    folder: Path
    rows: np.ndarray  # int64, the pool's rows, repetitions repeated
    coverage: Coverage  # of the selection in the pool


def select_stage(config: DictConfig, *, may_launch: bool = False) -> SelectOutcome:
    """Select, and write the selection with its manifest; reuse one that is there.

    With `reuse=false` the selection and the scores behind it are computed again.
    """
    built = selector_from(config)  # first: it fails without touching a file
    pool = pool_from(config)
    source = source_from(config, pool, may_launch=may_launch)
    with built.objects.told_as_options():
        return _select(config, built, pool, source)


def _select(
    config: DictConfig, built: BuiltSelector, pool: Pool, source: PoolSource
) -> SelectOutcome:
    selector, name = built.selector, built.name
    identity = source.identity(selector, with_rule=True)
    root = output_root(config) / "selections"
    folder = root / f"{name}-{identity_hash(identity)}"
    ranks, path = source.ranks, folder / MANIFEST_NAME
    there = of_first_rank(ranks, source.reuse and path.is_file())
    if not there and ranks.rank == 0 and not path.is_file():
        kept = root.glob(f"{name}-*/{MANIFEST_NAME}")
        say_why_not("the selection", identity, kept, like="selector")
    with nullcontext() if there else _once(folder, "The selection", ranks):
        if there or of_first_rank(ranks, source.reuse and path.is_file()):
            selection = read_selection(folder)
            if ranks.rank == 0:
                say_reused("the selection", path)
            for text in selection.manifest.get("warnings", ()):
                source.warn(text)
        else:
            selection = run_selection(selector, name, built.parameters, source)
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
                write_selection(selection, folder)
            ranks.barrier()
    rows, coverage = expand_rows(selection, pool)
    return SelectOutcome(
        pool=pool,
        source=source,
        selection=selection,
        folder=folder,
        rows=rows,
        coverage=coverage,
    )
