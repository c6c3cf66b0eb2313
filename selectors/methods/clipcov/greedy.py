"""The greedy choice of ClipCov: class by class, then merged by score.

What is picked of one class, in which order and at which score, does not depend on the other
classes: they meet only in the budget. So every class runs on its own, with its features read once a
round, and the picks of all classes are merged as a greedy choice over the class heads would do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

CANDIDATES = 256  # samples among which an always fresh greedy looks before it scores all again


class Similarities(Protocol):
    """The similarities within one class of n samples: p(i, j) = M_ij + M_ji, thresholded."""

    def redundancy(self, picks: np.ndarray) -> np.ndarray:
        """Sum p(i, j) over the picks j, int64 [m]: float64 [n]."""

    def among(self, members: np.ndarray) -> np.ndarray:
        """Return p(i, j) of some members, int64 [m]: float64 [m, m]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassState:
    """One class of n samples in the order of their uids. `scores` and below are written."""

    cross: np.ndarray  # float64 [n]
    label: np.ndarray  # float64 [n], similarity of caption and class name
    scores: np.ndarray  # float64 [n], after the last update
    numbers: np.ndarray  # int32 [n], from 1 in the order of picking; 0: not picked
    values: np.ndarray  # float64 [n], the score at which a sample was picked


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedySchedule:
    """When and how a class is scored again."""

    interval: int  # picks in the class between updates; 1: always fresh
    cumulative: bool  # whether each update charges the cross terms of *all* picks of the class
    cross_weight: float
    label_weight: float
    nonnegative: bool  # whether p(i, j) >= 0, so that an old score bounds a fresh one

    def charge(self, state: ClassState, new: np.ndarray) -> float:
        """Compute what an update takes from every member of the class for new picks, int64 [m]."""
        crossed = np.flatnonzero(state.numbers) if self.cumulative else new
        cross = self.cross_weight * state.cross[crossed].sum()
        return float(cross + self.label_weight * state.label[new].sum()) / len(state.scores)


def advance(
    state: ClassState, similarities: Similarities, schedule: GreedySchedule, *, until: float
) -> None:
    """Pick from a class while its best score is at least `until`.

    Updates come after every pick whose number plus one is a multiple of the interval, as in the
    authors' notebook: with 200, after picks 199, 399, ... Among equal scores the smaller uid wins.
    """
    if schedule.interval == 1:
        _advance_fresh(state, similarities, schedule, until)
    else:
        _advance_batched(state, similarities, schedule, until)


def _advance_batched(
    state: ClassState, similarities: Similarities, schedule: GreedySchedule, until: float
) -> None:
    """Pick in batches: between updates the scores stand still, so a batch is the top of a sort."""
    scores, numbers = state.scores, state.numbers
    while True:
        count = int(numbers.max(initial=0))
        batch = schedule.interval - (count + 1) % schedule.interval
        left = np.flatnonzero(numbers == 0)
        best = left[np.argsort(-scores[left], kind="stable")[:batch]]
        best = best[scores[best] >= until]
        numbers[best] = np.arange(count + 1, count + 1 + len(best))
        state.values[best] = scores[best]
        if len(best) < batch or len(best) == len(left):
            return
        new = np.flatnonzero(numbers > max(0, count + batch - schedule.interval))
        _update(state, similarities, schedule, new)


def _update(
    state: ClassState, similarities: Similarities, schedule: GreedySchedule, new: np.ndarray
) -> None:
    """Charge the class for its new picks."""
    if schedule.cross_weight:
        weight = schedule.cross_weight / len(state.scores)
        np.subtract(state.scores, weight * similarities.redundancy(new), out=state.scores)
    np.subtract(state.scores, schedule.charge(state, new), out=state.scores)


