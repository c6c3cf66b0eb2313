"""The compare stage: every arm with every seed, trained and evaluated at one budget, then a report.

An arm is a name with overrides. Runs are content-addressed, so that what is finished is reused,
whoever made it, and an interrupted comparison continues where it was.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from tqdm import tqdm

from siftclip.datamodules.locks import LOCK_NAME, HeldError, locked
from siftclip.selectors.errors import InputError
from siftclip.trainer.budget import budget_from, limit_from
from siftclip.trainer.evaluation import tasks_from
from siftclip.trainer.launch import require_launcher
from siftclip.trainer.objective import check_loss
from siftclip.trainer.online.options import check_online
from siftclip.trainer.run_dir import RunDir, is_rank_zero
from siftclip.trainer.stages import output_root, plain
from siftclip.trainer.training import train_stage

log = logging.getLogger(__name__)

ARM_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_FAILED_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOutcome:
    """What a comparison leaves behind."""

    folder: Path
    table: str  # empty on other ranks than 0
    failed: tuple[str, ...] = ()  # runs and tasks that should be there, each in a line

    def require_complete(self) -> None:
        """Raise InputError if runs or tasks failed, once all else is done and printed."""
        if self.failed:
            shown = "; ".join(self.failed[:_FAILED_SHOWN]).rstrip(".")
            raise InputError(
                f"The comparison is not complete, {len(self.failed)} runs or tasks failed: "
                f"{shown}. The report says what; the same command tries them again."
            )


def compare_stage(config: DictConfig, overrides: Sequence[str]) -> CompareOutcome:
    """Run all arms with all seeds and write the report.

    Args:
        config: the configuration of the command.
        overrides: the overrides of the command line, on top of which each arm's come.

    Raises:
        InputError: an arm is not a valid configuration, the arms differ in budget, or there is
            nothing to evaluate on; all of this before the first run.
    """
    require_launcher("compare", config.trainer, os.environ)
    tasks_from(config)
    arms: dict[str, list[str]] = plain(config.compare.arms)
    seeds: list[int] = plain(config.compare.seeds)
    plan = _plan(config, arms, seeds, overrides)
    runs = _train_all(config, plan)
    folder = output_root(config) / "compare" / str(config.compare.name)
    if not is_rank_zero():
        return CompareOutcome(folder=folder, table="")
    # Here, since importing pandas and jinja2 takes a second.
    from siftclip.trainer.compare.collect import ArmRun, collect
    from siftclip.trainer.compare.report import mixed_notes, write_report
    from siftclip.trainer.compare.tables import format_main_table

    arm_runs = [
        ArmRun(arm=arm, seed=seed, run=run) for (arm, seed, _), run in zip(plan, runs, strict=True)
    ]
    comparison = collect(config, arm_runs)
    for note in mixed_notes(comparison):
        log.warning(note)
    with locked(folder / LOCK_NAME, owner=str(folder), wait=True):
        write_report(comparison, folder)
    return CompareOutcome(
        folder=folder,
        table=format_main_table(comparison),
        failed=tuple(missing.text() for missing in comparison.missing if missing.failed),
    )


def _train_all(config: DictConfig, plan: Sequence[tuple[str, int, DictConfig]]) -> list[RunDir]:
    """All runs, in the order of the plan.

    What another command is training at the moment comes last: it may be finished by then, and if
    not, there is nothing left to do but to wait for it.
    """
    runs: dict[int, RunDir] = {}
    later: list[int] = []
    with tqdm(
        total=len(plan), desc="compare", unit="run", disable=not config.progress, leave=False
    ) as bar:

        def train(number: int, *, wait: bool) -> None:
            arm, seed, arm_config = plan[number]
            bar.set_postfix_str(f"{arm}, seed {seed}")
            runs[number] = train_stage(arm_config, wait=wait)
            bar.update()

        for number, (arm, seed, _) in enumerate(plan):
            try:
                train(number, wait=False)
            except HeldError as error:
                later.append(number)
                if is_rank_zero():
                    log.warning("%s, seed %d, comes after the others. %s", arm, seed, error)
        for number in later:
            train(number, wait=True)
    return [runs[number] for number in range(len(plan))]


def _plan(
    config: DictConfig,
    arms: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    overrides: Sequence[str],
) -> list[tuple[str, int, DictConfig]]:
    """The configurations of all runs, seed by seed, so that what is done first is comparable."""
    if not arms or not seeds:
        raise InputError(
            "compare.arms and compare.seeds must not be empty. "
            f"Got arms={list(arms)} and seeds={list(seeds)}."
        )
    if len(set(seeds)) < len(seeds):
        raise InputError(f"compare.seeds must be distinct. Got {list(seeds)}.")
    plan = []
    budget = (limit_from(config) or budget_from(config), config.scale.global_batch_size)
    for seed in seeds:
        for arm, own in arms.items():
            if not ARM_NAME.fullmatch(arm):
                raise InputError(f"compare.arms: {arm!r} must consist of letters, digits, _ . -")
            arm_config = _compose(arm, [*overrides, *own, f"seed={seed}"])
            own_budget = limit_from(arm_config) or budget_from(arm_config)
            if (own_budget, arm_config.scale.global_batch_size) != budget:
                raise InputError(
                    f"compare.arms.{arm} has the budget {own_budget}, the others have {budget[0]}. "
                    "All arms must have the same, in the same unit and with one batch size."
                )
            check_loss(arm_config)
            check_online(arm_config)
            plan.append((arm, seed, arm_config))
    return plan


def _compose(arm: str, overrides: list[str]) -> DictConfig:
    try:
        return hydra.compose(config_name="compare", overrides=overrides)
    except HydraException as error:
        raise InputError(f"compare.arms.{arm}: {error}") from error
