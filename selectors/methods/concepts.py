"""Concept-balanced batches, as in Concept-Aware Batch Sampling (CABS, arXiv 2511.20643).

Choices follow from the concepts that samples show, which are known before any image is decoded.
"""

from __future__ import annotations

import heapq
from math import fsum, isqrt
from typing import Literal, NamedTuple

import numpy as np

from siftclip.errors import (
    InputError,
    require_choice,
    require_fraction,
    require_suffix,
)
from siftclip.hashing import uid_order
from siftclip.selectors.core.base import (
    Choice,
    ExternalColumn,
    Requirements,
    Selector,
    Source,
    SubBatch,
)
from siftclip.selectors.core.rules import OFS, Of, counted
from siftclip.selectors.core.source import ListColumn
from siftclip.selectors.core.sub_batch import draw_by_score
from siftclip.selectors.methods.quota import equal_quotas

_STORED = 128  # gains at least, or the square root of their number: few to store, seldom anew


def distinct_concepts(concepts: ListColumn) -> ListColumn:
    """Return the lists as sets: each ascending, without repetition."""
    lengths = np.diff(concepts.offsets)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((concepts.values, owners))
    owners, values = owners[order], concepts.values[order]
    first = np.ones(len(values), dtype=bool)
    first[1:] = (np.diff(owners) > 0) | (np.diff(values) > 0)
    sizes = np.bincount(owners[first], minlength=len(lengths))
    return ListColumn(values[first], np.concatenate([[0], np.cumsum(sizes)]))


def concept_targets(frequencies: np.ndarray, samples: int, chosen: int) -> np.ndarray:
    """Compute how often each concept should be chosen, the t_c of CABS: int64 [c], at least 1.

    As many concepts as `chosen` average samples have are shared equally among the concepts, where
    rare ones hand on what they cannot use. The release shares out `chosen` itself, and no concept
    gets more than 10; with several concepts a sample, all are then soon at their targets.

    Args:
        frequencies: int64 [c], in how many of the samples each concept occurs, at least 1.
        samples: how many there are.
        chosen: how many of them are chosen.
    """
    concepts = int(frequencies.sum()) * chosen // max(1, samples)
    quotas: np.ndarray = np.maximum(equal_quotas(frequencies, concepts), 1)
    return quotas


def choose_diverse(
    concepts: ListColumn, uids: np.ndarray, sub_batch: SubBatch
) -> tuple[np.ndarray, np.ndarray]:
    """Maximise diversity (CABS-DM): greedily choose the sample whose concepts are missing most.

    The gain of a sample is the mean over its concepts c of (t_c - n_c) / t_c + 1 / F_c where n_c <
    t_c, and of 0 elsewhere. F_c samples of all groups have the concept, n_c of them are chosen so
    far, and t_c should be, see `concept_targets`. A group that has its quota takes no more.

    What differs from the release: a concept at its target takes nothing from a gain (there 0.5),
    and none is forbidden once it was chosen 10 times. So every group gets exactly its quota. Counts
    are those of all groups; in the release, each rank counts its own.

    Gains only fall while counts grow, so that a stored gain that is still true is the largest one
    (lazy greedy, which is exact). Only samples near the top are stored, and are found anew when all
    of them have fallen below the others.

    Args:
        concepts: of n samples, each a set, see `distinct_concepts`.
        uids: uint64 [n, 2]; of equal gains, the smaller uid comes first.
        sub_batch: how many of how many groups; its temperature does not count.

    Returns:
        The multiplicities, int64 [n] of 0 and 1, and the gains, float32 [n]: when a sample was
        chosen, or at the end. NaN for samples without concepts, which come after all others.
    """
    samples = len(uids)
    slices = sub_batch.group_slices(samples)
    order = uid_order(uids)
    place = np.empty(samples, dtype=np.int64)
    place[order] = np.arange(samples)
    names, values = np.unique(concepts.values, return_inverse=True)
    queues = _queues(order, values, concepts.offsets, slices)
    left = sub_batch.quotas
    total = int(left.sum())
    state = _Gains(queues, values, len(names), total)
    kept, gains = np.zeros(samples, dtype=np.int64), np.full(samples, np.nan, dtype=np.float32)
    heap: list[tuple[float, int, int]] = []  # minus a gain, the place of the next sample, a queue
    others = np.inf  # no gain that is not in the heap is as large
    for _ in range(total):
        while _largest_gain(heap, queues, state, left) < others:
            near, others = state.near_top(left)
            heap = [
                (-state.gain(queues[i].concepts), int(place[queues[i].samples[-1]]), i)
                for i in near.tolist()
            ]
            heapq.heapify(heap)
        stored, _, number = heap[0]
        queue = queues[number]
        sample = queue.samples.pop()
        kept[sample] = 1
        left[queue.group] -= 1
        if queue.concepts:
            gains[sample] = -stored
            state.count(queue.concepts)
        if queue.samples:
            entry = (-state.gain(queue.concepts), int(place[queue.samples[-1]]), number)
            heapq.heapreplace(heap, entry)
        else:
            heapq.heappop(heap)
            state.waiting[number] = False
    for queue in queues:
        if queue.concepts:
            gains[queue.samples] = state.gain(queue.concepts)
    return kept, gains


