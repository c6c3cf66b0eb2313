"""Steps on a GPU against the CPU: losses, micro-batches, bf16, and steps that are skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_steps import cut, make_batch, relative_error, step_gradients, tiny_clip

from siftclip.trainer.losses import (
    ContrastiveLoss,
    DistillLoss,
    ReferenceGuidedLoss,
    SigLipLoss,
    SoftmaxLoss,
)
from siftclip.trainer.losses.paired import paired_log_sum_exp
from siftclip.trainer.optim.optimizer import make_optimizer
from siftclip.trainer.optim.update import gradient_norm, step_if_finite
from siftclip.trainer.settings.optim import OptimSettings

SAMPLES = 16
# A loss, whether it needs a teacher, and the bias of the logits.
LOSSES: dict[str, tuple[Callable[[], ContrastiveLoss], bool, float | None]] = {
    "softmax": (SoftmaxLoss, False, None),
    "siglip": (SigLipLoss, False, -10.0),
    "distill": (lambda: DistillLoss(100.0), True, None),
    "drrho": (
        lambda: ReferenceGuidedLoss(selected_rows=np.arange(40), gamma=0.5, epsilon=1e-4, rho=11.0),
        True,
        None,
    ),
}

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_cpu(
    name: str, micro_batches: int, device: torch.device
) -> None:
    loss, teacher, bias = LOSSES[name]
    model, batches = tiny_clip(logit_bias=bias), cut(make_batch(SAMPLES), micro_batches)
    found, gradients = step_gradients(model, loss, batches, device=device, teacher=teacher)
    expected, theirs = step_gradients(model, loss, batches, teacher=teacher)
    assert found == pytest.approx(expected, rel=1e-5)
    assert relative_error(gradients, theirs) < 2e-4


@pytest.mark.parametrize("name", LOSSES)
def test_a_bf16_step_is_close_to_the_exact_one(name: str, device: torch.device) -> None:
    loss, teacher, bias = LOSSES[name]
    model, batch = tiny_clip(logit_bias=bias), [make_batch(SAMPLES)]
    exact, expected = step_gradients(model, loss, batch, device=device, teacher=teacher)
    rough, found = step_gradients(
        model, loss, batch, device=device, precision=torch.bfloat16, teacher=teacher
    )
    assert rough == pytest.approx(exact, rel=0.05, abs=0.05)
    assert 0 < relative_error(found, expected) < 0.2


def test_micro_batches_are_the_whole_batch_under_autocast(device: torch.device) -> None:
    """Also under a plain autocast, whose cache of weights loses gradients up to torch 2.10."""
    model, batch = tiny_clip(), make_batch(SAMPLES)
    options = {"device": device, "precision": torch.bfloat16}
    loss, whole = step_gradients(model, SoftmaxLoss, [batch], **options)  # type: ignore[arg-type]
    cut_loss, pieces = step_gradients(model, SoftmaxLoss, cut(batch, 4), **options)  # type: ignore[arg-type]
    assert len(pieces) == len(list(model.parameters()))
    assert cut_loss == pytest.approx(loss, rel=1e-2)
    assert relative_error(pieces, whole) < 0.05


@pytest.mark.parametrize("tile", [(512, 512), (200, 300)])
def test_tiles_give_the_whole_matrix(tile: tuple[int, int], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(512, 32, generator=generator), dim=1) for _ in range(2))
    answers = []
    for place, shape in ((device, tile), (torch.device("cpu"), (1024, 1024))):
        scaled = (100 * image).to(place).requires_grad_()
        rows, columns = paired_log_sum_exp(scaled, text.to(place), skip_diagonal=0, tile=shape)
        (rows.sum() + columns.sum()).backward()
        assert scaled.grad is not None
        answers.append([values.detach().cpu() for values in (rows, columns, scaled.grad)])
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_that_is_not_finite_is_skipped(device: torch.device) -> None:
    model = tiny_clip().to(device)
    optimizer = make_optimizer(model, OptimSettings(lr=1e-2, warmup_steps=0), fused=True)
    before = copy.deepcopy(model.state_dict())
    for poison, moves in ((torch.nan, False), (1.0, True)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, poison)
        finite = torch.isfinite(gradient_norm(model.parameters()))
        step_if_finite(optimizer, finite, optimizer.step)
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert same is not moves
