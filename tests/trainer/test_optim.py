"""The optimiser recipe against open_clip's own code and numbers."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from siftclip.selectors.errors import InputError
from siftclip.trainer.optim import (
    AdamWConfig,
    clamp_logit_scale,
    make_optimizer,
    parameter_groups,
    warmup_cosine,
)

DEFAULTS: dict[str, Any] = {
    "lr": 5e-4,
    "beta1": 0.9,
    "beta2": 0.98,
    "eps": 1e-6,
    "weight_decay": 0.2,
    "warmup_steps": 10,
    "grad_clip_norm": None,
}


def test_groups_are_those_of_open_clip_3_3_on_vit_b_32() -> None:
    # Counted from open_clip 3.3's rule: 200 tensors without decay, 102 with.
    config = open_clip.get_model_config("ViT-B-32")
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    without, decayed = parameter_groups(model, 0.2)
    assert (len(without["params"]), len(decayed["params"])) == (200, 102)
    assert sum(p.numel() for p in without["params"]) == 204_545
    assert sum(p.numel() for p in decayed["params"]) == 151_072_768
    assert (without["weight_decay"], decayed["weight_decay"]) == (0.0, 0.2)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    without, decayed = parameter_groups(model, 0.1)
    assert len(without["params"]) == 1
    assert decayed["params"] == []


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (0, 7), (5, 5)])
def test_schedule_equals_open_clips(warmup: int, total: int) -> None:
    from open_clip_train.scheduler import cosine_lr

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine_lr(optimizer, 1.0, warmup, total)
    for step in range(total):
        schedule(step)
        ours = warmup_cosine(step, warmup_steps=warmup, total_steps=total)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)


def test_optimizer_takes_the_settings() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), AdamWConfig(**DEFAULTS))
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-6
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-4]


@pytest.mark.parametrize(("start", "end"), [(-1.0, 0.0), (9.0, 4.605170), (2.6593, 2.6593)])
def test_scale_is_clamped(start: float, end: float) -> None:
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(start))
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(end)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "finite"),
        ("beta2", 1.0, r"\[0, 1\)"),
        ("weight_decay", -0.1, "at least 0"),
        ("warmup_steps", 1.5, "integer"),
        ("grad_clip_norm", 0, "above 0"),
    ],
)
def test_bad_settings_name_option_rule_and_value(name: str, value: float, rule: str) -> None:
    with pytest.raises(InputError, match=rf"optim\.{name} must be .*{rule}.*Got {value!r}"):
        AdamWConfig(**{**DEFAULTS, name: value})