def _advance_fresh(
    state: ClassState, similarities: Similarities, schedule: GreedySchedule, until: float
) -> None:
    """Pick the best score given all picks before it, without scoring all each time.

    The best candidates are kept fresh with the similarities among them. What is outside can only
    have become worse than it was, the charge on the whole class apart. So a candidate that is
    better than the best outside was is the best of all. When none is, all are scored again.
    """
    numbers = state.numbers
    size = CANDIDATES if schedule.nonnegative else 1
    weight = schedule.cross_weight / len(state.scores)
    while True:
        left = np.flatnonzero(numbers == 0)
        if len(left) == 0:
            return
        best = left[np.argsort(-state.scores[left], kind="stable")[: size + 1]]
        if state.scores[best[0]] < until:
            return
        outside = state.scores[best[size]] if len(best) > size else -np.inf
        members = np.sort(best[:size])  # by uid, so that argmax prefers the smaller
        fresh = state.scores[members].copy()
        pairs = similarities.among(members) if weight and len(members) > 1 else None
        charged, new = 0.0, list[int]()
        count = int(numbers.max())
        while len(new) < len(members):
            at = int(fresh.argmax())
            value = fresh[at] - charged
            # The first is the best of all even where it equals the best outside.
            if value < until or (new and fresh[at] <= outside):
                break
            pick = int(members[at])
            numbers[pick] = count + len(new) + 1
            state.values[pick] = value
            new.append(pick)
            if pairs is not None:
                np.subtract(fresh, weight * pairs[at], out=fresh)
            fresh[at] = -np.inf
            charged += schedule.charge(state, np.asarray([pick]))
        picks = np.asarray(new)
        if weight:
            np.subtract(state.scores, weight * similarities.redundancy(picks), out=state.scores)
        np.subtract(state.scores, charged, out=state.scores)


def merge_classes(
    values: np.ndarray, uid_ranks: np.ndarray, classes: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    """Order the picks of all classes as a greedy choice over the heads of the classes takes them.

    A pick can be taken once all earlier ones of its class are, so that its turn comes with the
    lowest of them. Among equal values the head with the smaller uid comes first.

    Args:
        values: float64 [m], the score at which each was picked in its class.
        uid_ranks: int64 [m], the place of each uid in ascending order.
        classes: int64 [m].
        numbers: int32 [m], the order of picking in each class.

    Returns:
        Indices int64 [m].
    """
    turn = np.empty(len(values), dtype=np.int64)
    turn[np.lexsort((uid_ranks, -values))] = np.arange(len(values))
    by_class = np.lexsort((numbers, classes))
    shift = classes[by_class] * np.int64(len(values))  # keeps the running maxima of classes apart
    latest = np.maximum.accumulate(turn[by_class] + shift) - shift
    return by_class[np.argsort(latest, kind="stable")]


def choose(
    scores: np.ndarray,
    numbers: np.ndarray,
    starts: np.ndarray,
    *,
    budget: int,
    advance_all: Callable[[float, np.ndarray], None],
) -> None:
    """Pick in rounds from all classes until at least `budget` samples are picked.

    All that the round before picked belongs to the answer. A round asks for what is missing, and
    for more where updates took many of those that were asked for below the cut.

    Args:
        scores: float64 [n], the samples of class k at starts[k] : starts[k + 1]; written by rounds.
        numbers: int32 [n], 0 where not picked; written by rounds.
        starts: int64 [classes + 1], of classes that are not empty.
        budget: at most n.
        advance_all: `(until, classes)` advances these classes; scores and numbers then have what
            all ranks did.
    """
    boost = 1.0
    while (missing := budget - int((numbers > 0).sum())) > 0:
        left = np.where(numbers == 0, scores, -np.inf)
        asked = min(int(missing * boost) + budget // 64 + 16, int((numbers == 0).sum()))
        until = float(np.partition(left, len(left) - asked)[len(left) - asked])
        heads = np.maximum.reduceat(left, starts[:-1])
        advance_all(until, np.flatnonzero(heads >= until))
        got = missing - (budget - int((numbers > 0).sum()))
        boost = min(8.0, max(1.0, asked / got))
