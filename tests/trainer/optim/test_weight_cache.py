"""No gradient is lost under an autocast that keeps 16-bit copies of weights.

Up to torch 2.10 a copy made under `no_grad` serves the forward behind it too, and its weight gets
no gradient. On a later torch the comparisons of gradients cannot fail; that the cache is off
wherever there are no gradients is checked on every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.online.scoring import scoring_features
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
SAMPLES = 8


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(5)
    architecture = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    model = load_clip_model("tiny", architecture=architecture).model
    model.output_dict = True  # type: ignore[assignment]
    return model.train()


def make_batch(rows: slice = slice(None)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        images=torch.randn(SAMPLES, 3, 32, 32, generator=generator)[rows],
        tokens=torch.randint(1, 99, (SAMPLES, 16), generator=generator)[rows],
        rows=torch.arange(SAMPLES)[rows],
        valid=torch.ones(SAMPLES, dtype=torch.bool)[rows],
    )


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


def whole(model: nn.Module) -> None:
    compute_gradients(model, Objective(loss=SoftmaxLoss()), [make_batch()], StepContext())


def micro_batches(model: nn.Module) -> None:
    halves = [make_batch(slice(None, 4)), make_batch(slice(4, None))]
    compute_gradients(model, Objective(loss=SoftmaxLoss()), halves, StepContext())


def scored_in(precision: str | None) -> Callable[[nn.Module], None]:
    def step(model: nn.Module) -> None:
        batch = make_batch()
        config = ScoringConfig(precision=precision)  # type: ignore[arg-type]
        scoring_features(model, batch.images, batch.tokens, config, 0)
        whole(model)

    return step


def gradients(model: nn.Module, step: Callable[[nn.Module], None]) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):  # of somebody else's loop: with the cache
        step(model)
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(
    "step",
    [micro_batches, scored_in(None), scored_in("bf16")],
    ids=["micro-batches", "scored before", "scored in bf16 before"],
)
def test_no_gradient_is_lost(model: nn.Module, step: Callable[[nn.Module], None]) -> None:
    expected = gradients(model, whole)
    with forwards_watched(model) as kept:
        found = gradients(model, step)
    assert kept, "no forward was without gradients"
    assert not any(kept), "a forward without gradients fills the cache of weights"
    for name, gradient in found.items():
        assert gradient is not None, f"{name} has no gradient"
        torch.testing.assert_close(gradient, expected[name], rtol=0.1, atol=2e-2)
