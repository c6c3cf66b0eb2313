"""The greedy choice class by class, against a loop over the whole pool."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.selectors.methods.clipcov import greedy as module
from siftclip.selectors.methods.clipcov.greedy import (
    ClassState,
    GreedySchedule,
    advance,
    choose,
    merge_classes,
)


class Matrix:
    """Similarities of a class that are all kept."""

    def __init__(self, pairs: np.ndarray) -> None:
        self.pairs = pairs
        self.calls = 0

    def redundancy(self, picks: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self.pairs[:, picks].sum(1)

    def among(self, members: np.ndarray) -> np.ndarray:
        return self.pairs[np.ix_(members, members)]


class Pool:
    """Classes of 2^k samples with dyadic numbers, so that sums are exact and ties are real."""

    def __init__(self, seed: int, *, classes: int = 4, levels: int = 4, signed: bool = False):
        generator = np.random.default_rng(seed)
        self.sizes = 2 ** generator.integers(0, 5, size=classes)
        self.classes = np.repeat(np.arange(classes), self.sizes)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        n = len(self.classes)
        self.ranks = np.empty(n, dtype=np.int64)  # ascending within each class
        ranks = generator.permutation(n)
        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            self.ranks[start:end] = np.sort(ranks[start:end])
        self.scores = generator.integers(0, levels, size=n) / 4
        self.cross = generator.integers(0, levels, size=n) / 8
        self.label = generator.integers(-levels if signed else 0, levels, size=n) / 8
        self.pairs = []
        for size in self.sizes:
            half = generator.integers(-levels if signed else 0, levels, size=(size, size)) / 8
            self.pairs.append(half + half.T)

    def slow(self, budget: int, schedule: GreedySchedule) -> list[int]:
        """One pick of the whole pool after the other, with updates as in the notebook."""
        scores = self.scores.copy()
        picks: list[int] = []
        of_class: dict[int, list[int]] = {c: [] for c in range(len(self.sizes))}
        updated = dict.fromkeys(of_class, 0)
        for _ in range(budget):
            left = [i for i in range(len(scores)) if i not in picks]
            best = min(left, key=lambda i: (-scores[i], self.ranks[i]))
            picks.append(best)
            c = int(self.classes[best])
            of_class[c].append(best)
            if (len(of_class[c]) + 1) % schedule.interval:
                continue
            new = of_class[c][updated[c] :]
            updated[c] = len(of_class[c])
            start, n = int(self.starts[c]), int(self.sizes[c])
            charged = of_class[c] if schedule.cumulative else new
            for i in range(start, start + n):
                for j in new:
                    pair = self.pairs[c][i - start, j - start]
                    scores[i] -= schedule.cross_weight / n * pair
                    scores[i] -= schedule.label_weight / n * self.label[j]
                for j in charged:
                    scores[i] -= schedule.cross_weight / n * self.cross[j]
        return picks

    def fast(self, budget: int, schedule: GreedySchedule) -> list[int]:
        scores = self.scores.copy()
        numbers = np.zeros(len(scores), dtype=np.int32)
        values = np.zeros(len(scores))

        def advance_all(until: float, classes: np.ndarray) -> None:
            for c in classes:
                at = slice(self.starts[c], self.starts[c + 1])
                state = ClassState(
                    cross=self.cross[at],
                    label=self.label[at],
                    scores=scores[at],
                    numbers=numbers[at],
                    values=values[at],
                )
                advance(state, Matrix(self.pairs[c]), schedule, until=until)

        choose(scores, numbers, self.starts, budget=budget, advance_all=advance_all)
        picked = np.flatnonzero(numbers)
        order = merge_classes(
            values[picked], self.ranks[picked], self.classes[picked], numbers[picked]
        )
        return picked[order[:budget]].tolist()


def schedule(
    interval: int, *, cumulative: bool = False, nonnegative: bool = True, cross_weight: float = 1.0
) -> GreedySchedule:
    return GreedySchedule(
        interval=interval,
        cumulative=cumulative,
        cross_weight=cross_weight,
        label_weight=0.5,
        nonnegative=nonnegative,
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    interval=st.sampled_from([1, 2, 3, 5, 200]),
    cumulative=st.booleans(),
    signed=st.booleans(),
    part=st.floats(0, 1),
)
def test_equals_greedy_over_the_pool(
    seed: int, interval: int, cumulative: bool, signed: bool, part: float
) -> None:
    pool = Pool(seed, signed=signed)
    rule = schedule(interval, cumulative=cumulative, nonnegative=not signed)
    budget = round(part * len(pool.scores))
    assert pool.fast(budget, rule) == pool.slow(budget, rule)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("candidates", [1, 2, 3, 256])
def test_any_number_of_candidates_gives_the_fresh_greedy(
    monkeypatch: pytest.MonkeyPatch, candidates: int, signed: bool
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    rule = schedule(1, nonnegative=not signed)
    for seed in range(30):
        pool = Pool(seed, classes=2, levels=(3, 40)[seed % 2], signed=signed)
        budget = min(14, len(pool.scores))
        assert pool.fast(budget, rule) == pool.slow(budget, rule)


@pytest.mark.parametrize("interval", [1, 2, 200])
def test_without_cross_weight(interval: int) -> None:
    pool = Pool(5)
    rule = schedule(interval, cross_weight=0.0)
    assert pool.fast(len(pool.scores), rule) == pool.slow(len(pool.scores), rule)


def test_all_equal_goes_by_uid() -> None:
    pool = Pool(2)
    pool.scores[:] = 1.0
    assert len(pool.scores) > 9
    assert pool.fast(9, schedule(200)) == np.argsort(pool.ranks)[:9].tolist()


def test_candidates_spare_updates() -> None:
    n = 512
    generator = np.random.default_rng(0)
    state = ClassState(
        cross=np.zeros(n),
        label=np.zeros(n),
        scores=np.sort(generator.random(n))[::-1].copy(),
        numbers=np.zeros(n, dtype=np.int32),
        values=np.zeros(n),
    )
    similarities = Matrix(generator.random((n, n)) / 100)
    advance(state, similarities, schedule(1), until=0.5)
    assert (state.numbers > 0).sum() > 200
    assert similarities.calls < 10


def test_stopping_and_going_on_gives_the_same_picks() -> None:
    for interval in (1, 2, 5):
        pool = Pool(8, classes=1, levels=30)
        states = []
        for stops in ([-np.inf], [5.0, 4.0, 3.5, 3.4, 1.0, -np.inf]):
            state = ClassState(
                cross=pool.cross,
                label=pool.label,
                scores=pool.scores.copy(),
                numbers=np.zeros(len(pool.scores), dtype=np.int32),
                values=np.zeros(len(pool.scores)),
            )
            for until in stops:
                advance(state, Matrix(pool.pairs[0]), schedule(interval), until=until)
            states.append(state)
        assert np.array_equal(states[0].numbers, states[1].numbers)
        assert np.array_equal(states[0].values, states[1].values)


def test_merge_of_a_class_that_rises() -> None:
    # class 0 hands out 5, 1, 9: the 9 comes right after the 1; class 1 has 3 and 1
    values = np.array([5.0, 1.0, 9.0, 3.0, 1.0])
    order = merge_classes(
        values,
        np.array([0, 4, 1, 2, 3]),
        np.array([0, 0, 0, 1, 1]),
        np.array([1, 2, 3, 1, 2], dtype=np.int32),
    )
    assert values[order].tolist() == [5.0, 3.0, 1.0, 1.0, 9.0]
    assert order.tolist() == [0, 3, 4, 1, 2]
