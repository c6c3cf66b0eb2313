"""InfoBatch, against a loop, and its expected gradient against the full one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import SubBatch
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.noise import noise, noise_state
from siftclip.selectors.core.source import TRAINING_LOSS, Chunk
from siftclip.selectors.methods.infobatch import InfoBatch, prune_learned

NAN = float("nan")


def make_uids(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, (samples, 2)).astype(np.uint64)


def source_of(losses: np.ndarray, *, epoch: int = 0, **options: Any) -> MemorySource:
    samples = len(losses)
    chunk = Chunk(rows=np.arange(samples), uids=make_uids(samples, epoch), column=losses)
    return MemorySource(chunk, **options)


def test_contract() -> None:
    check_selector(lambda: InfoBatch(seed=1))


@given(
    losses=st.lists(st.sampled_from([NAN, 0.0, 0.1, 0.5, 0.7, 2.0, float("inf")]), max_size=40),
    ratio=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 100),
)
def test_pruning_equals_a_loop(losses: list[float], ratio: float, seed: int) -> None:
    uids = make_uids(len(losses), seed)
    kept, weights = prune_learned(np.array(losses), uids, ratio=ratio, seed=seed)
    assert kept.dtype == np.int64
    assert weights.dtype == np.float32
    known = [loss for loss in losses if np.isfinite(loss)]
    keys = noise(noise_state(uids, seed), 0x496E666F)
    for i, loss in enumerate(losses):
        learned = bool(np.isfinite(loss)) and loss < sum(known) / len(known) - 1e-12
        dropped = learned and keys[i] < ratio
        assert kept[i] == (0 if dropped else 1)
        assert weights[i] == pytest.approx(1 / (1 - ratio) if learned and not dropped else 1.0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 2.3])
@pytest.mark.parametrize("samples", [1, 3, 10, 49, 1000])
def test_equal_losses_are_all_kept(value: float, samples: int) -> None:
    """Also where their mean is rounded up."""
    losses = np.full(samples, value)
    kept, weights = prune_learned(losses, make_uids(samples), ratio=0.5, seed=0)
    assert kept.all()
    assert (weights == 1).all()


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_expected_gradient_is_unbiased(ratio: float) -> None:
    generator = np.random.default_rng(0)
    losses = generator.exponential(size=60)
    losses[::7] = NAN
    gradients = generator.standard_normal(60) + 0.5
    sums = []
    for epoch in range(4000):
        kept, weights = prune_learned(losses, make_uids(60, epoch), ratio=ratio, seed=0)
        sums.append(float((kept * weights * gradients).sum()))
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - gradients.sum()) < 4 * error
    assert error < 0.3


def test_seeds_and_uids_decide() -> None:
    losses = np.random.default_rng(1).exponential(size=400)
    selector = InfoBatch(seed=3, ratio=0.5)
    first = selector.select(source_of(losses))
    learned = losses < losses.mean()
    dropped = first.multiplicities == 0
    assert (dropped <= learned).all()
    assert 0.4 < dropped.sum() / learned.sum() < 0.6
    np.testing.assert_array_equal(selector.select(source_of(losses)).multiplicities, ~dropped)
    for other in (
        selector.select(source_of(losses, epoch=1)),
        InfoBatch(seed=4).select(source_of(losses)),
    ):
        assert 0.3 < (other.multiplicities[learned] == ~dropped[learned]).mean() < 0.7


def test_choice_has_weights_and_losses() -> None:
    losses = np.array([NAN, 0.0, 4.0, NAN, 1.0])
    choice = InfoBatch(seed=0, ratio=0.75).select(source_of(losses))
    assert choice.weights is not None
    assert choice.scores is not None
    np.testing.assert_array_equal(choice.scores, losses.astype(np.float32))
    assert choice.multiplicities[[0, 2, 3]].tolist() == [1, 1, 1]
    assert choice.weights[[0, 2, 3]].tolist() == [1, 1, 1]
    for i in (1, 4):
        assert choice.weights[i] == (4.0 if choice.multiplicities[i] else 1.0)
    assert InfoBatch(seed=0).requires.column == TRAINING_LOSS


def test_first_epoch_keeps_all() -> None:
    choice = InfoBatch(seed=0).select(source_of(np.full(9, NAN)))
    assert choice.multiplicities.tolist() == [1] * 9
    assert choice.weights is not None
    assert choice.weights.tolist() == [1.0] * 9


def test_ranks_choose_alike(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]],
) -> None:
    losses = np.random.default_rng(2).exponential(size=64)

    def decide(ranks: Ranks) -> list[int]:
        source = source_of(losses, ranks=ranks, part_samples=16)
        return InfoBatch(seed=0).select(source).multiplicities.tolist()

    answers = [answer for size in (1, 2, 4) for answer in run_on_ranks(size, decide)]
    assert all(answer == answers[0] for answer in answers)


def test_wrong_parameters() -> None:
    for ratio, message in (
        (1.0, r"ratio must be below 1"),
        (0.0, r"ratio must be a number in the range \(0, 1\]"),
    ):
        with pytest.raises(InputError, match=message):
            InfoBatch(seed=0, ratio=ratio)
    with pytest.raises(InputError, match=r"seed must be an integer of at least 0"):
        InfoBatch(seed=-1)
    with pytest.raises(InputError, match=r"decides by itself how many samples it keeps"):
        InfoBatch(seed=0).draw(source_of(np.ones(2)), SubBatch(samples=1))
