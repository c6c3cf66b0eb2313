"""The schedules against open_clip_train's own, at every step of random runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from siftclip.errors import InputError
from siftclip.trainer.optim.schedules import check_schedule, lr_factor
from siftclip.trainer.settings.optim import OptimSettings


def settings(**changes: Any) -> OptimSettings:
    given: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "weight_decay": 0.2,
        "warmup_steps": 10,
    }
    return OptimSettings(**{**given, **changes})


def open_clip_rates(config: OptimSettings, total_steps: int) -> list[float]:
    """The rate of each step, as open_clip_train sets it on an optimiser."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    arguments = (optimizer, config.lr, config.warmup_steps, total_steps)
    if config.schedule == "cooldown":
        assert config.cooldown_steps is not None
        schedule = const_lr_cooldown(
            *arguments, config.cooldown_steps, config.cooldown_power, config.cooldown_end_lr
        )
    else:
        schedule = {"cosine": cosine_lr, "const": const_lr}[config.schedule](*arguments)
    rates = []
    for step in range(total_steps):
        schedule(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@st.composite
def runs(draw: st.DrawFn) -> tuple[OptimSettings, int]:
    """A schedule that fits into a run, and the run's steps."""
    total = draw(st.integers(1, 120))
    warmup = draw(st.integers(0, total))
    lr = draw(st.floats(1e-5, 1.0))
    schedules = ["cosine", "const"] + ["cooldown"] * (warmup < total)
    changes: dict[str, Any] = {
        "schedule": draw(st.sampled_from(schedules)),
        "warmup_steps": warmup,
        "lr": lr,
    }
    if changes["schedule"] == "cooldown":
        changes["cooldown_steps"] = draw(st.integers(1, total - warmup))
        changes["cooldown_power"] = draw(st.floats(0.25, 4.0))
        changes["cooldown_end_lr"] = draw(st.floats(0.0, 0.99)) * lr
    return settings(**changes), total


@given(runs())
def test_rates_are_open_clips(run: tuple[OptimSettings, int]) -> None:
    config, total = run
    check_schedule(config, total)
    ours = [config.lr * lr_factor(config, step, total) for step in range(total)]
    assert ours == pytest.approx(open_clip_rates(config, total), rel=0, abs=1e-12)


def test_each_group_follows_from_its_own_rate() -> None:
    config = settings(schedule="cooldown", cooldown_steps=4, cooldown_end_lr=1e-4, warmup_steps=2)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 5e-4)]
    optimizer = torch.optim.SGD(groups)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(config, step, 10))
    optimizer.step()
    for _ in range(9):
        scheduler.step()
    # The last step of the cooldown: 1/4 of the way from 1e-4 to 1e-3, and half of it.
    assert scheduler.get_last_lr() == pytest.approx([3.25e-4, 1.625e-4])


def test_a_cooldown_longer_than_the_run_is_refused() -> None:
    changes = {"schedule": "cooldown", "cooldown_steps": 40}
    with pytest.raises(InputError) as error:
        check_schedule(settings(warmup_steps=61, **changes), 100)
    assert "optim.warmup_steps + optim.cooldown_steps must be at most the 100" in str(error.value)
    assert "Got 61 + 40. Lower them, or raise scale.samples_seen" in str(error.value)
    check_schedule(settings(warmup_steps=60, **changes), 100)


def test_a_warm_up_longer_than_the_run_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_schedule(settings(warmup_steps=100), 100)
    assert not caplog.records
    check_schedule(settings(warmup_steps=400), 100)
    assert "its rate ends at 0.25 of optim.lr" in caplog.text
