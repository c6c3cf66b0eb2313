"""Contrastive losses of single pairs equal those of loops, at any scale, however they are cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from siftclip.errors import InputError
from siftclip.selectors.core.source import Logits
from siftclip.selectors.methods.jest import pair_losses
from siftclip.selectors.methods.jest.pair_losses import (
    LOSSES,
    SigmoidLosses,
    SoftmaxLosses,
    pair_logits,
    row_log_sums,
    row_softplus_sums,
)


def features(
    samples: int, *, seed: int, dim: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, samples, dim, generator=generator, dtype=torch.float64)
    image, text = normalize(both, dim=2).to(dtype)
    return image, text


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def log_sum(values: list[float]) -> float:
    top = max(values, default=-math.inf)
    return top + math.log(sum(math.exp(x - top) for x in values)) if values else -math.inf


@given(
    st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(-10, 10), st.sampled_from([1, 3])
)
def test_row_sums_equal_loops(m: int, n: int, skip: int | None, tile: int) -> None:
    left, right = features(m, seed=1)[0], features(n, seed=2)[1]
    logits = Logits(scale=9.0, bias=-2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_losses, "CPU_TILE", tile)
        logs = row_log_sums(left, right, logits.scale, skip=skip)
        sums = row_softplus_sums(left, right, logits, skip=skip)
    for i in range(m):
        others = [
            logits.scale * float(left[i] @ right[j])
            for j in range(n)
            if skip is None or j != i + skip
        ]
        assert float(logs[i]) == pytest.approx(log_sum(others), abs=1e-12)
        expected = sum(softplus(x + logits.bias) for x in others)
        assert float(sums[i]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_precisions_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    image, text = features(40, seed=3, dtype=dtype)
    logits = Logits(scale=20.0, bias=-5.0)
    exact_image, exact_text = image.double(), text.double()
    torch.testing.assert_close(
        row_log_sums(image, text, 20.0),
        row_log_sums(exact_image, exact_text, 20.0),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        row_softplus_sums(image, text, logits),
        row_softplus_sums(exact_image, exact_text, logits),
        rtol=1e-5,
        atol=1e-5,
    )
    exact = pair_logits(exact_image, exact_text, logits)
    torch.testing.assert_close(pair_logits(image, text, logits), exact, rtol=0, atol=1e-5)


def test_different_types_of_vectors() -> None:
    image, text = features(5, seed=3)
    mixed = row_log_sums(image, text.half(), 5.0)
    torch.testing.assert_close(mixed, row_log_sums(image, text.half().double(), 5.0))


def test_softmax_losses_are_exact_where_they_are_small() -> None:
    # a clear winner at scale 100: float32 log-sum-exp less the own logit would be 0 or 8e-6
    generator = torch.Generator().manual_seed(5)
    image = normalize(torch.randn(60, 64, generator=generator), dim=1)
    text = normalize(image + 0.25 * torch.randn(60, 64, generator=generator), dim=1)
    losses = SoftmaxLosses(image, text, Logits(scale=100.0))
    losses.add(image, text, skip=0)
    matrix = 100.0 * image.double() @ text.double().T
    exact = -(matrix.log_softmax(1).diagonal() + matrix.log_softmax(0).diagonal()) / 2
    assert exact.min() < 1e-4
    torch.testing.assert_close(losses.losses(), exact, rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_overflows(loss: str) -> None:
    image = features(30, seed=6, dtype=torch.float32)[0]
    for text in (image, -image):  # logits of both signs, of up to 110
        terms = LOSSES[loss](image, text, Logits(scale=100.0, bias=-10.0))
        terms.add(image[:20], text[:20])
        for values in (terms.alone(), terms.losses(), terms.increases()):
            assert values.dtype == torch.float64
            assert values.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_negatives_may_come_in_pieces(loss: str) -> None:
    image, text = features(12, seed=7)
    whole, pieces = (LOSSES[loss](image, text, Logits(scale=8.0, bias=-1.0)) for _ in range(2))
    whole.add(image, text, skip=0)
    for start in (0, 5, 10):
        pieces.add(image[start : start + 5], text[start : start + 5], skip=-start)
    torch.testing.assert_close(pieces.losses(), whole.losses())


def test_sigmoid_losses_sum_to_the_loss_of_the_batch() -> None:
    image, text = features(11, seed=8)
    losses = SigmoidLosses(image, text, Logits(scale=7.0, bias=-3.0))
    losses.add(image, text, skip=0)
    signs = 2 * torch.eye(11, dtype=torch.float64) - 1
    total = -torch.nn.functional.logsigmoid(signs * (7.0 * image @ text.T - 3.0)).sum()
    torch.testing.assert_close(losses.losses().sum(), total)


def test_a_bias_does_not_change_softmax_losses() -> None:
    image, text = features(9, seed=9)
    with_bias, without = (SoftmaxLosses(image, text, Logits(scale=7.0, bias=b)) for b in (-9.0, 0))
    for losses in (with_bias, without):
        losses.add(image, text, skip=0)
    assert torch.equal(with_bias.losses(), without.losses())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pair_without_negatives(loss: str) -> None:
    image, text = features(1, seed=10)
    terms = LOSSES[loss](image, text, Logits(scale=7.0))
    terms.add(image, text, skip=0)
    own = 7.0 * float(image[0] @ text[0])
    expected = softplus(-own) if loss == "sigmoid" else 0.0
    assert float(terms.losses()[0]) == pytest.approx(expected)
    alone = softplus(-own) if loss == "sigmoid" else -own
    assert float(terms.alone()[0]) == pytest.approx(alone)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_that_is_not_finite_spoils_itself_alone(loss: str) -> None:
    image, text = features(6, seed=11)
    spoilt = image.clone()
    spoilt[2] = torch.nan
    good, bad = (LOSSES[loss](x, text, Logits(scale=7.0, bias=-2.0)) for x in (image, spoilt))
    for terms in (good, bad):
        terms.add(image[:2], text[:2])
    others = [0, 1, 3, 4, 5]
    assert torch.equal(bad.losses()[others], good.losses()[others])
    assert bad.losses()[2].isnan()


def test_widths_must_agree() -> None:
    with pytest.raises(InputError, match="image features have 6 components"):
        SigmoidLosses(torch.ones(2, 6), torch.ones(2, 5), Logits(scale=1.0))
