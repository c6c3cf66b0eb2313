"""Runs a selector over a pool, and describes what it chose."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import NotRequired, TypedDict

import siftclip
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.selection.selection import (
    MANIFEST_NAME,
    UNSCORED_KEY,
    Selection,
    make_selection,
    read_selection,
)
from siftclip.errors import DamagedError, InputError
from siftclip.records import Count, Number, Text, checked
from siftclip.redaction import hidden
from siftclip.selectors.core.base import ScoreSelector, Selector, run, score_faults


class _PoolNotes(TypedDict):
    """The pool of a selection."""

    metadata_present_fraction: NotRequired[Number]


class _Member(TypedDict):
    """A member of a composition."""

    selector: Text
    samples: Count
    kept_distinct: Count
    seconds: Number
    unjudged_samples: NotRequired[Count]  # UNSCORED_KEY


class _Weights(TypedDict):
    """The weights of what is kept."""

    min: Number
    mean: Number
    max: Number


class _Cost(TypedDict):
    """What a selection took."""

    seconds: Number
    cpu_seconds: Number
    ranks: Count
    device: Text


class RunManifest(TypedDict):
    """What others read of the manifest of a selection that `run_selection` has made."""

    selector: Text
    pool: _PoolNotes
    kept_samples: Count
    kept_distinct: Count
    kept_fraction: Number
    unjudged_samples: Count  # UNSCORED_KEY
    never_samples: NotRequired[Count]
    score_quantiles_pool: dict[Text, Number]
    score_quantiles_kept: dict[Text, Number]
    weights: NotRequired[_Weights]
    members: list[_Member]
    warnings: NotRequired[list[Text]]
    cost: _Cost


def read_run_selection(folder: Path) -> Selection:
    """Read a selection that `run_selection` has made.

    Raises:
        InputError: see `read_selection`; or its manifest lacks something, or cannot be.
    """
    selection = read_selection(folder)
    try:
        checked(selection.manifest, RunManifest, owner=str(folder / MANIFEST_NAME))
    except InputError as error:
        raise DamagedError(error, f"Delete the folder {folder} and select again.") from None
    return selection


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
