"""No gradient is lost under an autocast that keeps 16-bit copies of weights.

Up to torch 2.10 a copy made under `no_grad` serves the forward behind it too, and its weight gets
no gradient. On a later torch the comparisons of gradients cannot fail; that the cache is off
wherever there are no gradients is checked on every one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_steps import cut, make_batch, relative_error, tiny_clip
from torch import Tensor, nn

from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.online.scoring import scoring_features
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients


@contextmanager
def forwards_watched(model: nn.Module) -> Iterator[list[bool]]:
    """Tell of each layer called without gradients whether weights were kept."""
    kept: list[bool] = []

    def note(*_: object) -> None:
        if not torch.is_grad_enabled():
            kept.append(torch.is_autocast_cache_enabled())

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def gradients(
    model: nn.Module, batches: list[Batch], scoring: ScoringConfig | None = None
) -> dict[str, Tensor]:
    """Those of a step in somebody else's loop, whose autocast has the cache."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        if scoring is not None:
            scoring_features(model, batches[0].images, batches[0].tokens, scoring, 0)
        compute_gradients(model, Objective(loss=SoftmaxLoss()), batches, StepContext())
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("pieces", "scoring"),
    [(2, None), (1, ScoringConfig()), (1, ScoringConfig(precision="bf16"))],
    ids=["micro-batches", "scored before", "scored in bf16 before"],
)
def test_no_gradient_is_lost(pieces: int, scoring: ScoringConfig | None) -> None:
    model, batch = tiny_clip(), make_batch(8)
    expected = gradients(model, [batch])
    assert len(expected) == len(list(model.parameters()))
    with forwards_watched(model) as kept:
        found = gradients(model, cut(batch, pieces), scoring)
    assert kept, "no forward was without gradients"
    assert not any(kept), "a forward without gradients fills the cache of weights"
    assert relative_error(found, expected) < 0.05
