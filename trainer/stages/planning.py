"""What a run will cost, and for how many steps a budget lasts: both from a few measured steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.errors import InputError
from siftclip.ranks import OneRank
from siftclip.trainer.builders.assembly import data_module_from, new_model, training_module
from siftclip.trainer.builders.online_setup import build_online, step_plan, step_planner
from siftclip.trainer.builders.run_parts import RunParts
from siftclip.trainer.online.controller import Online
from siftclip.trainer.online.cost import largest_within
from siftclip.trainer.online.cost_profile import (
    Forecast,
    Profile,
    StepSeconds,
    mean_profile,
)
from siftclip.trainer.runtime.launch import require_launcher
from siftclip.trainer.runtime.lightning_setup import make_trainer
from siftclip.trainer.runtime.step_clock import StepClock
from siftclip.trainer.settings.budget import MAX_STEPS, Budget, Limit, require_steps
from siftclip.trainer.settings.online import EveryStepSettings, OnceSettings
from siftclip.writing import temporary_folder

PLANNED_STEPS = 1 << 16  # of a run whose length is looked for, at a time
WARM_UP_STEPS = 4
STEPS = 16
ROUNDS = 2
EMBEDDED_SAMPLES = 2048  # of the pool, from which the time of a whole version is estimated


def forecast(parts: RunParts, budget: Budget) -> Forecast:
    """Forecast what a run will cost, from measured steps."""
    profile = profile_run(parts)
    online = build_online(parts, budget.total_steps)
    steps = online.plan.steps
    versions = _versions(parts, steps)
    embedded = versions * _embedded_samples(online)
    return Forecast(
        profile=profile,
        plan=online.plan,
        cost=replace(online.cost, embedded=lambda step: embedded).at(steps),
        versions=versions,
        parameters=sum(weight.numel() for weight in parts.clip.model.parameters()),
    )


def steps_within(limit: Limit, parts: RunParts) -> int:
    """Find for how many steps a limit lasts, from 1 to `MAX_STEPS`.

    Seconds are those of training, as measured on a few steps before the run; the run itself may
    take more or less, and reports what it took.

    Args:
        limit: of the run.
        parts: of the run.

    Raises:
        InputError: it ends before the first step does, or lasts for more than `MAX_STEPS`; or it
            is one of FLOPs, which cannot be counted.
    """
    plan_of = step_planner(parts)
    of_plan: Callable[[StepPlan, int], float]  # of its steps, and so many versions
    if limit.unit == "seconds":
        of_plan = profile_run(parts).run_seconds
    else:
        online = build_online(parts, total_steps=1)
        of_version = _embedded_samples(online)

        if limit.unit == "flops" and online.cost.flops is None:
            raise InputError(
                f"budget.flops={limit.amount:g} needs the FLOPs of a sample, which could not be "
                "counted (see the warning above). Use budget.loaded_samples, budget.seconds or "
                "scale.samples_seen."
            )

        def of_plan(plan: StepPlan, versions: int) -> float:
            costs = replace(online.cost, plan=plan, embedded=lambda step: versions * of_version)
            return costs.at(plan.steps)[limit.unit]

    def cost(steps: int) -> float:
        total, versions = 0.0, _versions(parts, steps)
        for first in range(0, steps, PLANNED_STEPS):  # bounds the memory
            plan = plan_of(steps, range(first, min(first + PLANNED_STEPS, steps)))
            total += of_plan(plan, 0 if first else versions)
        return total

    steps = largest_within(limit.amount, cost, most=MAX_STEPS)
    given = f"budget.{limit.unit}={limit.amount:g}"
    if steps == 0:
        raise InputError(
            f"{given} ends before the first step does, which costs {cost(1):.4g}. Raise it to what "
            "as many steps cost as the run shall have; plan=true says what a run costs."
        )
    if steps == MAX_STEPS:
        wanted = limit.amount / cost(MAX_STEPS) * MAX_STEPS
        require_steps(wanted, given, parts.global_batch_size)
    return steps


def profile_run(parts: RunParts) -> Profile:
    """Measure plain steps and selecting ones, in alternation, in a folder that is then deleted.

    Raises:
        InputError: several devices without a launcher, which would start the command again.
    """
    require_launcher("train with plan=true or budget.seconds", parts.trainer, os.environ)
    batch = parts.global_batch_size
    steps = WARM_UP_STEPS + STEPS + 1
    short = Budget(samples_seen=steps * batch, global_batch_size=batch)

    def measured(changed: RunParts, folder: Path) -> StepSeconds:
        run = replace(changed, clip=_new_model(changed), folder=folder)
        online = build_online(run, steps)
        clock = StepClock(skipped_steps=WARM_UP_STEPS, steps=STEPS)
        trainer = make_trainer(
            run.trainer,
            folder=folder,
            callbacks=[clock],
            loggers=[],
            max_steps=steps,
            max_epochs=-1,
            enable_checkpointing=False,
        )
        data = data_module_from(run, short, online)
        trainer.fit(training_module(run, short, online), datamodule=data)
        return StepSeconds.of(clock.times())

    quiet = replace(
        parts,
        common=replace(parts.common, progress=False),
        trainer=replace(parts.trainer, log_every_n_steps=10**9),
    )
    once = replace(quiet, online=OnceSettings())
    root = parts.common.output_root
    with temporary_folder(".plan-", root) as folder:
        plain = mean_profile(lambda: measured(once, folder), ROUNDS)
        selecting, extra, version_seconds = None, 0, 0.0
        if isinstance(parts.online, EveryStepSettings):
            always = replace(quiet, online=_always_selecting(parts.online))
            selecting = mean_profile(lambda: measured(always, folder), ROUNDS)
            plan = step_plan(always, steps)
            extra = int(plan.drawn[-1] - plan.trained)
        elif not isinstance(parts.online, OnceSettings):
            version_seconds = _version_seconds(replace(parts, clip=_new_model(parts)), folder)
    return agreed(
        Profile(
            plain=plain, selecting=selecting, profiled_extra=extra, version_seconds=version_seconds
        )
    )


def _new_model(parts: RunParts) -> ClipModel:
    checkpointing = parts.trainer.grad_checkpointing
    return new_model(parts.model, seed=parts.common.seed, grad_checkpointing=checkpointing)


def agreed(profile: Profile) -> Profile:
    """Give every rank what rank 0 has measured: clocks differ, and the lengths of runs must not."""
    if not (dist.is_available() and dist.is_initialized()):
        return profile
    shared = [profile]
    dist.broadcast_object_list(shared)
    return shared[0]


def _always_selecting(online: EveryStepSettings) -> EveryStepSettings:
    """Return the settings with the largest super-batch of their schedule at every step."""
    ratio = online.schedule.filter_ratio
    if isinstance(ratio, tuple):
        ratio = max(knot[1] for knot in ratio)
    schedule = replace(online.schedule, filter_ratio=ratio, start=0.0, stop=1.0, warmup_steps=0)
    return replace(
        online, schedule=schedule, diagnostics=replace(online.diagnostics, record_chosen=False)
    )


def _versions(parts: RunParts, steps: int) -> int:
    """Count the selections that a run of `steps` steps makes on the way.

    An epoch of a version is taken to be as long as the selector's fraction says; what keeps another
    number of samples, as InfoBatch does, as long as the first epoch.
    """
    online, batch = parts.online, parts.global_batch_size
    if isinstance(online, (OnceSettings, EveryStepSettings)):
        return 0
    if online.every_n_steps is not None:
        first = later = online.every_n_steps
    else:
        kept = online.selector.fraction or 1.0
        samples = len(parts.selected.rows)
        first = -(-samples // batch)
        later = -(-max(1, int(samples * online.pool_fraction * kept)) // batch)
    start, stop = (round(share * steps) for share in (online.start, online.stop))
    at = first * max(1, -(-start // first))
    return max(0, -(-(min(stop, steps) - at) // later))


def _embedded_samples(online: Online) -> int:
    """Return how many samples a version embeds."""
    again = online.reselection
    return again.candidates if again is not None and again.live_keys else 0


def _version_seconds(parts: RunParts, folder: Path) -> float:
    """Time embedding a version's candidates, from a part of them; choosing is not counted."""
    online = build_online(parts, STEPS)
    if online.reselection is None or online.reselection.embed is None:
        return 0.0
    device = parts.source.device
    online.learner.model = parts.clip.model.to(device)
    rows = np.unique(parts.selected.rows)[:EMBEDDED_SAMPLES]
    start = time.perf_counter()
    online.reselection.embed(rows, folder / "embedded", OneRank(), device)
    seconds = (time.perf_counter() - start) * _embedded_samples(online) / len(rows)
    return seconds / parts.world_size
