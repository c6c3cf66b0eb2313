"""From a configuration to a pool, features, a selector, scores and a selection.

These functions are what the commands share. Each takes the resolved configuration, reads its own
part of it, checks it, and calls the part of siftclip that does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.pool import (
    Coverage,
    Pool,
    make_storage,
    metadata_coverage,
    open_pool,
)
from siftclip.datamodules.scoring import (
    PoolChunks,
    Scored,
    identity_hash,
    open_chunks,
    run_scores,
    run_selection,
)
from siftclip.datamodules.selection import (
    MANIFEST_NAME,
    Selection,
    expand_rows,
    read_selection,
    write_selection,
)
from siftclip.datamodules.storage import default_cache
from siftclip.selectors.base import Selector
from siftclip.selectors.errors import InputError, require_int
from siftclip.trainer.cores import cores_of_rank


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
    storage = make_storage(
        str(config.pool.root),
        cache_dir=cache,
        options=plain(config.pool.storage_options),
        shard_cache_gb=config.pool.shard_cache_gb,
    )
    workers = config.pool.index_workers
    return open_pool(
        storage,
        cache_dir=cache,
        max_bad_fraction=config.pool.max_bad_fraction,
        workers=cores_of_rank()
        if workers == "auto"
        else require_int("pool.index_workers", workers, minimum=1),
        progress=config.progress,
    )


def features_folder(config: DictConfig) -> Path | None:
    """The folder of the feature set; None means the pool's own metadata."""
    if config.features.root is not None:
        return Path(config.features.root)
    if config.features.model is None:
        return None
    return pool_cache(config) / "features" / str(config.features.name)


def selector_from(config: DictConfig) -> tuple[Selector, str, dict[str, Any]]:
    """The selector, its name, and the parameters that identify it.

    Raises:
        InputError: the class is unknown, or does not take these parameters.
    """
    for key in config.selector:
        if OmegaConf.is_missing(config.selector, key):
            raise InputError(f"selector={config.selector.name} needs selector.{key}=...")
    parameters: dict[str, Any] = plain(config.selector)
    name = str(parameters.pop("name"))
    try:
        selector = instantiate(parameters)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"selector={name}: {cause or error}") from error
    if not isinstance(selector, Selector):
        raise InputError(
            f"selector={name}: {parameters.get('_target_')} must be a subclass of "
            "siftclip.selectors.base.Selector."
        )
    return selector, name, parameters


def chunks_from(config: DictConfig, pool: Pool, selector: Selector) -> PoolChunks:
    """The chunks that a selector requires."""
    return open_chunks(
        pool,
        selector.requires,
        features_folder=features_folder(config),
        chunk_samples=require_int(
            "features.chunk_samples", config.features.chunk_samples, minimum=1
        ),
        max_bad_fraction=config.pool.max_bad_fraction,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutcome:
    """What the score stage made."""

    pool: Pool
    selector: Selector
    name: str
    parameters: dict[str, Any]
    chunks: PoolChunks
    scored: Scored


def score_stage(config: DictConfig) -> ScoreOutcome:
    """Open the pool, find what the selector requires, and score."""
    selector, name, parameters = selector_from(config)  # first: it fails without touching a file
    pool = pool_from(config)
    chunks = chunks_from(config, pool, selector)
    scored = run_scores(
        selector,
        parameters,
        chunks,
        scores_root=output_root(config) / "scores",
        progress=config.progress,
    )
    return ScoreOutcome(
        pool=pool,
        selector=selector,
        name=name,
        parameters=parameters,
        chunks=chunks,
        scored=scored,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOutcome:
    """What the select stage made."""

    pool: Pool
    selection: Selection
    folder: Path
    rows: np.ndarray  # int64, the pool's rows, repetitions repeated
    coverage: Coverage  # of the selection in the pool


def select_stage(config: DictConfig) -> SelectOutcome:
    """Score, apply the rule, and write the selection with its manifest; reuse one that is there."""
    outcome = score_stage(config)
    identity = {"parameters": outcome.parameters, **outcome.scored.identity}
    folder = output_root(config) / "selections" / f"{outcome.name}-{identity_hash(identity)}"
    if (folder / MANIFEST_NAME).is_file():
        selection = read_selection(folder)
    else:
        selection = run_selection(
            outcome.selector, outcome.name, outcome.parameters, outcome.chunks, outcome.scored
        )
        available = metadata_coverage(outcome.pool)
        if available is not None:
            selection.manifest["pool"]["metadata_samples"] = available.named
            selection.manifest["pool"]["metadata_present_fraction"] = available.fraction
        write_selection(selection, folder)
    rows, coverage = expand_rows(selection, outcome.pool)
    return SelectOutcome(
        pool=outcome.pool, selection=selection, folder=folder, rows=rows, coverage=coverage
    )


def describe_selection(outcome: SelectOutcome) -> str:
    """A few lines about a selection, for the terminal."""
    manifest = outcome.selection.manifest
    lines = [
        f"selector   {manifest['selector']}",
        f"pool       {outcome.pool.root}: {len(outcome.pool)} samples",
        f"kept       {manifest['kept_samples']} samples, {manifest['kept_distinct']} distinct "
        f"({100 * manifest['kept_fraction']:.1f} %)",
        f"written    {outcome.folder}",
    ]
    if "metadata_present_fraction" in manifest["pool"]:
        share = 100 * manifest["pool"]["metadata_present_fraction"]
        lines.insert(2, f"coverage   {share:.1f} % of the pool's metadata is in its shards")
    for which in ("pool", "kept"):
        quantiles: Mapping[str, float] = manifest[f"score_quantiles_{which}"]
        if quantiles:
            text = "  ".join(f"{name} {value:.4f}" for name, value in quantiles.items())
            lines.append(f"{which + ' scores':<13}{text}")
    return "\n".join(lines)
