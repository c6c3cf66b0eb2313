"""What samples count in the loss: declared, checked, and kept by compositions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from siftclip.errors import InputError
from siftclip.selectors.core.base import (
    Choice,
    ScoreSelector,
    Selector,
    Source,
    SubBatch,
    draw,
    run,
)
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.compose import And, Minus, Mix, Or, RankSum, Then
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.sampling import SoftmaxSampling
from siftclip.selectors.core.source import TRAINING_LOSS, Chunk
from siftclip.selectors.methods.infobatch import InfoBatch
from siftclip.selectors.methods.quota import QuotaPerCluster
from siftclip.selectors.methods.uniform import Uniform

# How often a sample is kept, and what it counts; None: the selector weighs nothing.
ROWS = st.lists(
    st.tuples(*[st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.5, 1.0, 3.0]))] * 3),
    min_size=1,
    max_size=20,
)
WEIGHS = st.tuples(*[st.booleans()] * 3)


class Weighed(Selector):
    """Multiplicities and weights of a test, by row."""

    def __init__(self, kept: Sequence[int], weights: Sequence[float] | None = None) -> None:
        self.kept = np.asarray(kept, dtype=np.int64)
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float32)

    @property
    def weighs(self) -> bool:
        return self.weights is not None

    def select(self, source: Source) -> Choice:
        weights = None if self.weights is None else self.weights[source.rows]
        return Choice(multiplicities=self.kept[source.rows], weights=weights)

    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        return self.select(source)


class Undeclared(Weighed):
    """A plug-in that answers with weights and says nothing of it."""

    weighs = False


class WeighedScores(ScoreSelector):
    """Scores with weights; an importance sampler could be like it."""

    weighs = True

    def score(self, chunk: Chunk) -> Tensor:
        return torch.ones(len(chunk))


def source_of(samples: int, **columns: Any) -> MemorySource:
    uids = np.random.default_rng(1).integers(0, 2**63, (samples, 2)).astype(np.uint64)
    return MemorySource(Chunk(rows=np.arange(samples), uids=uids, **columns))


def answer(selector: Selector, samples: int) -> list[tuple[int, float]]:
    """How often each sample is kept, and what it counts if it is."""
    choice = run(selector, source_of(samples))
    assert (choice.weights is not None) <= selector.weighs
    weights = np.ones(samples) if choice.weights is None else choice.weights
    kept = choice.multiplicities
    return [(int(m), float(w) if m else 0.0) for m, w in zip(kept, weights, strict=True)]


@given(rows=ROWS, weighs=WEIGHS)
def test_compositions_equal_slow_twins(rows: list[Any], weighs: tuple[bool, ...]) -> None:
    members, columns = [], []
    for column, flag in zip(zip(*rows, strict=True), weighs, strict=True):
        kept, weights = zip(*column, strict=True)
        members.append(Weighed(kept, weights if flag else None))
        columns.append([(m, w if flag else 1.0) for m, w in column])
    samples = list(zip(*columns, strict=True))

    def product(row: Any) -> float:
        result = 1.0
        for _, weight in row:
            result *= weight
        return result

    a, b, c = members
    expected = []
    for row in samples:
        times = row[0][0] * row[1][0] * row[2][0]
        expected.append((times, product(row) if times else 0.0))
    assert answer(Then(stages=members), len(rows)) == expected
    expected = []
    for row in samples:
        least = min(m for m, _ in row)
        expected.append((least, product(row) if least else 0.0))
    assert answer(And(selectors=members), len(rows)) == expected
    expected = []
    for row in samples:
        most = max(m for m, _ in row)
        expected.append((most, min(w for m, w in row if m == most) if most else 0.0))
    assert answer(Or(selectors=members), len(rows)) == expected
    expected = [(0, 0.0) if y[0] or not x[0] else x for x, y, _ in samples]
    assert answer(Minus(keep=a, remove=b), len(rows)) == expected
    nested = Then(stages=[Or(selectors=[a, b]), Minus(keep=c, remove=Weighed([0] * len(rows)))])
    assert nested.weighs == any(weighs)


def test_composition_weighs_if_a_member_does() -> None:
    weigher, plain = InfoBatch(seed=1), Uniform(seed=1, fraction=0.5)
    assert Then(stages=[plain, weigher]).weighs
    assert And(selectors=[weigher, plain]).weighs
    assert Or(selectors=[plain, weigher]).weighs
    assert Minus(keep=weigher, remove=plain).weighs
    assert not Minus(keep=plain, remove=weigher).weighs
    assert not Then(stages=[plain, plain]).weighs


THREE_OF_FOUR = (np.arange(40) % 4 > 0).astype(np.int64)


def mean_counts(selector: Selector, *, epochs: int = 3000) -> np.ndarray:
    """The mean over epochs of multiplicity times weight, by sample, float64 [40]."""
    total = np.zeros(40)
    for epoch in range(epochs):
        uids = np.random.default_rng(epoch).integers(0, 2**63, (40, 2)).astype(np.uint64)
        chunk = Chunk(rows=np.arange(40), uids=uids, column=np.linspace(0.0, 1.0, 40))
        choice = selector.select(MemorySource(chunk))
        weights = 1.0 if choice.weights is None else choice.weights
        total += choice.multiplicities * weights
    return total / epochs


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda some, prune: Then(stages=[some, prune]), THREE_OF_FOUR),
        (lambda some, prune: Then(stages=[prune, some]), THREE_OF_FOUR),
        (lambda some, prune: And(selectors=[some, prune]), THREE_OF_FOUR),
        (lambda some, prune: Or(selectors=[some, prune]), 1),
        (lambda some, prune: Minus(keep=prune, remove=some), 1 - THREE_OF_FOUR),
        (lambda some, prune: Then(stages=[prune, InfoBatch(seed=1)]), 1),
        (lambda some, prune: And(selectors=[InfoBatch(seed=1), prune]), 1),
    ],
)
def test_infobatch_in_a_composition_stays_without_bias(make: Any, expected: Any) -> None:
    """Every sample that may be kept counts 1 on average."""
    selector = make(Weighed(THREE_OF_FOUR), InfoBatch(seed=0, ratio=0.75))
    np.testing.assert_allclose(mean_counts(selector), np.broadcast_to(expected, 40), atol=0.25)


def test_infobatch_after_a_random_rule_of_the_same_seed_stays_without_bias() -> None:
    half = SoftmaxSampling(fraction=0.5, seed=0, temperature=1e6)  # of all, at random
    stages = [Uniform(seed=0, rule=half), InfoBatch(seed=0, ratio=0.75)]
    np.testing.assert_allclose(mean_counts(Then(stages=stages)), 0.5, atol=0.15)


def test_equal_draws_of_members_that_weigh_are_refused() -> None:
    first, second, third = InfoBatch(seed=7), InfoBatch(seed=7, ratio=0.2), InfoBatch(seed=8)
    message = "InfoBatch and InfoBatch both weigh .* have the same seed=7"
    for selectors in ([first, second], [first, Then(stages=[third, second])]):
        with pytest.raises(InputError, match=message):
            Then(stages=selectors)
        with pytest.raises(InputError, match=message):
            And(selectors=selectors)
    And(selectors=[first, third, Uniform(seed=7, fraction=0.5)])


def test_compositions_that_cannot_make_up_for_a_bias_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weigher, plain = Weighed([1, 1, 0], [1.0, 2.0, 1.0]), Weighed([0, 1, 0])
    run(Or(selectors=[weigher, plain]), source_of(3))
    run(Minus(keep=weigher, remove=plain), source_of(3))
    assert "at random" not in caplog.text
    run(Or(selectors=[weigher, plain, weigher]), source_of(3))
    assert "Or: Weighed and Weighed weigh what they keep, and a sample that" in caplog.text
    run(Minus(keep=plain, remove=weigher), source_of(3))
    assert (
        "Minus: what it removes with, Weighed, weighs what it keeps, and that goes" in caplog.text
    )


def test_contract_of_compositions_that_weigh() -> None:
    random = Uniform(seed=3, fraction=0.8)
    check_selector(lambda: Then(stages=[random, InfoBatch(seed=1)]))
    check_selector(lambda: Or(selectors=[random, InfoBatch(seed=1)]))
    assert InfoBatch(seed=1).requires.column == TRAINING_LOSS


def test_undeclared_weights_are_refused_everywhere() -> None:
    bad, good = Undeclared([1, 1], [1.0, 2.0]), Weighed([1, 1])
    message = r"Undeclared answers with weights and does not declare .* `weighs = True` into the"
    selectors: list[Selector] = [
        bad,
        Then(stages=[good, bad]),
        And(selectors=[good, bad]),
        Or(selectors=[bad, good]),
        Minus(keep=bad, remove=good),
    ]
    for selector in selectors:
        with pytest.raises(InputError, match=message):
            run(selector, source_of(2))
    with pytest.raises(InputError, match=message):
        draw(bad, source_of(2), SubBatch(samples=2))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(3), TypeError, "weights of float32. Got float64"),
        (np.ones(2, np.float32), ValueError, r"one weight for each of 3 samples. Got \(2,\)"),
        (np.float32([1, np.nan, 1]), ValueError, "finite weights of at least 0. Got nan"),
        (np.float32([1, -2, 1]), ValueError, "finite weights of at least 0. Got -2.0"),
        (np.float32([1, np.inf, 1]), ValueError, "finite weights of at least 0. Got inf"),
    ],
)
def test_weights_are_checked(weights: Any, error: type[Exception], message: str) -> None:
    selector = Weighed([1, 2, 0])
    selector.weights = weights
    if len(weights) < 3:
        selector.select = lambda source: Choice(  # type: ignore[method-assign]
            multiplicities=selector.kept, weights=weights
        )
    with pytest.raises(error, match=message):
        run(selector, source_of(3))
    dropped = Weighed([1, 1, 0])
    dropped.weights = np.float32([1, 1, np.nan])  # says nothing: the sample is not kept
    run(dropped, source_of(3))


def test_selectors_of_scores_alone_refuse_members_that_weigh() -> None:
    weigher, plain = WeighedScores(fraction=1), Uniform(seed=0, fraction=1)
    message = r"selectors\.1 must not weigh what it keeps: here its scores alone count"
    for kind in (RankSum, Mix):
        with pytest.raises(InputError, match=message):
            kind(selectors=[plain, weigher], fraction=0.5)
    with pytest.raises(InputError, match=r"QuotaPerCluster: selector must not weigh"):
        QuotaPerCluster(selector=weigher, clusters=plain, fraction=0.5)
