"""Rules turn scores into multiplicities. NaN is never kept; ties are broken by uid."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from siftclip.selectors.errors import InputError, require_finite, require_fraction


class Rule(Protocol):
    """Scores float32 [n] and uids uint64 [n, 2] -> multiplicities int64 [n]."""

    def __call__(self, scores: np.ndarray, uids: np.ndarray) -> np.ndarray: ...


def keep_top(scores: np.ndarray, uids: np.ndarray, count: int) -> np.ndarray:
    """Keep the `count` best scores: int64 [n] of zeros and ones.

    Of equal scores at the cut, the smaller uids are kept, so that the answer depends neither on
    the order of the samples nor on how they were cut into chunks. With fewer than `count` scores
    that are not NaN, all of these are kept.

    Args:
        scores: float32 [n].
        uids: uint64 [n, 2], (high, low).
        count: how many, 0 <= count <= n.
    """
    kept = np.zeros(len(scores), dtype=np.int64)
    judged = np.flatnonzero(~np.isnan(scores))
    count = min(count, len(judged))
    if count == 0:
        return kept
    values = scores[judged]
    cut = np.partition(values, len(values) - count)[len(values) - count]
    kept[judged[values > cut]] = 1
    ties = judged[values == cut]
    order = np.lexsort((uids[ties, 1], uids[ties, 0]))
    kept[ties[order[: count - int(kept.sum())]]] = 1
    return kept


class TopFraction:
    """Keep exactly int(n * fraction) of n samples, the best: the VAS and negCLIPLoss convention.

    DataComp's `get_threshold` keeps one more, and all ties at the cut. n counts every sample of
    the input, also those whose score is NaN.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = require_fraction("selector.fraction", fraction)

    def __call__(self, scores: np.ndarray, uids: np.ndarray) -> np.ndarray:
        return keep_top(scores, uids, int(len(scores) * self.fraction))


class Threshold:
    """Keep the samples with score >= threshold, compared in float32."""

    def __init__(self, threshold: float) -> None:
        self.threshold = np.float32(require_finite("selector.threshold", threshold))

    def __call__(self, scores: np.ndarray, uids: np.ndarray) -> np.ndarray:
        return (scores >= self.threshold).astype(np.int64)  # False for NaN


class AsGiven:
    """The scores are multiplicities already: whole numbers of at least 0; NaN means 0."""

    def __call__(self, scores: np.ndarray, uids: np.ndarray) -> np.ndarray:
        counts = np.where(np.isnan(scores), 0, scores)
        if (counts < 0).any() or not np.isfinite(counts).all() or (counts % 1 != 0).any():
            raise InputError("Multiplicities must be whole numbers of at least 0.")
        return counts.astype(np.int64)
