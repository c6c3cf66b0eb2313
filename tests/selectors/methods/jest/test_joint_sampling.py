"""Joint sampling draws with the probabilities that enumeration gives, on any number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from siftclip.ranks import Ranks
from siftclip.selectors.core.noise import gumbel, noise_state
from siftclip.selectors.core.source import Logits
from siftclip.selectors.core.sub_batch import SubBatch
from siftclip.selectors.methods.jest.joint_sampling import Judge, chunk_sizes, joint_sample
from siftclip.selectors.methods.jest.pair_losses import LOSSES, SigmoidLosses, SoftmaxLosses


def make_judges(
    samples: int,
    *,
    seed: int = 0,
    scale: float = 4.0,
    bias: float = -1.0,
    dtype: torch.dtype = torch.float64,
    dim: int = 5,
) -> list[Judge]:
    """A learner and a reference."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, samples, dim, generator=generator, dtype=torch.float64)
    image, text, other_image, other_text = normalize(values, dim=2).to(dtype)
    other = Logits(scale=scale * 0.8, bias=bias * 0.7)
    return [
        Judge(image=image, text=text, logits=Logits(scale=scale, bias=bias), sign=1.0),
        Judge(image=other_image, text=other_text, logits=other, sign=-1.0),
    ]


def make_uids(samples: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng([9, seed])
    return generator.integers(0, 2**64, (samples, 2), dtype=np.uint64)


def sample(
    judges: list[Judge],
    sub_batch: SubBatch,
    *,
    loss: str = "sigmoid",
    chunks: int = 4,
    **options: Any,
) -> np.ndarray:
    """The multiplicities."""
    count = len(judges[0].image)
    uids = options.pop("uids", make_uids(count))
    usable = options.pop("usable", np.ones(count, dtype=bool))
    return joint_sample(
        judges,
        torch.from_numpy(usable),
        uids,
        sub_batch,
        losses=LOSSES[loss],
        chunks=chunks,
        **options,
    )[0]


# ---- what the logits are, written as matrices ----------------------------------------------------
def sigmoid_matrix(judges: list[Judge]) -> Tensor:
    """S_ij."""
    total = torch.zeros(len(judges[0].image), len(judges[0].image), dtype=torch.float64)
    signs = 2 * torch.eye(len(total), dtype=torch.float64) - 1
    for judge in judges:
        cosines = judge.image.double() @ judge.text.double().T
        total -= judge.sign * logsigmoid(signs * (judge.logits.scale * cosines + judge.logits.bias))
    return total


def softmax_learnability(judges: list[Judge], batch: list[int]) -> Tensor:
    """The learnability of each sample of a batch."""
    total = torch.zeros(len(batch), dtype=torch.float64)
    for judge in judges:
        image, text = judge.image[batch].double(), judge.text[batch].double()
        logits = judge.logits.scale * image @ text.T
        both = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
        total -= judge.sign * both / 2
    return total


def conditional(judges: list[Judge], loss: str, drawn: list[int]) -> np.ndarray:
    """The logit of every sample given those that are drawn, by the definition."""
    samples = len(judges[0].image)
    if loss == "sigmoid":
        scores = sigmoid_matrix(judges)
        return np.array(
            [scores[i, i] + scores[i, drawn].sum() + scores[drawn, i].sum() for i in range(samples)]
        )
    if not drawn:
        pairs = [x.sign * x.logits.scale * (x.image * x.text).sum(1).double() for x in judges]
        return -torch.stack(pairs).sum(0).numpy()
    return np.array([float(softmax_learnability(judges, [i, *drawn])[0]) for i in range(samples)])


def sequence_probability(
    logits: np.ndarray, drawn: tuple[int, ...], order: tuple[int, ...]
) -> float:
    """Of drawing `order`, one after the other, from a softmax without replacement."""
    weights = np.exp(logits - logits.max())
    weights[list(drawn)] = 0
    probability = 1.0
    for i in order:
        probability *= weights[i] / weights.sum()
        weights[i] = 0
    return probability


def set_probabilities(
    judges: list[Judge], loss: str, sizes: list[int], temperature: float
) -> dict[frozenset[int], float]:
    """Of all sub-batches, by enumeration of the order of draws."""
    samples = len(judges[0].image)
    found: dict[frozenset[int], float] = defaultdict(float)
    for order in itertools.permutations(range(samples), sum(sizes)):
        probability, start = 1.0, 0
        for size in sizes:
            drawn = order[:start]
            logits = conditional(judges, loss, list(drawn)) / temperature
            probability *= sequence_probability(logits, drawn, order[start : start + size])
            start += size
        found[frozenset(order)] += probability
    return found


# ---- the logits ----------------------------------------------------------------------------------
@given(st.integers(0, 10_000), st.integers(1, 12), st.data())
def test_sigmoid_logit_is_the_exact_gain(seed: int, samples: int, data: st.DataObject) -> None:
    scale, bias = data.draw(st.sampled_from([(10.0, -10.0), (100.0, -10.0), (3.0, 2.0)]))
    judges = make_judges(samples, seed=seed, scale=scale, bias=bias)
    drawn = data.draw(st.lists(st.integers(0, samples - 1), unique=True, max_size=samples - 1))
    matrix, gain = sigmoid_matrix(judges), torch.zeros(samples, dtype=torch.float64)
    for judge in judges:
        terms = SigmoidLosses(judge.image, judge.text, judge.logits)
        for piece in (drawn[:2], drawn[2:]):
            terms.add(judge.image[piece], judge.text[piece])
        gain += judge.sign * terms.increases()
    for i in set(range(samples)) - set(drawn):
        more = [*drawn, i]
        true = matrix[more][:, more].sum() - matrix[drawn][:, drawn].sum()
        assert abs(float(gain[i] - true)) < 1e-9


@given(st.integers(0, 10_000), st.integers(2, 10), st.sampled_from([5.0, 100.0]))
@settings(max_examples=20)
def test_softmax_logit_equals_loops(seed: int, samples: int, scale: float) -> None:
    judges = make_judges(samples, seed=seed, scale=scale)
    drawn = list(range(samples // 2))
    logits = torch.zeros(samples, dtype=torch.float64)
    for judge in judges:
        terms = SoftmaxLosses(judge.image, judge.text, judge.logits)
        for i in drawn:
            terms.add(judge.image[[i]], judge.text[[i]])
        logits += judge.sign * terms.increases()
    rest = list(range(len(drawn), samples))
    np.testing.assert_allclose(
        logits[rest], conditional(judges, "softmax", drawn)[rest], rtol=0, atol=1e-9
    )


def test_softmax_logit_is_close_to_the_gain() -> None:
    judges = make_judges(160, scale=10.0, dim=16)
    drawn = list(range(60))
    before = softmax_learnability(judges, drawn).sum()
    logits, gain = [], []
    for i in range(60, 160):
        found = softmax_learnability(judges, [*drawn, i])
        logits.append(float(found[-1]))
        gain.append(float(found.sum() - before))
    assert np.corrcoef(logits, gain)[0, 1] > 0.9
    assert np.abs(np.array(logits) - gain).max() > 0.1  # close, not equal


# ---- the draws -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loss", "chunks", "samples", "temperature"),
    [
        ("sigmoid", 1, 1, None),  # the first chunk
        ("softmax", 1, 1, None),
        ("sigmoid", 1, 2, None),  # Gumbel top-k draws one after the other
        ("sigmoid", 2, 2, None),  # the second chunk given the first
        ("softmax", 2, 2, 0.5),
        ("sigmoid", 2, 3, 2.0),  # chunks of two and one
    ],
)
def test_draws_have_the_enumerated_distribution(
    loss: str, chunks: int, samples: int, temperature: float | None
) -> None:
    judges, draws = make_judges(5, seed=4, scale=3.0), 600
    expected = set_probabilities(judges, loss, chunk_sizes(samples, chunks), temperature or 1.0)
    assert sum(expected.values()) == pytest.approx(1.0)
    found = Counter[frozenset[int]]()
    for number in range(draws):
        # what differs from step to step: the uids, and the seed as well
        sub_batch = SubBatch(samples=samples, temperature=temperature, seed=number % 3)
        kept = sample(judges, sub_batch, loss=loss, chunks=chunks, uids=make_uids(5, number))
        found[frozenset(np.flatnonzero(kept).tolist())] += 1
    keys = sorted(expected, key=sorted)
    counts = [found[key] for key in keys]
    assert sum(counts) == draws
    assert chisquare(counts, [draws * expected[key] for key in keys]).pvalue > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_temperature_zero_is_greedy(loss: str) -> None:
    judges = make_judges(30, seed=2)
    drawn: list[int] = []
    for size in (3, 3, 2):
        logits = conditional(judges, loss, drawn)
        logits[drawn] = -np.inf
        drawn += np.argsort(-logits)[:size].tolist()
    kept = sample(judges, SubBatch(samples=8, temperature=0.0), loss=loss, chunks=3)
    assert np.flatnonzero(kept).tolist() == sorted(drawn)


@pytest.mark.parametrize("loss", LOSSES)
def test_draws_equal_loops_over_groups(loss: str) -> None:
    judges, uids = make_judges(24, seed=6), make_uids(24, 1)
    state, drawn = noise_state(uids, 7), list[int]()
    for chunk, size in enumerate((2, 2, 1)):
        keys = conditional(judges, loss, drawn) / 0.7 + gumbel(state, chunk)
        keys[drawn] = -np.inf
        drawn += [
            start + i for start in (0, 8, 16) for i in np.argsort(-keys[start : start + 8])[:size]
        ]
    sub_batch = SubBatch(samples=5, groups=3, temperature=0.7, seed=7)
    kept = sample(judges, sub_batch, loss=loss, chunks=3, uids=uids)
    assert np.flatnonzero(kept).tolist() == sorted(drawn)


def test_noise_is_fresh_for_every_chunk() -> None:
    same = Judge(
        image=torch.ones(64, 3), text=torch.ones(64, 3), logits=Logits(scale=1.0), sign=1.0
    )
    one, two = (sample([same], SubBatch(samples=32), chunks=chunks) for chunks in (1, 2))
    assert 4 < np.abs(one - two).sum() / 2 < 24


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_number_of_ranks_gives_the_same_answer(
    loss: str, dtype: torch.dtype, run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]]
) -> None:
    judges = make_judges(4 * 31, dtype=dtype, scale=20.0, dim=24)
    usable, uids = np.ones(4 * 31, dtype=bool), make_uids(4 * 31)
    usable[[3, 70, 71]] = False
    answers = [
        answer
        for size in (1, 2, 4)
        for answer in run_on_ranks(
            size,
            lambda ranks: joint_sample(
                judges,
                torch.from_numpy(usable),
                uids,
                SubBatch(samples=9, groups=4),
                losses=LOSSES[loss],
                chunks=4,
                ranks=ranks,
            ),
        )
    ]
    assert len(answers) == 7
    for kept, first in answers:
        assert np.array_equal(kept, answers[0][0])
        assert np.array_equal(first, answers[0][1], equal_nan=True)
        assert kept.reshape(4, -1).sum(1).tolist() == [9, 9, 9, 9]