class _Queue(NamedTuple):
    """Samples of a group with the same concepts, hence the same gain."""

    group: int
    concepts: tuple[int, ...]  # numbered from 0
    samples: list[int]  # the next one last


def _queues(
    order: np.ndarray, values: np.ndarray, offsets: np.ndarray, groups: list[slice]
) -> list[_Queue]:
    """Sort all samples into queues.

    Args:
        order: int64 [n], the samples in the order in which equal ones are chosen.
        values: int64 [m], the concepts of all samples, numbered from 0.
        offsets: int64 [n + 1], see `ListColumn`.
        groups: where the samples of each group stand.
    """
    queues: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    members, ends = values.tolist(), offsets.tolist()
    size = groups[0].stop - groups[0].start
    for sample in reversed(order.tolist()):
        key = (sample // size, tuple(members[ends[sample] : ends[sample + 1]]))
        queues.setdefault(key, []).append(sample)
    return [_Queue(*key, samples) for key, samples in queues.items()]


class _Gains:
    """What another sample of each queue is worth."""

    def __init__(
        self, queues: list[_Queue], values: np.ndarray, concepts: int, chosen: int
    ) -> None:
        """Count concepts, the `values` of all samples, of which so many will be `chosen`."""
        frequencies = np.bincount(values, minlength=concepts)
        samples = sum(len(queue.samples) for queue in queues)
        self._targets = concept_targets(frequencies, samples, chosen).tolist()
        self._rarity = (1.0 / frequencies).tolist()
        self._worth = [1.0 + rarity for rarity in self._rarity]  # of another one with a concept
        self._counts = [0] * concepts
        self._groups = np.array([queue.group for queue in queues])
        self._sizes = np.array([len(queue.concepts) for queue in queues])
        self._members = np.array([c for queue in queues for c in queue.concepts], dtype=np.int64)
        self._owners = np.repeat(np.arange(len(queues)), self._sizes)
        self._stored = max(_STORED, isqrt(len(queues)))
        self.waiting = np.ones(len(queues), dtype=bool)  # has samples

    def gain(self, concepts: tuple[int, ...]) -> float:
        """Compute the gain of a sample with these concepts, see `choose_diverse`; -1 for none."""
        if not concepts:
            return -1.0
        # fsum rounds once, so that a smaller sum is never larger when rounded
        return fsum(map(self._worth.__getitem__, concepts)) / len(concepts)

    def count(self, concepts: tuple[int, ...]) -> None:
        """Take note that a sample with these concepts was chosen."""
        for c in concepts:
            self._counts[c] += 1
            missing = self._targets[c] - self._counts[c]
            self._worth[c] = missing / self._targets[c] + self._rarity[c] if missing > 0 else 0.0

    def near_top(self, left: np.ndarray) -> tuple[np.ndarray, float]:
        """Find the queues with the largest gains, int64 [k], and a number that no other's reaches.

        `left`, int64 [g], says how many samples each group still takes. At least one of the queues
        found reaches the number.
        """
        sums = np.bincount(
            self._owners, weights=np.array(self._worth)[self._members], minlength=len(self._sizes)
        )
        gains = np.where(self._sizes > 0, sums / np.maximum(self._sizes, 1), -1.0)
        usable = self.waiting & (left[self._groups] > 0)
        gains[~usable] = -np.inf
        lowest = -np.inf
        if len(gains) > self._stored:
            # these sums are rounded more than once, by far less than the distance to the others
            lowest = float(np.partition(gains, -self._stored)[-self._stored]) - 1e-9
        return np.flatnonzero(usable & (gains >= lowest)), lowest + 1e-10


def _largest_gain(
    heap: list[tuple[float, int, int]], queues: list[_Queue], state: _Gains, left: np.ndarray
) -> float:
    """Bring the largest true gain to the top of a heap whose gains may be too large; -inf: none."""
    while heap:
        stored, first, number = heap[0]
        now = -state.gain(queues[number].concepts)
        if not left[queues[number].group]:
            heapq.heappop(heap)
        elif now != stored:
            heapq.heapreplace(heap, (now, first, number))
        else:
            return -stored
    return -np.inf


class ConceptBalance(Selector):
    """Choose samples whose concepts are missing most, or that show most concepts.

    It needs no features, so that a sub-batch can be chosen before images are decoded. A sample
    without concepts is chosen only where a group has too few others, and its score is NaN. Every
    rank does the whole work: ids are cheap.
    """

    def __init__(
        self,
        *,
        path: str | None,
        column: str,
        fraction: float,
        mode: Literal["diversity", "frequency"] = "diversity",
        of: Of = "pool",
    ) -> None:
        """Name the concepts.

        Args:
            path: a parquet file with `uid` and `column`; None: those of the pool's own metadata.
            column: lists of whole numbers, the concepts of each sample, or a whole number, the only
                one, such as its cluster.
            fraction: of a pool keep int(n * fraction) samples. At every step the sub-batch counts.
            mode: `diversity`, see `choose_diverse`, or `frequency`, the largest numbers of concepts
                (CABS-FM).
            of: what n counts: the samples of the whole "pool", or those that earlier stages have
                "left".
        """
        require_suffix("path", path, (".parquet",), owner=self)
        self.concepts = ExternalColumn(path=path, column=column)
        self.fraction = require_fraction("fraction", fraction, owner=self)
        self.mode = require_choice("mode", mode, ("diversity", "frequency"), owner=self)
        self.of = require_choice("of", of, OFS, owner=self)

    @property
    def requires(self) -> Requirements:
        return Requirements(lists=self.concepts)

    @property
    def keeps_all(self) -> bool:
        return self.fraction == 1

    def asked_samples(self, left_samples: int, pool_samples: int) -> int:
        return int(counted(self.of, left_samples, pool_samples) * self.fraction)

    def select(self, source: Source) -> Choice:
        """Choose of all samples as of a single group."""
        count = self.asked_samples(len(source), len(source.whole))
        return self._choose(source, SubBatch(samples=min(count, len(source))))

    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        """Choose of each group; `diversity` takes no temperature."""
        if self.mode == "diversity" and sub_batch.temperature:
            raise InputError(
                "ConceptBalance chooses step by step where its mode is diversity, and has no "
                f"temperature. Got {sub_batch.temperature!r}; set it to null."
            )
        return self._choose(source, sub_batch)

    def _choose(self, source: Source, sub_batch: SubBatch) -> Choice:
        lists = source.take(source.rows, self.requires).lists
        if lists is None:
            raise ValueError("the source lacks the lists that ConceptBalance.requires names")
        if len(source) == 0:
            return Choice(multiplicities=np.zeros(0, dtype=np.int64))
        concepts = distinct_concepts(lists)
        if self.mode == "diversity":
            kept, scores = choose_diverse(concepts, source.uids, sub_batch)
        else:
            sizes = np.diff(concepts.offsets)
            scores = np.where(sizes > 0, sizes, np.nan).astype(np.float32)
            kept = draw_by_score(scores, source.uids, sub_batch)
        return Choice(multiplicities=kept, scores=scores)
