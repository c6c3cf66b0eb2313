"""The average of the weights against loops written by hand, and as a model of its own."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.errors import InputError
from siftclip.trainer.optim.ema import ModelEma, ema_decay_at

TINY_RESNET: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def tiny_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(**TINY_RESNET)


def disturb(model: nn.Module, generator: torch.Generator) -> None:
    """Change all weights and statistics, as a training step does."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
            else:
                tensor.add_(1)
        model.logit_scale.clamp_(0, math.log(100))  # type: ignore[operator]


@pytest.mark.parametrize("decay", [0.3, 0.9])  # below and above the decay of all of these steps
def test_average_is_that_of_a_loop(decay: float) -> None:
    model = tiny_model()
    model.logit_scale.data.fill_(4.6)  # type: ignore[union-attr, operator]  # a step from the clamp
    ema = ModelEma(model, decay)
    twin = {name: value.clone() for name, value in model.named_parameters()}
    exact = {name: value.detach().double() for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 13):
        disturb(model, generator)
        ema.update(model, step)
        share = min(decay, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            twin[name] = torch.lerp(twin[name], value, 1 - share)
            exact[name] = share * exact[name] + (1 - share) * value.detach().double()
        scale = ema.averaged.logit_scale
        assert 0 <= scale <= torch.tensor(math.log(100))  # type: ignore[operator]
    for name, value in ema.averaged.named_parameters():
        assert torch.equal(value, twin[name]), name
        torch.testing.assert_close(value.double(), exact[name], rtol=0, atol=1e-5)
    buffers = dict(model.named_buffers())
    assert any(value.dtype == torch.int64 for value in buffers.values())
    for name, value in ema.averaged.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_short_runs_forget_their_initial_weights() -> None:
    assert ema_decay_at(0.9999, 1) == pytest.approx(2 / 11)
    assert ema_decay_at(0.9999, 10**6) == 0.9999
    left = math.prod(ema_decay_at(0.9999, step) for step in range(1, 101))
    assert left < 1e-10


def test_a_loaded_average_continues_bit_by_bit() -> None:
    model, generator = tiny_model(), torch.Generator().manual_seed(2)
    ema = ModelEma(model, 0.9)
    for step in range(1, 4):
        disturb(model, generator)
        ema.update(model, step)
    resumed = ModelEma(tiny_model(seed=5), 0.9)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    disturb(model, generator)
    ema.update(model, 4)
    resumed.update(model, 4)
    for ours, theirs in zip(ema.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_average_stays_in_evaluation_mode_without_gradients() -> None:
    holder = nn.ModuleDict({"model": tiny_model(), "ema": ModelEma(tiny_model(), 0.9)})
    holder.train()
    assert holder["model"].training
    assert not any(module.training for module in holder["ema"].modules())
    assert not any(parameter.requires_grad for parameter in holder["ema"].parameters())
    assert all(parameter.requires_grad for parameter in holder["model"].parameters())


def test_initial_scale_outside_the_clamp_is_brought_in() -> None:
    model = tiny_model()
    model.logit_scale.data.fill_(9.0)  # type: ignore[union-attr, operator]
    ema = ModelEma(model, 0.9)
    assert ema.averaged.logit_scale.item() == pytest.approx(math.log(100))  # type: ignore[operator]
    assert model.logit_scale.item() == 9.0  # type: ignore[operator]


def test_average_is_written_as_an_open_clip_model(tmp_path: Path) -> None:
    clip = load_clip_model("tiny", architecture=TINY_RESNET)
    ema = ModelEma(clip.model, 0.5)
    disturb(clip.model, torch.Generator().manual_seed(3))
    ema.update(clip.model, 1)
    save_model_folder(replace(clip, model=ema.averaged), tmp_path / "model")
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    weights = ema.averaged.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert not torch.equal(
        weights["visual.conv1.weight"], clip.model.state_dict()["visual.conv1.weight"]
    )


def test_wrong_models_are_refused() -> None:
    ema = ModelEma(tiny_model(), 0.9)
    with pytest.raises(ValueError, match="the model has 2 parameters"):
        ema.update(nn.Linear(2, 2), 1)
    with pytest.raises(InputError, match=r"optim\.ema_decay=0\.9 needs weights in fp32"):
        ModelEma(tiny_model().bfloat16(), 0.9).update(tiny_model().bfloat16(), 1)
