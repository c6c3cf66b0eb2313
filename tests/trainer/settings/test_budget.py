"""How long a run is: from limits of any size, in bounded memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.errors import InputError
from siftclip.trainer.builders.online_setup import step_plan, step_planner
from siftclip.trainer.online.cost import largest_within
from siftclip.trainer.online.cost_profile import Profile, StepSeconds
from siftclip.trainer.settings.budget import MAX_STEPS, Limit, budget_from
from siftclip.trainer.stages import planning
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
ALL = ["selector=random", "selector.fraction=1"]
EVERY_STEP = [*ALL, "online=every_step", "online.selector.fraction=0.5"]
RAMP = "online.schedule.filter_ratio=[[0,0],[0.5,0.8]]"


@given(costs=st.lists(st.integers(0, 5), min_size=1, max_size=40), limit=st.integers(-1, 120))
def test_largest_number_of_steps_within_a_limit(costs: list[int], limit: int) -> None:
    total = [0, *np.cumsum(costs).tolist()]
    asked = []

    def cost(steps: int) -> float:
        asked.append(steps)
        return total[steps]

    found = largest_within(limit, cost, most=len(costs))
    assert found == max([n for n in range(1, len(total)) if total[n] <= limit], default=0)
    assert all(1 <= steps <= len(costs) for steps in asked)
    assert len(asked) <= 2 + 2 * len(costs).bit_length()


@pytest.mark.parametrize(
    "options", [ALL, [*EVERY_STEP, RAMP], [*EVERY_STEP, RAMP, "online.schedule.warmup_steps=300"]]
)
def test_plan_in_parts_is_the_plan(options: list[str], base: list[str], compose: Compose) -> None:
    online = compose("train", [*base, *options]).online
    parts: Any = SimpleNamespace(online=online, global_batch_size=16, world_size=1)
    whole, plan_of = step_plan(parts, 1000), step_planner(parts)
    pieces = [plan_of(1000, range(a, min(a + 333, 1000))) for a in range(0, 1000, 333)]
    for name in ("drawn", "read"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        assert np.array_equal(joined, getattr(whole, name))


@pytest.mark.parametrize(
    ("unit", "amount", "options"),
    [("flops", "1e30", ALL), ("loaded_samples", "1e300", EVERY_STEP)],
)
def test_limit_of_too_many_steps_is_named_and_takes_no_memory(
    unit: str, amount: str, options: list[str], base: list[str], compose: Compose
) -> None:
    message = (
        rf"budget\.{unit}={float(amount):g} would be \d.*e\+\d+ steps of 16 samples, and a run"
    )
    config = compose("train", [*base, *options, f"budget.{unit}={amount}"])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message.replace("+3", r"\+3")):
            train_stage(config)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 96e6  # of imports; a plan of MAX_STEPS has 500 MB


@pytest.mark.parametrize(("unit", "amount"), [("flops", "1e3"), ("loaded_samples", "3")])
def test_limit_below_one_step_is_named(
    unit: str, amount: str, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=rf"budget\.{unit}=.* ends before the first step does"):
        train_stage(compose("train", [*base, *EVERY_STEP, f"budget.{unit}={amount}"]))


@pytest.mark.parametrize("samples", [10**9, 10**17, 10**400])
def test_samples_seen_of_too_many_steps_are_named(
    samples: int, base: list[str], compose: Compose
) -> None:
    message = rf"scale\.samples_seen={samples} would be .* steps of 16 samples"
    settings = compose("train", [*base, *ALL])
    with pytest.raises(InputError, match=message):
        train_stage(replace(settings, scale=replace(settings.scale, samples_seen=samples)))
    most = replace(settings.scale, samples_seen=16 * MAX_STEPS)
    assert budget_from(most).total_steps == MAX_STEPS


def test_seconds_are_reckoned_in_parts(
    base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(total: float) -> StepSeconds:
        return StepSeconds(total=total, data_wait=0, scoring=0, selection=0)

    profile = Profile(plain=seconds(0.25), selecting=seconds(0.75), profiled_extra=16)
    monkeypatch.setattr(planning, "profile_run", lambda parts: profile)
    monkeypatch.setattr(planning, "PLANNED_STEPS", 7)
    options = [*EVERY_STEP, "online.schedule.stop=0.5"]
    online = compose("train", [*base, *options]).online
    parts: Any = SimpleNamespace(online=online, global_batch_size=16, world_size=1)
    steps = planning.steps_within(Limit("seconds", 50.2), parts)
    cost = {n: profile.run_seconds(step_plan(parts, n)) for n in (steps, steps + 1)}
    assert cost[steps] <= 50.2 < cost[steps + 1]
    with pytest.raises(InputError, match=r"budget\.seconds=0\.1 ends before the first step"):
        planning.steps_within(Limit("seconds", 0.1), parts)
    monkeypatch.setattr(planning, "PLANNED_STEPS", 1 << 16)
    monkeypatch.setattr(planning, "MAX_STEPS", 1000)
    with pytest.raises(InputError, match=r"budget\.seconds=1e\+12 would be 2.*e\+12 steps"):
        planning.steps_within(Limit("seconds", 1e12), parts)
    assert StepPlan.plain(16, 0).starts.tolist() == [0]
