"""Runs a selector over a pool, and describes what it chose."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

import siftclip
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.selection.selection import UNSCORED_KEY, Selection, make_selection
from siftclip.redaction import hidden
from siftclip.selectors.core.base import ScoreSelector, Selector, run, score_faults


def score_pool(selector: ScoreSelector, source: PoolSource) -> np.ndarray:
    """Score every sample of a pool: float32 [n], NaN for a sample without a score."""
    scores = selector.scores(source)
    for text in score_faults(scores):
        source.warn(text)
    source.say_what_was_reused()
    return scores


def _finite(value: Any) -> Any:
    """Convert to plain values with numbers that JSON does not have, such as p=inf, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def run_selection(
    selector: Selector, name: str, parameters: Mapping[str, Any], source: PoolSource
) -> Selection:
    """Select from a pool, and note what was kept, why, and at which cost."""
    pool = source.pool
    source.reports.clear()
    source.warnings.clear()
    identity = source.identity(selector, with_rule=True)  # before the selector changes itself
    cpu_start = time.process_time()
    choice = run(selector, source)
    source.say_what_was_reused()
    *members, whole = source.reports
    manifest = {
        "selector": name,
        "parameters": hidden(_finite(parameters)),
        "pool": {"root": str(pool.root), "fingerprint": pool.fingerprint, "samples": len(pool)},
        "identity": identity,
        "kept_samples": whole["kept_samples"],
        "kept_distinct": whole["kept_distinct"],
        "kept_fraction": whole["kept_distinct"] / len(pool),
        UNSCORED_KEY: whole.get(UNSCORED_KEY, 0),
        "never_samples": whole.get("never_samples", 0),  # of score -inf
        "score_quantiles_pool": whole.get("score_quantiles", {}),
        "score_quantiles_kept": whole.get("score_quantiles_kept", {}),
        **({"weights": whole["weights"]} if "weights" in whole else {}),
        "members": members,  # of a composition, in the order in which they have decided
        "warnings": list(source.warnings),
        "cost": {
            "seconds": whole["seconds"],
            "cpu_seconds": time.process_time() - cpu_start,
            "ranks": source.ranks.size,
            "device": source.device.type,
        },
        "siftclip": siftclip.__version__,
    }
    return make_selection(
        pool.uids, choice.multiplicities, manifest, weights=choice.weights, scores=choice.scores
    )