@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 9),
    chunks=st.integers(1, 20),
    loss=st.sampled_from(sorted(LOSSES)),
    data=st.data(),
)
@settings(max_examples=40)
def test_every_group_gets_its_quota(
    groups: int, size: int, chunks: int, loss: str, data: st.DataObject
) -> None:
    samples = data.draw(st.integers(0, size))
    usable = np.array(
        data.draw(st.lists(st.booleans(), min_size=groups * size, max_size=groups * size))
    )
    uids, judges = make_uids(groups * size), make_judges(groups * size)
    for judge in judges:
        judge.image[~torch.from_numpy(usable)] = torch.nan
    sub_batch = SubBatch(samples=samples, groups=groups, seed=3)
    kept = sample(judges, sub_batch, loss=loss, chunks=chunks, usable=usable, uids=uids)
    for group in sub_batch.group_slices(groups * size):
        able, own = usable[group], kept[group]
        assert own.sum() == samples
        assert own[able].sum() == min(samples, able.sum())
        # those that are not usable fill up in the order of uids
        order = [i for i in np.lexsort((uids[group][:, 1], uids[group][:, 0])) if not able[i]]
        assert own[order].tolist() == sorted(own[order].tolist(), reverse=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_unusable_samples_do_not_touch_the_others(loss: str) -> None:
    judges, usable = make_judges(40), np.ones(40, dtype=bool)
    usable[[0, 7, 33]] = False
    clean = sample(judges, SubBatch(samples=15), loss=loss, usable=usable)
    for judge in judges:
        judge.image[7], judge.text[33], judge.image[0] = torch.nan, torch.inf, 0.0
    assert np.array_equal(sample(judges, SubBatch(samples=15), loss=loss, usable=usable), clean)
    assert clean[~usable].sum() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits(loss: str) -> None:
    judges = make_judges(50, scale=100.0, bias=-10.0, dtype=torch.float32)
    judges[0] = Judge(
        image=judges[0].image, text=judges[0].image, logits=judges[0].logits, sign=1.0
    )
    kept, first = joint_sample(
        judges,
        torch.ones(50, dtype=torch.bool),
        make_uids(50),
        SubBatch(samples=20),
        losses=LOSSES[loss],
        chunks=16,
    )
    assert kept.sum() == 20
    assert np.isfinite(first).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("which", [0, 1])
def test_one_model_alone(loss: str, which: int) -> None:
    judges = make_judges(30)[which : which + 1]
    kept, first = joint_sample(
        judges,
        torch.ones(30, dtype=torch.bool),
        make_uids(30),
        SubBatch(samples=5, temperature=0.0),
        losses=LOSSES[loss],
        chunks=1,
    )
    expected = conditional(judges, loss, [])
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    assert np.flatnonzero(kept).tolist() == sorted(np.argsort(-expected)[:5].tolist())


def test_ties_go_to_the_smaller_uids() -> None:
    same = Judge(image=torch.ones(9, 3), text=torch.ones(9, 3), logits=Logits(scale=1.0), sign=1.0)
    uids = make_uids(9)
    kept = sample([same], SubBatch(samples=4, temperature=0.0), chunks=2, uids=uids)
    assert sorted(np.flatnonzero(kept)) == sorted(np.lexsort((uids[:, 1], uids[:, 0]))[:4])


def test_chunk_sizes() -> None:
    assert chunk_sizes(32, 16) == [2] * 16
    assert chunk_sizes(35, 4) == [9, 9, 9, 8]
    assert chunk_sizes(3, 16) == [1, 1, 1]
    assert chunk_sizes(0, 16) == []
