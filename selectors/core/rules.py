"""Rules turn scores into multiplicities; ties are broken by uid.

A score of -inf says "never", and NaN "no score": no rule keeps either, and where a rule
would need them to reach its number, it keeps fewer. +inf is the best there is.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import numpy as np

from siftclip.errors import (
    InputError,
    require_choice,
    require_finite,
    require_fraction,
    require_int,
)
from siftclip.hashing import uid_order

# What a fraction is of: the samples of the whole pool, or those that earlier stages have left
Of = Literal["pool", "left"]
OFS: tuple[Of, ...] = get_args(Of)


class Rule(Protocol):
    """Scores float32 [n] and uids uint64 [n, 2] -> multiplicities int64 [n].

    `pool_samples` is the size of the whole pool, of which earlier stages may have left n. What a
    rule says of itself by `keeps_all`, `asked_samples` and `faults` is explained by the properties
    of `siftclip.selectors.Selector` that have these names; it may lack them.
    """

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray: ...


def can_be_kept(scores: np.ndarray) -> np.ndarray:
    """Return which samples may be kept at all: bool [n], not those with NaN or -inf."""
    return scores > -np.inf


def keep_top(scores: np.ndarray, uids: np.ndarray, count: int) -> np.ndarray:
    """Keep the `count` best scores: int64 [n] of zeros and ones.

    Of equal scores at the cut, the smaller uids are kept, so that the answer depends neither on
    the order of the samples nor on how they were cut into chunks. With fewer than `count` scores
    above -inf, all of these are kept.

    Args:
        scores: float [n].
        uids: uint64 [n, 2], (high, low).
        count: how many, at least 0.
    """
    kept = np.zeros(len(scores), dtype=np.int64)
    able = np.flatnonzero(can_be_kept(scores))
    count = min(count, len(able))
    if count == 0:
        return kept
    values = scores[able]
    cut = np.partition(values, len(values) - count)[len(values) - count]
    kept[able[values > cut]] = 1
    ties = able[values == cut]
    order = uid_order(uids[ties])
    kept[ties[order[: count - int(kept.sum())]]] = 1
    return kept


def counted(of: Of, left_samples: int, pool_samples: int) -> int:
    """Count the samples that a fraction is `of`: the whole "pool", or those "left"."""
    return pool_samples if of == "pool" else left_samples


class TopFraction:
    """Keep exactly int(n * fraction) samples, the best: the VAS and negCLIPLoss convention.

    n counts every sample of the pool, or every one that earlier stages have left, also those whose
    score is NaN or -inf. DataComp's `get_threshold` keeps one more, and all ties at the cut.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import TopFraction
        >>> scores = np.array([0.4, 0.9, np.nan, 0.7], dtype=np.float32)
        >>> uids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]], dtype=np.uint64)
        >>> TopFraction(0.5)(scores, uids, pool_samples=4)
        array([0, 1, 0, 1])
    """

    def __init__(self, fraction: float, of: Of = "pool") -> None:
        """Set the fraction, in (0, 1], `of` the "pool" or of what is "left"."""
        self.fraction = require_fraction("fraction", fraction, owner=self)
        self.of = require_choice("of", of, OFS, owner=self)

    @property
    def keeps_all(self) -> bool:
        return self.fraction == 1

    def asked_samples(self, left_samples: int, pool_samples: int) -> int:
        """Return how many samples the fraction keeps of those that are left of a pool."""
        return int(counted(self.of, left_samples, pool_samples) * self.fraction)

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray:
        return keep_top(scores, uids, self.asked_samples(len(scores), pool_samples))


def top_fraction(owner: object, fraction: float, of: Of) -> TopFraction:
    """Build the rule of a selector, `owner`, from parameters that are its own."""
    require_fraction("fraction", fraction, owner=owner)
    require_choice("of", of, OFS, owner=owner)
    return TopFraction(fraction, of)


class TopCount:
    """Keep exactly `count` samples, the best; all that have a score where these are fewer.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import TopCount
        >>> scores = np.array([0.4, 0.9, np.nan, 0.7], dtype=np.float32)
        >>> uids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]], dtype=np.uint64)
        >>> TopCount(1)(scores, uids, pool_samples=4)
        array([0, 1, 0, 0])
    """

    def __init__(self, count: int) -> None:
        self.count = require_int("count", count, minimum=0, owner=self)

    def asked_samples(self, left_samples: int, pool_samples: int) -> int:
        """Return the count."""
        return self.count

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray:
        return keep_top(scores, uids, self.count)


class DataCompFraction:
    """Keep what DataComp's own filter keeps of a fraction (arXiv 2304.14108, `get_threshold`).

    The threshold is the score at position int(n * fraction), counted from 0 in descending order,
    and every score of at least that is kept: one sample more than `TopFraction`, and all ties at
    the cut. n counts as in `TopFraction`. The released code fails where that position does not
    exist, as for a fraction of 1; here all samples with a score above -inf are then kept.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import DataCompFraction
        >>> scores = np.array([0.4, 0.9, np.nan, 0.7], dtype=np.float32)
        >>> uids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]], dtype=np.uint64)
        >>> DataCompFraction(0.25)(scores, uids, pool_samples=4)
        array([0, 1, 0, 1])
    """

    def __init__(self, fraction: float, of: Of = "pool") -> None:
        """Set the fraction, in (0, 1], `of` the "pool" or of what is "left"."""
        self.fraction = require_fraction("fraction", fraction, owner=self)
        self.of = require_choice("of", of, OFS, owner=self)

    @property
    def keeps_all(self) -> bool:
        return self.fraction == 1

    def asked_samples(self, left_samples: int, pool_samples: int) -> int:
        """Return how many samples are kept at least, without those tied with the last of them."""
        counted_samples = counted(self.of, left_samples, pool_samples)
        return min(counted_samples, int(counted_samples * self.fraction) + 1)

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray:
        able = can_be_kept(scores)
        scored = scores[able]
        position = int(counted(self.of, len(scores), pool_samples) * self.fraction)
        if position >= len(scored):
            return able.astype(np.int64)
        threshold = np.partition(scored, len(scored) - 1 - position)[len(scored) - 1 - position]
        kept: np.ndarray = scores >= threshold
        return kept.astype(np.int64)


class Threshold:
    """Keep the samples with score >= threshold, a finite number, compared in float32.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import Threshold
        >>> scores = np.array([0.4, 0.9, np.nan, 0.7], dtype=np.float32)
        >>> uids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]], dtype=np.uint64)
        >>> Threshold(0.5)(scores, uids, pool_samples=4)
        array([0, 1, 0, 1])
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = require_finite("threshold", threshold, owner=self)

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray:
        return (scores >= np.float32(self.threshold)).astype(np.int64)  # False for NaN


def threshold_rule(owner: object, threshold: float) -> Threshold:
    """Build the rule of a selector, `owner`, from a parameter that is its own."""
    return Threshold(require_finite("threshold", threshold, owner=owner))


class AsGiven:
    """The scores are multiplicities already: whole numbers of at least 0; NaN means 0.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import AsGiven
        >>> uids = np.array([[0, 0], [0, 1], [0, 2]], dtype=np.uint64)
        >>> AsGiven()(np.array([2.0, 0.0, np.nan]), uids, pool_samples=3)
        array([2, 0, 0])
    """

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray:
        counts = np.where(np.isnan(scores), 0, scores)
        if (counts < 0).any() or not np.isfinite(counts).all() or (counts % 1 != 0).any():
            raise InputError("Multiplicities must be whole numbers of at least 0.")
        return counts.astype(np.int64)
