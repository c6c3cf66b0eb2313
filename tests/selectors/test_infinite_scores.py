"""Scores that are not finite: -inf is never kept, +inf first, NaN is counted; by every rule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from siftclip.selectors.core.base import (
    Choice,
    Chunk,
    ScoreSelector,
    Selector,
    SubBatch,
    draw,
    oddities,
    run,
)
from siftclip.selectors.core.compose import And, Minus, Mix, Or, RankSum, Then
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import DataCompFraction, Rule, Threshold, TopCount, TopFraction
from siftclip.selectors.core.sampling import HardCapSampling, SoftCapSampling, SoftmaxSampling
from siftclip.selectors.core.sub_batch import add_uniform, draw_by_score
from siftclip.selectors.methods.external import External
from siftclip.selectors.methods.quota import QuotaPerCluster

VALUES = st.sampled_from([0.0, 0.5, -2.0, 7.0, math.nan, math.inf, -math.inf])
SCORES = st.lists(VALUES, min_size=1, max_size=24)


class Given(ScoreSelector):
    """Scores by the number of the row."""

    def __init__(self, values: np.ndarray, **rule: Any) -> None:
        super().__init__(**(rule or {"fraction": 1.0}))
        self.values = values

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(self.values[chunk.rows].astype(np.float32))


def make_source(samples: int) -> MemorySource:
    generator = np.random.default_rng(samples)
    uids = generator.integers(0, 2**63, (samples, 2)).astype(np.uint64)
    return MemorySource(Chunk(rows=np.arange(samples), uids=uids))


RULES: list[Callable[[], Rule]] = [
    lambda: TopFraction(1.0),
    lambda: TopFraction(0.5),
    lambda: TopCount(20),
    lambda: DataCompFraction(0.9),
    lambda: Threshold(-1e30),
    lambda: SoftmaxSampling(fraction=1.0, seed=1),
    lambda: SoftmaxSampling(fraction=0.4, temperature=0.01, seed=1),
    lambda: SoftCapSampling(fraction=3.0, seed=1),
    lambda: SoftCapSampling(fraction=2.0, batch_samples=5, temperature=0.1, seed=1),
    lambda: HardCapSampling(fraction=2.0, cap=2, seed=1),
]


@pytest.mark.parametrize("make_rule", RULES)
@given(values=SCORES)
def test_rules_never_keep_minus_infinity_and_infinity_first(
    make_rule: Callable[[], Rule], values: list[float]
) -> None:
    scores, rule = np.array(values, dtype=np.float32), make_rule()
    kept = rule(scores, make_source(len(values)).uids, len(values))
    assert not kept[~(scores > -np.inf)].any()
    best = scores == np.inf
    if kept[np.isfinite(scores)].any():  # then all of the best are kept already
        assert (kept[best] > 0).all()


def compositions(first: np.ndarray, second: np.ndarray) -> dict[str, Selector]:
    a, b = Given(first), Given(second)
    clusters = Given(np.arange(len(first)) % 2.0)
    return {
        "then": Then(stages=[a, b]),
        "and": And(selectors=[a, b]),
        "minus": Minus(keep=a, remove=Given(second, threshold=0.4)),
        "rank_sum": RankSum(selectors=[a, b], weights=[1.0, 0.0], fraction=1.0),
        "mix": Mix(selectors=[a, b], weights=[0.5, 2.0], fraction=1.0),
        "mix of draws": Mix(selectors=[a, b], rule=SoftCapSampling(fraction=2.0, seed=0)),
        "quota": QuotaPerCluster(selector=a, clusters=clusters, fraction=1.0),
        "quota of each": QuotaPerCluster(selector=a, clusters=clusters, per_cluster=30),
    }


@pytest.mark.parametrize("name", list(compositions(np.zeros(1), np.zeros(1))))
@given(rows=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=20))
def test_compositions_never_keep_minus_infinity(name: str, rows: list[tuple[float, float]]) -> None:
    first, second = (np.array(column) for column in zip(*rows, strict=True))
    choice = run(compositions(first, second)[name], make_source(len(rows)))
    never = ~(first > -np.inf)
    if name in ("then", "and", "rank_sum") or name.startswith("mix"):
        never |= ~(second > -np.inf)
    assert not choice.multiplicities[never].any()
    if name == "rank_sum":
        assert (choice.multiplicities[~never] == 1).all()
    either = run(Or(selectors=[Given(first), Given(second)]), make_source(len(rows)))
    assert not either.multiplicities[~((first > -np.inf) | (second > -np.inf))].any()


def test_a_mix_gives_infinite_scores_a_meaning() -> None:
    inf, nan = math.inf, math.nan
    first = np.array([0.0, 1.0, inf, -inf, nan, -inf, inf])
    second = np.array([1.0, 0.0, 0.0, 0.0, 0.0, nan, inf])
    mixed = Mix(selectors=[Given(first), Given(second)], weights=[1, -1], fraction=1)
    scores = mixed.scores(make_source(7))
    assert scores[:2].tolist() == [-2.0, 2.0]  # statistics of what is finite in both
    assert scores[2] == inf
    assert np.isneginf(scores[[3, 5, 6]]).all()
    assert np.isnan(scores[4])


@pytest.mark.parametrize("temperature", [None, 0.5])
@given(values=st.lists(VALUES, min_size=8, max_size=8), samples=st.integers(1, 4))
def test_sub_batches_take_minus_infinity_last(
    temperature: float | None, values: list[float], samples: int
) -> None:
    scores, uids = np.array(values), make_source(8).uids
    asked = SubBatch(samples=samples, groups=2, temperature=temperature)
    kept = draw_by_score(scores, uids, asked)
    for group in (slice(0, 4), slice(4, 8)):
        own, chosen = scores[group], kept[group]
        assert chosen.sum() == samples
        able, unscored = own > -np.inf, np.isnan(own)
        assert chosen[able].sum() == min(samples, able.sum())
        assert chosen[able | unscored].sum() == min(samples, (able | unscored).sum())
        assert chosen[own == np.inf].sum() == min(samples, (own == np.inf).sum())


@given(values=st.lists(VALUES, min_size=8, max_size=8), seed=st.integers(0, 99))
def test_the_uniform_part_of_a_sub_batch_takes_minus_infinity_last(
    values: list[float], seed: int
) -> None:
    scores, uids = np.array(values), make_source(8).uids
    chosen = draw_by_score(scores, uids, SubBatch(samples=1, groups=2, seed=seed))
    kept = add_uniform(chosen, uids, np.array([2, 2]), seed=seed, scores=scores)
    for group in (slice(0, 4), slice(4, 8)):
        able = scores[group] > -np.inf
        assert kept[group].sum() == 3
        assert kept[group][able].sum() == min(3, able.sum())


def test_a_uniform_part_is_uniform_among_what_can_be_kept() -> None:
    source = make_source(400)
    scores = np.where(np.arange(400) % 2, -np.inf, 1.0)
    none = np.zeros(400, dtype=np.int64)
    kept = add_uniform(none, source.uids, np.array([100]), seed=3, scores=scores)
    plain = add_uniform(none, source.uids, np.array([400]), seed=3)
    assert plain.all()
    assert kept[::2].sum() == 100
    halves = kept[::2][:100].sum()
    assert 30 < halves < 70


def test_a_filled_sub_batch_is_told(caplog: pytest.LogCaptureFixture) -> None:
    source = make_source(4)
    draw(Given(np.array([1.0, 2.0, -np.inf, -np.inf])), source, SubBatch(samples=2))
    assert not caplog.text
    draw(Given(np.array([1.0, -np.inf, -np.inf, math.nan])), source, SubBatch(samples=2))
    assert "too few samples with a score above -inf" in caplog.text


def test_what_is_left_out_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    values = np.array([0.5, -np.inf, math.nan, np.inf, -np.inf] * 20)
    with caplog.at_level(logging.WARNING):
        choice = run(Given(values, fraction=0.6), make_source(100))
    assert choice.multiplicities.sum() == 40
    assert "Given: 20 of 100 samples have no score and cannot be selected" in caplog.text
    assert "Given: 40 of 100 samples have the score -inf and are never kept" in caplog.text
    assert "Given: keeps 40 samples where 60 were asked for" in caplog.text


def test_numbers_that_float32_cannot_hold_are_not_infinite() -> None:
    column = np.array([1e300, -1e300, np.inf, -np.inf, 0.5, math.nan])
    chunk = Chunk(rows=np.arange(6), uids=make_source(6).uids, column=column)
    scores = External(path=None, column="score", fraction=1.0).score(chunk).numpy()
    assert np.isfinite(scores[[0, 1, 4]]).all()
    assert scores[0] > 1e38
    assert scores[1] < -1e38
    np.testing.assert_array_equal(scores[[2, 3, 5]], [np.inf, -np.inf, np.nan])


def choice_of(kept: list[int], scores: list[float] | None = None) -> Choice:
    return Choice(
        multiplicities=np.array(kept, dtype=np.int64),
        scores=None if scores is None else np.array(scores, dtype=np.float32),
    )


class Whatever(Selector):
    """A set function that was asked for nothing."""

    def select(self, source: Any) -> Choice:
        raise NotImplementedError


MANY = list(range(1000))


@pytest.mark.parametrize(
    ("selector", "kept", "expected"),
    [
        (
            Whatever(),
            [1] * 1000,
            ["keeps 1000 of 1000 samples (100 %): it changes next to nothing"],
        ),
        (Whatever(), [int(i > 3) for i in MANY], ["keeps 996 of 1000 samples (99.6 %)"]),
        (Whatever(), [int(i > 300) for i in MANY], []),
        (Whatever(), [int(i > 995) for i in MANY], ["keeps 4 of 1000 samples (0.4 %)"]),
        (Whatever(), [0] * 1000, ["keeps 0 of 1000"]),
        (Whatever(), [], []),
        (Given(np.zeros(0), fraction=1.0), [1] * 1000, []),  # as asked
        (Given(np.zeros(0), fraction=1.0, of="left"), [1] * 1000, []),
        (Given(np.zeros(0), fraction=0.5), [1] * 1000, ["changes next to nothing"]),  # of a stage
        (Given(np.zeros(0), fraction=0.002), [int(i < 4) for i in MANY], []),  # of 2,000
        (Given(np.zeros(0), threshold=0.1), [int(i < 4) for i in MANY], ["keeps 4 of 1000"]),
        (Given(np.zeros(0), rule=TopCount(2000)), [1] * 1000, ["changes next to nothing"]),
        (Given(np.zeros(0), rule=SoftCapSampling(fraction=1.0, seed=0)), [2] * 1000, []),
        (Given(np.zeros(0), fraction=0.3), [int(i < 500) for i in MANY], ["where 600 were asked"]),
        (Given(np.zeros(0), rule=DataCompFraction(1.0)), [1] * 1000, []),
        (
            Given(np.zeros(0), rule=HardCapSampling(fraction=2.0, cap=2, seed=0)),
            [2] * 1000,
            ["keeps 2000 samples where 4000 were asked for"],
        ),
        (
            Given(np.zeros(0), rule=SoftCapSampling(fraction=0.5, batch_samples=100_000, seed=0)),
            [1] * 1000,
            ["takes all draws at once", "changes next to nothing"],
        ),
        (
            Given(np.zeros(0), rule=SoftCapSampling(fraction=0.5, batch_samples=400, seed=0)),
            [int(i < 400) + int(i < 600) for i in MANY],
            ["batch_samples=400 leaves 3 batches, so that no sample is repeated more often"],
        ),
        (
            Given(np.zeros(0), rule=SoftCapSampling(fraction=0.5, batch_samples=100, seed=0)),
            [2 * int(i < 500) for i in MANY],
            [],
        ),
        (
            Given(np.zeros(0), rule=SoftCapSampling(fraction=0.5, seed=0)),
            [1000 * int(i == 1) for i in MANY],
            ["keeps 1 of 1000 samples (0.1 %), each 1e+03 times on average"],
        ),
    ],
)
def test_selectors_without_effect_say_so(
    selector: Selector, kept: list[int], expected: list[str]
) -> None:
    told = oddities(selector, choice_of(kept), 2000)
    assert len(told) == len(expected), told
    for text, words in zip(told, expected, strict=True):
        assert words in text


@pytest.mark.parametrize(
    ("scores", "kept", "told"),
    [
        ([0.0] * 10, [1] * 3 + [0] * 7, "10 of 10 samples have the same score, 0, of which 3"),
        ([5.0] + [0.0] * 9, [1] * 3 + [0] * 7, "9 of 10 samples have the same score, 0, of"),
        ([5.0, 4.0] + [0.0] * 8, [1] * 3 + [0] * 7, "8 of 10 samples have the same score, 0, of"),
        # nearly all are decided by their scores
        ([*range(20, 9, -1)] + [0.0] * 9, [1] * 12 + [0] * 8, None),
        ([9.0, 8.0, 7.0, 0.0, math.nan], [1, 1, 0, 0, 0], None),
        ([0.0, 0.0, -math.inf, math.nan], [1, 1, 0, 0], None),  # all that can be kept
        ([0.0, 0.0, 5.0, 0.0], [1, 0, 0, 1], None),  # drawn at random
    ],
)
def test_cuts_through_equal_scores_are_told(
    scores: list[float], kept: list[int], told: str | None
) -> None:
    texts = oddities(Given(np.zeros(0), fraction=0.3), choice_of(kept, scores), 10)
    found = [text for text in texts if "have the same score" in text]
    assert len(found) == (told is not None)
    assert not found or str(told) in found[0]


def test_members_of_a_composition_say_so_too(caplog: pytest.LogCaptureFixture) -> None:
    values = np.arange(200.0)
    idle = Given(values, threshold=-5.0)
    run(Then(stages=[Given(values, fraction=0.5), idle]), make_source(200))
    assert caplog.text.count("changes next to nothing") == 1
    assert "Given: keeps 100 of 100 samples (100 %)" in caplog.text
    caplog.clear()
    run(Then(stages=[Given(values, fraction=0.5), Given(values, fraction=0.5)]), make_source(200))
    assert "Given: keeps 100 of 100 samples" in caplog.text  # of the pool: all that were left
