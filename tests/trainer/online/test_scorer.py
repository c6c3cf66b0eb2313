"""The small scorer beside the learner is trained as the learner's optimiser says."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import LossInputs, SoftmaxLoss
from siftclip.trainer.online.scorer import OnlineScorer
from siftclip.trainer.optim.optimizer import make_optimizer
from siftclip.trainer.settings.optim import OptimSettings

OPTIM = OptimSettings(lr=0.01, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.2, warmup_steps=0)
TEXT = {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION: dict[str, Any] = {
    "layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16,
}  # fmt: skip
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}


def make_model(vision: dict[str, Any] = VISION) -> nn.Module:
    torch.manual_seed(3)
    architecture = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": TEXT}
    return load_clip_model("tiny", architecture=architecture).model


def make_batch(step: int, size: int = 16, *, weights: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        images=torch.randn(6, 3, size, size, generator=generator),
        tokens=torch.randint(1, 63, (6, 16), generator=generator),
        rows=torch.arange(6),
        valid=torch.ones(6, dtype=torch.bool),
        weights=torch.rand(6, generator=generator) if weights else None,
    )


def train(scorer: OnlineScorer, batch: Batch, lr_factor: float = 1.0) -> None:
    scorer.step([batch], lr_factor=lr_factor, seeds=[0], rank=0, world_size=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e6])
def test_steps_are_those_of_a_loop_with_torchs_clipping(
    clip_norm: float | None, weighted: bool
) -> None:
    optim = replace(OPTIM, grad_clip_norm=clip_norm)
    scorer = OnlineScorer(make_model(), optim, image_size=16)
    twin = make_model().train()
    twin.output_dict = True  # type: ignore[assignment]
    optimizer = make_optimizer(twin, optim, fused=True)
    for step in range(4):
        batch, factor = make_batch(step, weights=weighted), 1 / (step + 1)
        train(scorer, batch, factor)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * factor
        optimizer.zero_grad()
        outputs = twin(batch.images, batch.tokens)
        inputs = LossInputs(
            image_features=outputs["image_features"],
            text_features=outputs["text_features"],
            logit_scale=outputs["logit_scale"],
            weights=batch.weights,
        )
        SoftmaxLoss()(inputs)["contrastive_loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm or float("inf"))
        assert norm > 0.05  # so that the smaller bound clips
        optimizer.step()
        with torch.no_grad():
            twin.logit_scale.clamp_(0, 4.6052)  # type: ignore[operator]
    theirs = dict(twin.named_parameters())
    for name, parameter in scorer.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_step_that_is_not_finite_changes_nothing(clip_norm: float | None) -> None:
    """Neither weights nor moments nor the statistics of batch norms."""
    scorer = OnlineScorer(
        make_model(RESNET), replace(OPTIM, grad_clip_norm=clip_norm), image_size=32
    )
    train(scorer, make_batch(0, 32))
    before = copy.deepcopy(scorer.model.state_dict())
    broken = make_batch(1, 32)
    broken.images[2, 0, 0, 0] = float("inf")
    train(scorer, broken)
    after = scorer.model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    train(scorer, make_batch(2, 32))
    assert all(torch.isfinite(value).all() for value in scorer.model.state_dict().values())


def test_patterns_of_the_learner_alone_are_left_out() -> None:
    """`optim.no_decay` names parameters of the learner; this model may have none of these."""
    optim = replace(OPTIM, no_decay=["visual.stages.*", "text_projection"])
    scorer = OnlineScorer(make_model(), optim, image_size=16)
    train(scorer, make_batch(0))
    groups = scorer.state_dict()["optimizer"]["param_groups"]
    with_none = OnlineScorer(make_model(), OPTIM, image_size=16)
    train(with_none, make_batch(0))
    others = with_none.state_dict()["optimizer"]["param_groups"]
    assert len(groups[0]["params"]) == len(others[0]["params"]) + 1  # text_projection
