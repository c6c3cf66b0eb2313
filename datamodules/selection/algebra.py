"""Union, intersection and difference of selections, and samples of one: on uids that may repeat.

Of a sample that two selections keep m and n times, and 0 times is not at all,

    union         keeps max(m, n)
    intersection  keeps min(m, n)
    difference    keeps m where n is 0, and else nothing: it takes samples away, not repetitions

All of it is array work in blocks, so that hundreds of millions of samples need little more memory
than they and the answer take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from siftclip.datamodules.index.uids import group_uids
from siftclip.errors import InputError, ParameterError, require_int
from siftclip.hashing import seed_state, split_seeds
from siftclip.purposes import HashPurpose

Operation: TypeAlias = Literal["union", "intersection", "difference"]
BLOCK_SAMPLES = 1 << 22  # of a selection that are worked on at once


class CountedUids(NamedTuple):
    """Distinct uids, and how often each is kept."""

    uids: np.ndarray  # uint64 [n, 2], ascending by (high, low)
    multiplicities: np.ndarray  # int64 [n], at least 1

    @property
    def samples(self) -> int:
        """All samples, with repetitions."""
        return int(self.multiplicities.sum())


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(second == 0, first, 0)


_COUNTS: dict[Operation, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "union": np.maximum,
    "intersection": np.minimum,
    "difference": _difference,
}


def combine(
    operation: Operation,
    first: CountedUids,
    second: CountedUids,
    *,
    block_samples: int = BLOCK_SAMPLES,
) -> CountedUids:
    """Combine two selections; what nothing keeps is left out, so that the answer may be empty.

    Args:
        operation: see the module.
        first: a selection.
        second: another one.
        block_samples: of each that are worked on at once; the answer does not depend on it.

    Example:
        >>> import numpy as np
        >>> from siftclip.datamodules.selection.algebra import CountedUids, combine
        >>> first = CountedUids(np.array([[0, 4], [0, 9]], dtype=np.uint64), np.array([1, 3]))
        >>> second = CountedUids(np.array([[0, 9]], dtype=np.uint64), np.array([2]))
        >>> combine("union", first, second).multiplicities
        array([1, 3])
        >>> combine("difference", first, second).uids.tolist()
        [[0, 4]]
    """
    parts = [
        _combined(_COUNTS[operation], *block) for block in _blocks(first, second, block_samples)
    ]
    return CountedUids(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _combined(
    count: Callable[[np.ndarray, np.ndarray], np.ndarray], first: CountedUids, second: CountedUids
) -> CountedUids:
    uids, groups = group_uids(np.concatenate([first.uids, second.uids]))
    counts = np.zeros((2, len(uids)), dtype=np.int64)
    counts[0, groups[: len(first.uids)]] = first.multiplicities
    counts[1, groups[len(first.uids) :]] = second.multiplicities
    multiplicities = count(*counts)
    kept = np.flatnonzero(multiplicities)
    return CountedUids(uids[kept], multiplicities[kept])


def _blocks(
    first: CountedUids, second: CountedUids, block_samples: int
) -> Iterator[tuple[CountedUids, CountedUids]]:
    """Cut two selections where the high halves of their uids do not part equal uids."""
    both = (first, second)
    cuts = np.unique(np.concatenate([each.uids[block_samples::block_samples, 0] for each in both]))
    ends = [
        [0, *np.searchsorted(each.uids[:, 0], cuts, side="left").tolist(), len(each.uids)]
        for each in both
    ]
    for number in range(len(cuts) + 1):
        spans = [slice(places[number], places[number + 1]) for places in ends]
        yield (
            CountedUids(first.uids[spans[0]], first.multiplicities[spans[0]]),
            CountedUids(second.uids[spans[1]], second.multiplicities[spans[1]]),
        )


def sample(
    selection: CountedUids, samples: int, *, seed: int, block_samples: int = BLOCK_SAMPLES
) -> CountedUids:
    """Draw samples of a selection with replacement.

    Each draw takes one of its samples, repetitions counted, at random: one that is kept twice is
    twice as probable. A draw is a function of the seed and its number alone, so that fewer draws
    are the first of more.

    Args:
        selection: to draw from.
        samples: how many draws.
        seed: of the draws, an integer of at least 0.
        block_samples: draws that are worked on at once; the answer does not depend on it.

    Raises:
        ParameterError: `samples` or `seed` is out of its range.
        InputError: there is nothing to draw from.
    """
    require_int("samples", samples, minimum=1, owner="sample")
    require_int("seed", seed, minimum=0, owner="sample")
    ends = np.cumsum(selection.multiplicities)
    if not len(ends):
        raise InputError("There is nothing to draw samples from: the subset is empty.")
    total = int(ends[-1])
    if total >= 2**53:  # up to here a float tells all places apart
        rule = "must have fewer than 2^53 samples, repetitions counted"
        raise ParameterError(rule, owner="sample", parameter="selection", value=total)
    (start,) = seed_state(seed ^ HashPurpose.SUBSET_SAMPLE)
    multiplicities = np.zeros(len(ends), dtype=np.int64)
    for first in range(0, samples, block_samples):
        numbers = split_seeds(start, np.arange(first, min(first + block_samples, samples)))
        shares = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
        places = np.minimum((shares * total).astype(np.int64), total - 1)
        places.sort()  # so that they are looked up from the first to the last
        rows, counts = np.unique(np.searchsorted(ends, places, side="right"), return_counts=True)
        multiplicities[rows] += counts
    kept = np.flatnonzero(multiplicities)
    return CountedUids(selection.uids[kept], multiplicities[kept])
