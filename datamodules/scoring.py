"""Runs a selector over a pool, and describes what it chose."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

import siftclip
from siftclip.datamodules.pool_source import PoolSource
from siftclip.datamodules.selection import Selection, make_selection
from siftclip.selectors.base import ScoreSelector, Selector, check_choice
from siftclip.selectors.source import describe

log = logging.getLogger(__name__)

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def summarise(scores: np.ndarray) -> dict[str, float]:
    """Quantiles of the scores that are not NaN, by name (`q50` is the median)."""
    judged = scores[~np.isnan(scores)]
    if len(judged) == 0:
        return {}
    values = np.quantile(judged.astype(np.float64), QUANTILES)
    return {f"q{100 * q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}


def score_pool(selector: ScoreSelector, source: PoolSource) -> np.ndarray:
    """Score every sample of a pool: float32 [n], NaN where a sample cannot be judged."""
    scores = selector.scores(source)
    unjudged = int(np.isnan(scores).sum())
    if unjudged and source.ranks.rank == 0:
        log.warning("%d of %d samples have no score and cannot be selected", unjudged, len(scores))
    return scores


def selection_identity(selector: Selector, source: PoolSource) -> dict[str, Any]:
    """What a selection depends on."""
    return {**source.identity(selector), "selector": describe(selector)}


def run_selection(
    selector: Selector, name: str, parameters: Mapping[str, Any], source: PoolSource
) -> Selection:
    """Select from a pool, and note what was kept, why, and at which cost."""
    pool = source.pool
    start, cpu_start = time.perf_counter(), time.process_time()
    choice = check_choice(type(selector).__name__, selector.select(source), samples=len(pool))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    kept = choice.multiplicities > 0
    unjudged = 0 if choice.scores is None else int(np.isnan(choice.scores).sum())
    if unjudged and source.ranks.rank == 0:
        log.warning("%d of %d samples have no score and cannot be selected", unjudged, len(pool))
    manifest = {
        "selector": name,
        "parameters": dict(parameters),
        "pool": {"root": str(pool.root), "fingerprint": pool.fingerprint, "samples": len(pool)},
        "identity": source.identity(selector),
        "kept_samples": int(choice.multiplicities.sum()),
        "kept_distinct": int(kept.sum()),
        "kept_fraction": float(kept.sum() / len(pool)),
        "unjudged_samples": unjudged,
        "score_quantiles_pool": {} if choice.scores is None else summarise(choice.scores),
        "score_quantiles_kept": {} if choice.scores is None else summarise(choice.scores[kept]),
        "cost": {"seconds": seconds, "cpu_seconds": cpu_seconds, "ranks": source.ranks.size},
        "siftclip": siftclip.__version__,
    }
    return make_selection(pool.uids, choice.multiplicities, manifest)
