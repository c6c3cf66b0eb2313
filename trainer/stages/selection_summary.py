"""What `siftclip select` prints: what was kept, at which cost, and what it has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from siftclip.datamodules.selection.selection import SUBSET_NAME, UNSCORED_KEY, WEIGHTS_NAME
from siftclip.selectors.core.rules import TopCount
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.trainer.builders.selection import PoolSelection


def clip_score_overlap(features: str, outcome: PoolSelection) -> float | None:
    """Compute the share of the selected samples also kept by CLIP score, with as many samples.

    Args:
        features: the name of those that tell.
        outcome: what was selected.

    Returns:
        None where there are no such features.
    """
    count = outcome.selection.manifest["kept_distinct"]
    clip_score = ClipScore(features=features, rule=TopCount(count))
    if not outcome.source.has_features(clip_score.requires.features):
        return None
    theirs = np.flatnonzero(clip_score.select(outcome.source).multiplicities)
    ours = np.unique(outcome.rows)
    return len(np.intersect1d(ours, theirs, assume_unique=True)) / len(ours)


def counted(samples: int, distinct: int) -> str:
    """Say how many samples there are, and how many are distinct if that is another number."""
    return f"{samples} samples" + (f", {distinct} distinct" if distinct != samples else "")


def describe_selection(outcome: PoolSelection, overlap: float | None = None) -> str:
    """Describe a selection in a few lines, for the terminal."""
    manifest = outcome.selection.manifest
    cost = manifest["cost"]
    lines = [
        f"selector   {manifest['selector']}",
        f"pool       {outcome.pool.root}: {len(outcome.pool)} samples",
    ]
    if "metadata_present_fraction" in manifest["pool"]:
        share = 100 * manifest["pool"]["metadata_present_fraction"]
        lines.append(f"coverage   {share:.1f} % of the pool's metadata is in its shards")
    for member in manifest["members"]:
        lines.append(
            f"member     {member['selector']}: {member['kept_distinct']} of {member['samples']}, "
            f"{member['seconds']:.1f} s"
            + (f", {unscored} without a score" if (unscored := member.get(UNSCORED_KEY)) else "")
        )
    lines.append(
        f"kept       {counted(manifest['kept_samples'], manifest['kept_distinct'])} "
        f"({100 * manifest['kept_fraction']:.1f} %)"
    )
    weights = manifest.get("weights")
    if weights is not None:
        lines.append(
            f"weights    {weights['min']:g} to {weights['max']:g}, mean {weights['mean']:g}, in "
            f"{WEIGHTS_NAME}; {SUBSET_NAME} lacks them"
        )
    if manifest[UNSCORED_KEY]:
        lines.append(f"no score   {manifest[UNSCORED_KEY]} samples")
    if manifest.get("never_samples"):
        lines.append(f"never      {manifest['never_samples']} samples with the score -inf")
    if overlap is not None:
        lines.append(f"overlap    {100 * overlap:.1f} % also kept by CLIP score")
    ranks = f" on {cost['ranks']} ranks" if cost["ranks"] > 1 else ""
    lines.append(
        f"cost       {cost['seconds']:.1f} s{ranks}, {cost['cpu_seconds']:.1f} CPU s "
        f"({cost['device']})"
    )
    for which in ("pool", "kept"):
        text = _quantiles(manifest[f"score_quantiles_{which}"])
        if text:
            lines.append(f"{which + ' scores':<13}{text}")
    return "\n".join([*lines, f"written    {outcome.folder}"])


def _quantiles(quantiles: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in quantiles.items())
