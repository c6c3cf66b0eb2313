"""Sampling rules: distributions against enumeration, and loop-written twins."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from siftclip.errors import InputError
from siftclip.hashing import uniform_score
from siftclip.selectors.core.base import ScoreSelector
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.noise import gumbel, noise, noise_state
from siftclip.selectors.core.sampling import (
    HardCapSampling,
    SoftCapSampling,
    SoftmaxSampling,
    draw_without_replacement,
    hard_cap,
    soft_cap,
)
from siftclip.selectors.methods.clip_score import ClipScore

LOGITS = st.lists(
    st.sampled_from([0.0, 1.0, -2.0, 5.0, 0.25, math.nan, math.inf, -math.inf]),
    min_size=1,
    max_size=20,
)
TRIALS = 2000


def make_uids(samples: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2**63, size=(samples, 2)).astype(np.uint64)


def test_noise_is_uniform_and_independent() -> None:
    uids = make_uids(20_000)
    first, second = noise(noise_state(uids, 1), 0), noise(noise_state(uids, 1), 1)
    other_seed = noise(noise_state(uids, 2), 0)
    assert kstest(first, "uniform").pvalue > 1e-4
    assert kstest(gumbel(noise_state(uids, 1), 3), "gumbel_r").pvalue > 1e-4
    for other in (second, other_seed, uniform_score(uids, 1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.03
    assert 0 < first.min() < first.max() < 1


def test_noise_is_never_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its logarithms are finite, whatever the bits are."""
    bits = np.array([0, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr("siftclip.selectors.core.noise.hashes", lambda state, draw: bits)
    assert noise(bits, 0).tolist() == [2.0**-53, 1 - 2.0**-53]
    assert np.isfinite(gumbel(bits, 0)).all()


def test_noise_depends_on_both_halves_of_a_uid() -> None:
    uids = np.array([[0, 0], [0, 1], [1, 0]], dtype=np.uint64)
    assert len(set(noise(noise_state(uids, 0), 0))) == 3


def sets_of_draws(probabilities: np.ndarray, count: int) -> dict[tuple[int, ...], float]:
    """The probability of each set when drawing one by one without replacement."""
    found: Counter[tuple[int, ...]] = Counter()
    for order in itertools.permutations(range(len(probabilities)), count):
        left, chance = 1.0, 1.0
        for i in order:
            chance *= probabilities[i] / left
            left -= probabilities[i]
        found[tuple(sorted(order))] += chance  # type: ignore[assignment]
    return dict(found)


def check_frequencies(
    observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]
) -> None:
    keys = sorted(expected)
    assert set(observed) <= set(keys)
    counts = [observed[key] for key in keys]
    share = np.array([expected[key] for key in keys])
    assert chisquare(counts, share / share.sum() * sum(counts)).pvalue > 1e-4


def test_draws_have_the_probabilities_of_drawing_one_by_one() -> None:
    logits = np.array([0.0, 1.0, -1.0, 0.5])
    uids = make_uids(4)
    observed = Counter(
        tuple(np.flatnonzero(draw_without_replacement(logits, uids, 2, seed=seed)).tolist())
        for seed in range(TRIALS)
    )
    check_frequencies(observed, sets_of_draws(np.exp(logits) / np.exp(logits).sum(), 2))


def soft_cap_distribution(
    logits: tuple[float, ...], total: int, penalty: float, batch: int
) -> dict[tuple[int, ...], float]:
    """The probability of each array of multiplicities, by following every batch."""
    if total == 0:
        return {(0,) * len(logits): 1.0}
    weights = np.exp(np.array(logits))
    found: Counter[tuple[int, ...]] = Counter()
    for drawn, chance in sets_of_draws(weights / weights.sum(), min(batch, total)).items():
        lowered = tuple(x - penalty * (i in drawn) for i, x in enumerate(logits))
        rest = soft_cap_distribution(lowered, total - min(batch, total), penalty, batch)
        for counts, probability in rest.items():
            sums = tuple(count + (i in drawn) for i, count in enumerate(counts))
            found[sums] += chance * probability  # type: ignore[assignment]
    return dict(found)


def test_soft_cap_has_the_probabilities_of_its_definition() -> None:
    logits, uids = (0.0, 1.0, -0.5), make_uids(3)
    observed = Counter(
        tuple(soft_cap(np.array(logits), uids, 5, penalty=0.7, batch_samples=2, seed=seed).tolist())
        for seed in range(TRIALS)
    )
    check_frequencies(observed, soft_cap_distribution(logits, 5, 0.7, 2))


def soft_cap_slowly(
    logits: np.ndarray, uids: np.ndarray, total: int, penalty: float, batch: int, seed: int
) -> list[int]:
    """Sort all keys in every draw, and lower the logits in place; +inf comes before all others."""
    state = noise_state(uids, seed)
    able = [i for i in range(len(logits)) if logits[i] > -math.inf]
    best = [x == math.inf for x in logits]
    current = [0.0 if x == math.inf else float(x) for x in logits]
    counts, left, draw = [0] * len(logits), total, 0
    while left > 0 and able:
        size = min(batch, len(able), left)
        numbers = gumbel(state, draw)
        order = sorted(
            able, key=lambda i: (not best[i], -(current[i] + numbers[i]), *uids[i].tolist())
        )
        for i in order[:size]:
            counts[i] += 1
            current[i] -= penalty
        left, draw = left - size, draw + 1
    return counts


@given(LOGITS, st.integers(0, 60), st.integers(1, 8), st.sampled_from([0.0, 0.15, 3.0]))
def test_soft_cap_equals_slow_twin(
    values: list[float], total: int, batch: int, penalty: float
) -> None:
    logits, uids = np.array(values, dtype=np.float32), make_uids(len(values), seed=total)
    counts = soft_cap(logits, uids, total, penalty=penalty, batch_samples=batch, seed=total)
    assert counts.dtype == np.int64
    assert counts.tolist() == soft_cap_slowly(logits, uids, total, penalty, batch, total)


def test_soft_cap_of_many_draws_equals_slow_twin() -> None:
    """Enough samples and draws that most are never looked at, and that the cut is set anew."""
    logits = np.random.default_rng(4).standard_normal(3000) * 2
    uids = make_uids(3000, seed=4)
    counts = soft_cap(logits, uids, 6000, penalty=0.4, batch_samples=100, seed=9)
    assert counts.tolist() == soft_cap_slowly(logits, uids, 6000, 0.4, 100, 9)


def soft_cap_of_the_paper(
    scores: np.ndarray, total: int, batch: int, penalty: float, generator: np.random.Generator
) -> np.ndarray:
    """Soft Cap Sampling as published: softmax, a batch without replacement, the penalty.

    There is no temperature: the score is what enters the softmax, and what the penalty is taken of.
    """
    before_softmax, counts = scores.copy(), np.zeros(len(scores), dtype=np.int64)
    while counts.sum() < total:
        chances = np.exp(before_softmax - before_softmax.max())
        size = min(batch, total - int(counts.sum()))
        drawn = generator.choice(len(scores), size=size, replace=False, p=chances / chances.sum())
        counts[drawn] += 1
        before_softmax[drawn] -= penalty
    return counts


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_soft_cap_repeats_as_the_paper_does_with_the_logits_as_scores(temperature: float) -> None:
    """With a temperature the penalty is taken from score / temperature, not from the score."""
    generator = np.random.default_rng(5)
    logits, uids = generator.standard_normal(2000) * 1.5, make_uids(2000)
    scores = (logits * temperature).astype(np.float32)
    rule = SoftCapSampling(fraction=1.0, penalty=0.15, temperature=temperature, seed=2)
    ours = rule(scores, uids, 2000)
    paper = [soft_cap_of_the_paper(logits, 2000, 1, 0.15, generator) for _ in range(5)]
    distinct = np.array([np.count_nonzero(counts) for counts in paper])
    assert abs(np.count_nonzero(ours) - distinct.mean()) < 6 * distinct.std(ddof=1) + 10
    of_the_score = soft_cap(logits, uids, 2000, penalty=0.15 / temperature, batch_samples=1, seed=2)
    assert temperature == 1 or np.count_nonzero(of_the_score) > distinct.max() + 200
    # the mean logit of a draw: repeats fall on the same samples
    means = np.array([counts @ logits / 2000 for counts in paper])
    assert abs(ours @ logits / 2000 - means.mean()) < 6 * means.std(ddof=1) + 0.02


def test_batches_of_soft_cap_are_a_1280th_of_the_draws() -> None:
    scores, uids = np.random.default_rng(0).standard_normal(300).astype(np.float32), make_uids(300)
    for count, batch in ((12_800, 10), (2559, 1), (100, 1)):
        auto = SoftCapSampling(count=count, seed=1)(scores, uids, 300)
        given = SoftCapSampling(count=count, seed=1, batch_samples=batch)(scores, uids, 300)
        assert auto.tolist() == given.tolist()
    assert auto.max() > 1


@pytest.mark.parametrize(
    ("batch_samples", "fraction", "words"),
    [
        (100_000, 1.0, "all draws"),
        (100, 3.0, "every sample"),
        (99, 3.0, "4 batches"),
        (30, 3.0, None),
        ("auto", 1.0, None),
    ],
)
def test_a_batch_that_prevents_repetition_is_told(
    batch_samples: Any, fraction: float, words: str | None
) -> None:
    rule = SoftCapSampling(fraction=fraction, batch_samples=batch_samples, seed=0)
    told = rule.faults(100, 100)
    assert [bool(words and words in text) for text in told] == [True] * (words is not None)
    assert all("batch_samples be auto" in text for text in told)


def test_a_larger_penalty_repeats_less() -> None:
    logits, uids = np.random.default_rng(0).standard_normal(400) * 2, make_uids(400)
    distinct = [
        np.count_nonzero(soft_cap(logits, uids, 400, penalty=penalty, batch_samples=5, seed=1))
        for penalty in (0.0, 0.15, 1.0, 8.0)
    ]
    assert distinct == sorted(distinct)
    assert distinct[0] < distinct[-1]


def hard_cap_distribution(
    weights: tuple[float, ...], room: tuple[int, ...], total: int
) -> dict[tuple[int, ...], float]:
    """The probability of each array of multiplicities, by following every draw."""
    if total == 0:
        return {(0,) * len(weights): 1.0}
    mass = sum(w for w, r in zip(weights, room, strict=True) if r)
    found: Counter[tuple[int, ...]] = Counter()
    for i, weight in enumerate(weights):
        if not room[i]:
            continue
        less = tuple(r - (j == i) for j, r in enumerate(room))
        for counts, chance in hard_cap_distribution(weights, less, total - 1).items():
            sums = tuple(count + (j == i) for j, count in enumerate(counts))
            found[sums] += chance * weight / mass  # type: ignore[assignment]
    return dict(found)


def test_hard_cap_has_the_probabilities_of_drawing_one_by_one() -> None:
    logits, uids = np.array([0.0, 1.5, -0.5]), make_uids(3)
    observed = Counter(
        tuple(hard_cap(logits, uids, 5, cap=3, seed=seed).tolist()) for seed in range(TRIALS)
    )
    check_frequencies(observed, hard_cap_distribution(tuple(np.exp(logits)), (3, 3, 3), 5))


@given(LOGITS, st.integers(0, 60), st.integers(1, 4), st.integers(0, 9))
def test_hard_cap_keeps_its_promises(values: list[float], total: int, cap: int, seed: int) -> None:
    logits, uids = np.array(values, dtype=np.float32), make_uids(len(values), seed)
    counts = hard_cap(logits, uids, total, cap=cap, seed=seed)
    able, best = logits > -math.inf, logits == math.inf
    assert counts.dtype == np.int64
    assert counts.sum() == min(total, cap * able.sum())
    assert counts.max() <= cap
    assert not counts[~able].any()
    assert counts[best].sum() == min(total, cap * best.sum())
    shuffle = np.random.default_rng(seed).permutation(len(values))
    shuffled = hard_cap(logits[shuffle], uids[shuffle], total, cap=cap, seed=seed)
    assert np.array_equal(shuffled, counts[shuffle])


def test_hard_cap_bears_extreme_logits() -> None:
    logits = np.array([0.0, -2000.0, 3000.0])
    assert hard_cap(logits, make_uids(3), 5, cap=2, seed=0).tolist() == [2, 1, 2]


@given(LOGITS, st.integers(0, 25), st.integers(0, 9))
def test_draws_do_not_depend_on_order(values: list[float], count: int, seed: int) -> None:
    logits, uids = np.array(values, dtype=np.float32), make_uids(len(values), seed)
    kept = draw_without_replacement(logits, uids, count, seed=seed)
    able, best = logits > -math.inf, logits == math.inf
    assert kept.sum() == min(count, able.sum())
    assert not kept[~able].any()
    assert kept[best].sum() == min(count, best.sum())
    shuffle = np.random.default_rng(seed).permutation(len(values))
    assert np.array_equal(
        draw_without_replacement(logits[shuffle], uids[shuffle], count, seed=seed), kept[shuffle]
    )
    soft = soft_cap(logits, uids, count, penalty=0.2, batch_samples=3, seed=seed)
    again = soft_cap(logits[shuffle], uids[shuffle], count, penalty=0.2, batch_samples=3, seed=seed)
    assert np.array_equal(again, soft[shuffle])


def test_temperature_divides_the_scores() -> None:
    scores, uids = np.random.default_rng(1).random(50).astype(np.float32), make_uids(50)
    rule = SoftmaxSampling(count=10, temperature=1e-6, seed=3)
    assert set(np.flatnonzero(rule(scores, uids, 50))) == set(np.argsort(scores)[-10:])


def test_fractions_count_the_pool() -> None:
    scores, uids = np.zeros(50, dtype=np.float32), make_uids(50)
    assert SoftmaxSampling(fraction=0.25, seed=0)(scores, uids, 100).sum() == 25
    assert SoftCapSampling(fraction=1.5, seed=0, batch_samples=7)(scores, uids, 100).sum() == 150
    assert HardCapSampling(fraction=1.5, seed=0)(scores, uids, 100).sum() == 150


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftmaxSampling(seed=0), "exactly one of fraction"),
        (lambda: SoftmaxSampling(seed=0, fraction=1.5), "fraction must be a number"),
        (lambda: SoftCapSampling(seed=0, fraction=0.0), "fraction must be above 0"),
        (lambda: SoftCapSampling(seed=0, count=1, penalty=-1), "penalty must be at least 0"),
        (lambda: SoftCapSampling(seed=0, count=1, batch_samples=0), "batch_samples must be an"),
        (
            lambda: SoftCapSampling(seed=0, count=1, batch_samples="few"),
            "batch_samples must be auto",
        ),
        (lambda: HardCapSampling(seed=0, count=1, cap=0), "cap must be an integer"),
        (lambda: HardCapSampling(seed=-1, count=1), "seed must be an integer"),
        (lambda: HardCapSampling(seed=0, count=1, temperature=0), "temperature must be above 0"),
        (lambda: HardCapSampling(seed=0, count=1.5), "count must be an integer"),
    ],
)
def test_wrong_parameters_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "make_rule",
    [
        lambda: SoftmaxSampling(fraction=0.3, temperature=0.1, seed=1),
        lambda: SoftCapSampling(fraction=1.0, batch_samples=16, seed=1),
        lambda: HardCapSampling(fraction=1.0, cap=3, seed=1),
    ],
)
def test_contract(make_rule: Callable[[], Any]) -> None:
    def make() -> ScoreSelector:
        return ClipScore(features="l14", rule=make_rule())

    check_selector(make)


@pytest.mark.parametrize("rule_class", [SoftmaxSampling, SoftCapSampling, HardCapSampling])
def test_fractions_of_the_pool_or_of_what_is_left(rule_class: Any) -> None:
    scores, uids = np.zeros(40, dtype=np.float32), make_uids(40)
    for of, drawn in (("pool", 20), ("left", 8)):
        assert rule_class(fraction=0.2, seed=0, of=of)(scores, uids, 100).sum() == drawn


def test_hard_cap_finds_scores_that_are_far_from_all_others() -> None:
    """Most scores are in one bin of the histogram that guesses the time of the last draw."""
    logits = np.concatenate([[1e6], np.zeros(500)])
    drawn = hard_cap(logits, make_uids(501), 300, cap=2, seed=0)
    assert drawn.sum() == 300
    assert drawn[0] == 2
