"""What a run will cost, and for how many steps a budget lasts: both from a few measured steps."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from siftclip.selectors.errors import InputError
from siftclip.selectors.ranks import OneRank
from siftclip.trainer.assembly import data_module_from, new_model, training_module
from siftclip.trainer.budget import Budget, Limit
from siftclip.trainer.launch import require_launcher
from siftclip.trainer.lightning_setup import make_trainer
from siftclip.trainer.objective import LossData
from siftclip.trainer.online.cost import largest_within
from siftclip.trainer.online.online import Online
from siftclip.trainer.online.planner import (
    Forecast,
    Profile,
    StepClock,
    StepSeconds,
    mean_profile,
)
from siftclip.trainer.online.setup import RunParts, build_online, step_plan
from siftclip.trainer.stages import SelectOutcome, output_root

WARM_UP_STEPS = 4
STEPS = 16
ROUNDS = 2
EMBEDDED_SAMPLES = 2048  # of the pool, from which the time of a whole version is estimated


def forecast(config: DictConfig, parts: RunParts, budget: Budget) -> Forecast:
    """What a run will cost, from measured steps."""
    profile = profile_run(config, parts.selected, parts.loss_data, budget, parts.world_size)
    online = build_online(parts, budget.total_steps)
    steps = online.plan.steps
    versions = _versions(config, parts.selected, steps, budget.global_batch_size)
    embedded = versions * _embedded_samples(online)
    return Forecast(
        profile=profile,
        plan=online.plan,
        cost=replace(online.cost, embedded=lambda step: embedded).at(steps),
        versions=versions,
    )


def steps_within(limit: Limit, parts: RunParts, config: DictConfig, budget: Budget) -> int:
    """For how many steps a limit lasts, at least 1.

    Seconds are those of training, as measured on a few steps before the run; the run itself may
    take more or less, and reports what it took.

    Args:
        limit: of the run.
        parts: of the run.
        config: of the command.
        budget: whose batch size holds.
    """
    if limit.unit == "seconds":
        profile = profile_run(config, parts.selected, parts.loss_data, budget, parts.world_size)

        def seconds(steps: int) -> float:
            versions = _versions(config, parts.selected, steps, budget.global_batch_size)
            return profile.run_seconds(step_plan(parts, steps), versions)

        return largest_within(limit.amount, seconds)
    online = build_online(parts, total_steps=1)
    of_version = _embedded_samples(online)

    def cost(steps: int) -> float:
        plan = step_plan(parts, steps)
        versions = _versions(config, parts.selected, steps, budget.global_batch_size)
        embedded = versions * of_version
        of_plan = replace(online.cost, plan=plan, embedded=lambda step: embedded).at(steps)
        return of_plan[limit.unit]

    return largest_within(limit.amount, cost)


def profile_run(
    config: DictConfig,
    selected: SelectOutcome,
    loss_data: LossData,
    budget: Budget,
    world_size: int,
) -> Profile:
    """Measure plain steps and selecting ones, in alternation, in a folder that is then deleted.

    Raises:
        InputError: several devices without a launcher, which would start the command again.
    """
    require_launcher("train with plan=true or budget.seconds", config.trainer, os.environ)
    steps = WARM_UP_STEPS + STEPS + 1
    short = Budget(
        samples_seen=steps * budget.global_batch_size, global_batch_size=budget.global_batch_size
    )

    def measured(changed: DictConfig, folder: Path) -> StepSeconds:
        clip = new_model(changed)
        online = build_online(
            RunParts(
                config=changed,
                clip=clip,
                selected=selected,
                loss_data=loss_data,
                folder=folder,
                global_batch_size=budget.global_batch_size,
                world_size=world_size,
            ),
            steps,
        )
        clock = StepClock(WARM_UP_STEPS)
        trainer = make_trainer(
            changed,
            folder=folder,
            callbacks=[clock],
            loggers=[],
            max_steps=steps,
            max_epochs=-1,
            enable_checkpointing=False,
        )
        trainer.fit(
            training_module(changed, clip, selected, loss_data, short, online),
            datamodule=data_module_from(changed, clip, selected, loss_data, short, online),
        )
        return clock.result()

    quiet = OmegaConf.create({"progress": False, "trainer": {"log_every_n_steps": 10**9}})
    once = _merged(config, quiet)
    once.online = {"cadence": "once"}
    root = output_root(config)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=root) as name:
        folder = Path(name)
        plain = mean_profile(lambda: measured(once, folder), ROUNDS)
        selecting, extra, version_seconds = None, 0, 0.0
        if config.online.cadence == "every_step":
            always = _always_selecting(_merged(config, quiet))
            selecting = mean_profile(lambda: measured(always, folder), ROUNDS)
            parts = RunParts(
                config=always,
                clip=new_model(always),
                selected=selected,
                loss_data=loss_data,
                folder=folder,
                global_batch_size=budget.global_batch_size,
                world_size=world_size,
            )
            plan = step_plan(parts, steps)
            extra = int(plan.drawn[-1] - plan.trained)
        elif config.online.cadence != "once":
            version_seconds = _version_seconds(
                config, selected, loss_data, budget, folder, world_size
            )
    return agreed(
        Profile(
            plain=plain, selecting=selecting, profiled_extra=extra, version_seconds=version_seconds
        )
    )


def agreed(profile: Profile) -> Profile:
    """What rank 0 has measured, on every rank: clocks differ, and the lengths of runs must not."""
    if not (dist.is_available() and dist.is_initialized()):
        return profile
    shared = [profile]
    dist.broadcast_object_list(shared)
    return shared[0]


def _merged(config: DictConfig, changes: DictConfig) -> DictConfig:
    merged = OmegaConf.merge(config, changes)
    if not isinstance(merged, DictConfig):
        raise TypeError("a configuration is a mapping")
    return merged


def _always_selecting(config: DictConfig) -> DictConfig:
    """The configuration with the largest super-batch of its schedule at every step."""
    ratio = config.online.schedule.filter_ratio
    if OmegaConf.is_list(ratio):
        ratio = max(knot[1] for knot in ratio)
    always = {"filter_ratio": ratio, "start": 0.0, "stop": 1.0, "warmup_steps": 0}
    config.online.schedule = {**config.online.schedule, **always}
    config.online.diagnostics.record_chosen = False
    return config


def _versions(config: DictConfig, selected: SelectOutcome, steps: int, batch: int) -> int:
    """How many selections a run of so many steps makes on the way.

    An epoch of a version is taken to be as long as the selector's fraction says; what keeps another
    number of samples, as InfoBatch does, as long as the first epoch.
    """
    online = config.online
    if online.cadence in ("once", "every_step"):
        return 0
    first = later = online.every_n_steps
    if first is None:
        kept = OmegaConf.select(config, "online.selector.fraction") or 1.0
        samples = len(selected.rows)
        first = -(-samples // batch)
        later = -(-max(1, int(samples * online.pool_fraction * kept)) // batch)
    start, stop = (round(share * steps) for share in (online.start, online.stop))
    at = first * max(1, -(-start // first))
    return max(0, -(-(min(stop, steps) - at) // later))


def _embedded_samples(online: Online) -> int:
    """How many samples a version embeds."""
    again = online.reselection
    return again.candidates if again is not None and again.live_keys else 0


def _version_seconds(
    config: DictConfig,
    selected: SelectOutcome,
    loss_data: LossData,
    budget: Budget,
    folder: Path,
    world_size: int,
) -> float:
    """Of embedding the candidates of a version, from a part of them; choosing is not counted."""
    clip = new_model(config)
    parts = RunParts(
        config=config,
        clip=clip,
        selected=selected,
        loss_data=loss_data,
        folder=folder,
        global_batch_size=budget.global_batch_size,
        world_size=1,
    )
    online = build_online(parts, STEPS)
    if online.reselection is None or online.reselection.embed is None:
        return 0.0
    device = selected.source.device
    online.learner.model = clip.model.to(device)
    rows = np.unique(selected.rows)[:EMBEDDED_SAMPLES]
    start = time.perf_counter()
    online.reselection.embed(rows, folder / "embedded", OneRank(), device)
    seconds = (time.perf_counter() - start) * _embedded_samples(online) / len(rows)
    return seconds / world_size


def check_plan(config: DictConfig) -> None:
    """Whether `plan` is a truth value.

    Raises:
        InputError: it is not.
    """
    if not isinstance(config.plan, bool):
        raise InputError(f"plan must be true or false. Got {config.plan!r}.")
