"""Optimizers of timm: open_clip's arguments, states that continue to the bit, faults in words."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor, nn

from siftclip.errors import InputError
from siftclip.trainer.optim.optimizer import make_optimizer
from siftclip.trainer.optim.timm_optimizers import REFUSED
from siftclip.trainer.optim.update import step_if_finite
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.stages.train import train_stage

INPUTS = torch.randn(9, 8, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def made(own: nn.Module, **options: Any) -> torch.optim.Optimizer:
    settings = OptimSettings(timm=options, lr=1e-3, weight_decay=0.1, warmup_steps=0)
    return make_optimizer(own, settings, fused=True)


def step(own: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    optimizer.zero_grad()
    own(inputs).square().sum().backward()
    step_if_finite(optimizer, torch.tensor(True), optimizer.step)


def test_lion_is_timms_with_our_betas() -> None:
    ours, theirs = model(), model()
    own = made(ours, name="lion")
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
    ]
    twin = create_optimizer_v2(groups, "lion", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
    for inputs in INPUTS:
        step(ours, own, inputs)
        twin.zero_grad()
        theirs(inputs).square().sum().backward()
        twin.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_arguments_come_before_betas_and_eps() -> None:
    group = made(model(), name="lion", betas=[0.8, 0.7], caution=True).param_groups[0]
    assert (group["betas"], group["caution"]) == ((0.8, 0.7), True)
    assert made(model(), name="adopt").param_groups[0]["eps"] == OptimSettings().eps


def is_here(name: str) -> bool:
    try:
        get_optimizer_class(name)
    except (ImportError, RuntimeError, AssertionError):  # of apex or bitsandbytes, with a GPU
        return False
    return name not in REFUSED


@pytest.mark.parametrize("name", [*filter(is_here, list_optimizers())])
def test_each_continues_to_the_bit_and_skips(name: str) -> None:
    own = model()
    optimizer = made(own, name=name)
    for inputs in INPUTS[:4]:
        step(own, optimizer, inputs)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(own)
    continued = made(twin, name=name)
    continued.load_state_dict(torch.load(file, weights_only=True))
    for inputs in INPUTS[4:]:
        step(own, optimizer, inputs)
        step(twin, continued, inputs)
    for one, other in zip(own.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    before = [each.detach().clone() for each in own.parameters()]
    own(INPUTS[0]).square().sum().backward()
    step_if_finite(optimizer, torch.tensor(False), optimizer.step)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), before, strict=True))


def test_named_parameters_go_to_the_fallback() -> None:
    own = model()
    optimizer = made(own, name="nadamuon", fallback=["1.*"], fallback_lr_scale=0.5)
    names = {id(parameter): name for name, parameter in own.named_parameters()}
    flagged = {
        names[id(parameter)]: group.get("use_fallback", False)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert flagged["1.weight"] is True
    assert flagged["0.weight"] is False
    assert set(flagged) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 0.9}, r"optim\.timm needs a name"),
        ({"name": "lin"}, r"optim\.timm\.name must be an optimizer of timm\. Got 'lin'.*lion"),
        ({"name": "kron"}, r"kron is refused: it draws random numbers"),
        ({"name": "lion", "beta": 1}, r"optim\.timm\.beta is no argument .*Did you mean .*betas\?"),
        ({"name": "lion", "lr": 1}, r"optim\.timm\.lr is no argument of timm's lion"),
        ({"name": "lion", "betas": [2, 2]}, r"optim\.timm: timm's lion refuses: .*beta"),
        ({"name": "lion", "fallback": ["1.*"]}, r"fallback is of timm's Muon family"),
        ({"name": "muon", "fallback": ["x"]}, r"no parameter of the model matches 'x'"),
    ],
)
def test_faults_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(model(), **options)


def test_a_run_trains_with_it(base: list[str], compose: Callable[..., Any], tmp_path: Path) -> None:
    words = ["optim.timm.name=nadamuon", "optim.timm.fallback=[visual.*]"]
    run = train_stage(compose("train", [*base, *(f"+{word}" for word in words)]))
    losses = run.metrics["train/loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0]
    plain = train_stage(compose("train", base))
    assert plain.path != run.path  # another run
    with pytest.raises(InputError, match=r"Did you mean lion"):
        train_stage(compose("train", [*base, "+optim.timm.name=lin", "pool.root=/none"]))
    with pytest.raises(InputError, match=r"optim\.timm does not go with trainer\.strategy=fsdp"):
        train_stage(compose("train", [*base, "+optim.timm.name=lion", "trainer.strategy=fsdp"]))
