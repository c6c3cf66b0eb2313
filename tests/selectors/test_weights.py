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

from siftclip.selectors.base import Choice, ScoreSelector, Selector, Source, SubBatch, draw, run
from siftclip.selectors.checks import check_selector
from siftclip.selectors.compose import And, Minus, Mix, Or, RankSum, Then
from siftclip.selectors.errors import InputError
from siftclip.selectors.infobatch import InfoBatch
from siftclip.selectors.quota import QuotaPerCluster
from siftclip.selectors.source import TRAINING_LOSS, Chunk, MemorySource
from siftclip.selectors.uniform import Uniform

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


@pytest.mark.parametrize("order", [1, -1])
def test_infobatch_in_a_composition_stays_without_bias(order: int) -> None:
    """The mean over epochs of multiplicity times weight is 1 for every sample that may be kept."""
    samples, epochs = 40, 3000
    losses = np.linspace(0.0, 1.0, samples)
    first = Weighed(np.arange(samples) % 4 > 0)
    total = np.zeros(samples)
    for epoch in range(epochs):
        uids = np.random.default_rng(epoch).integers(0, 2**63, (samples, 2)).astype(np.uint64)
        source = MemorySource(Chunk(rows=np.arange(samples), uids=uids, column=losses))
        choice = run(Then(stages=[first, InfoBatch(seed=0, ratio=0.75)][::order]), source)
        assert choice.weights is not None
        total += choice.multiplicities * choice.weights
    np.testing.assert_allclose(total / epochs, np.arange(samples) % 4 > 0, atol=0.2)


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
    message = r"selectors\.1: WeighedScores weighs what it keeps, and here its scores alone count"
    for kind in (RankSum, Mix):
        with pytest.raises(InputError, match=message):
            kind(selectors=[plain, weigher], fraction=0.5)
    with pytest.raises(InputError, match=r"selector\.selector: WeighedScores weighs"):
        QuotaPerCluster(selector=weigher, clusters=plain, fraction=0.5)
