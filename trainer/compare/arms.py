"""The compare stage: every arm with every seed, trained and evaluated at one budget, then a report.

An arm is a name with settings of its own. Runs are content-addressed, so that what is finished is
reused, whoever made it, and an interrupted comparison continues where it was.
"""

from __future__ import annotations

import html
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from siftclip.errors import InputError
from siftclip.locks import LOCK_NAME, HeldError, locked
from siftclip.progress import show_progress
from siftclip.trainer.builders.losses import check_loss_options
from siftclip.trainer.builders.online_options import check_online
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.runtime.launch import require_launcher
from siftclip.trainer.runtime.run_dir import RunDir, is_rank_zero
from siftclip.trainer.settings.budget import Budget, Limit, budget_from, limit_from
from siftclip.trainer.settings.commands import CompareCommand, TrainCommand
from siftclip.trainer.stages.evaluation import tasks_from
from siftclip.trainer.stages.train import train_stage

if TYPE_CHECKING:
    import pandas as pd

    from siftclip.trainer.compare.collect import ArmComparison

log = logging.getLogger(__name__)

ARM_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_FAILED_SHOWN = 3

ComposeArm: TypeAlias = Callable[[str, int], TrainCommand]  # the settings of an arm and a seed


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CompareOutcome:
    """What a comparison leaves behind."""

    folder: Path
    table: str  # empty on other ranks than 0
    comparison: ArmComparison | None = None  # on rank 0
    failed: tuple[str, ...] = ()  # runs and tasks that should be there, each in a line

    @property
    def frame(self) -> pd.DataFrame:
        """One row per run and metric, see `ArmComparison.results`.

        Raises:
            RuntimeError: this is another rank than 0, which has none.
        """
        if self.comparison is None:
            raise RuntimeError("rank 0 alone has the results of a comparison")
        return self.comparison.results

    @property
    def report(self) -> Path:
        """The report as a page that a browser shows."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"CompareOutcome({str(self.folder)!r}{failed})\n{self.table}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table)}</pre>"

    def require_complete(self) -> None:
        """Raise InputError if runs or tasks failed, once all else is done and printed."""
        if self.failed:
            shown = "; ".join(self.failed[:_FAILED_SHOWN]).rstrip(".")
            raise InputError(
                f"The comparison is not complete, {len(self.failed)} runs or tasks failed: "
                f"{shown}. The report says what; the same command tries them again."
            )


def arms_of_overrides(
    settings: CompareCommand,
    overrides: Sequence[str],
    compose: Callable[[Sequence[str]], TrainCommand],
) -> ComposeArm:
    """Return what makes the settings of an arm: the command line's overrides, then the arm's own.

    Args:
        settings: of the comparison, with its arms.
        overrides: those of the command line.
        compose: makes settings of overrides.
    """

    def composed(arm: str, seed: int) -> TrainCommand:
        return compose([*overrides, *settings.compare.arms[arm], f"seed={seed}"])

    return composed


def compare_stage(settings: CompareCommand, compose: ComposeArm) -> CompareOutcome:
    """Run all arms with all seeds and write the report.

    Args:
        settings: of the command.
        compose: makes the settings of an arm with a seed.

    Raises:
        InputError: an arm is not a valid configuration, the arms differ in budget, or there is
            nothing to evaluate on; all of this before the first run.
    """
    require_launcher("compare", settings.trainer, os.environ)
    tasks_from(settings.eval)
    plan = _plan(settings, compose)
    runs = _train_all(plan, progress=settings.common.progress)
    folder = settings.common.output_root / "compare" / settings.compare.name
    if not is_rank_zero():
        return CompareOutcome(folder=folder, table="")
    # Here, since importing pandas and jinja2 takes a second.
    from siftclip.trainer.compare.collect import ArmRun, collect
    from siftclip.trainer.compare.report import mixed_notes, write_report
    from siftclip.trainer.compare.tables import format_main_table

    arm_runs = [
        ArmRun(arm=arm, seed=seed, run=run) for (arm, seed, _), run in zip(plan, runs, strict=True)
    ]
    comparison = collect(settings, arm_runs)
    for note in mixed_notes(comparison):
        log.warning(note)
    with locked(folder / LOCK_NAME, owner=str(folder), wait=True):
        write_report(comparison, folder)
    return CompareOutcome(
        folder=folder,
        table=format_main_table(comparison),
        comparison=comparison,
        failed=tuple(missing.text() for missing in comparison.missing if missing.failed),
    )


def _train_all(plan: Sequence[tuple[str, int, TrainCommand]], *, progress: bool) -> list[RunDir]:
    """Train all runs, in the order of the plan.

    What another command is training at the moment comes last: it may be finished by then, and if
    not, there is nothing left to do but to wait for it.
    """
    runs: dict[int, RunDir] = {}
    later: list[int] = []
    with show_progress(total=len(plan), label="compare", unit="run", bar=progress) as bar:

        def train(number: int, *, wait: bool) -> None:
            arm, seed, arm_settings = plan[number]
            bar.set_postfix_str(f"{arm}, seed {seed}")
            if is_rank_zero():
                log.info("compare: run %d of %d, %s, seed %d", number + 1, len(plan), arm, seed)
            start = time.monotonic()
            runs[number] = train_stage(arm_settings, wait=wait)
            if is_rank_zero():
                losses = [r["train/loss"] for r in runs[number].records() if r.get("train/loss")]
                log.info(
                    "compare: run %d of %d is done after %.0f s%s",
                    number + 1,
                    len(plan),
                    time.monotonic() - start,
                    f", loss {losses[-1]:.3f}" if losses else "",
                )
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


def _plan(settings: CompareCommand, compose: ComposeArm) -> list[tuple[str, int, TrainCommand]]:
    """List the settings of all runs, seed by seed, so that what is done first is comparable."""
    arms, seeds = settings.compare.arms, settings.compare.seeds
    if not arms or not seeds:
        raise InputError(
            "compare.arms and compare.seeds must not be empty. "
            f"Got arms={list(arms)} and seeds={list(seeds)}."
        )
    if len(set(seeds)) < len(seeds):
        raise InputError(f"compare.seeds must be distinct. Got {list(seeds)}.")
    plan = []
    budget = _budget(settings)
    for seed in seeds:
        for arm in arms:
            if not ARM_NAME.fullmatch(arm):
                raise InputError(f"compare.arms: {arm!r} must consist of letters, digits, _ . -")
            arm_settings = _composed(compose, arm, seed)
            if _budget(arm_settings) != budget:
                raise InputError(
                    f"compare.arms.{arm} has the budget {_budget(arm_settings)[0]}, the others "
                    f"have {budget[0]}. All arms must have the same, in the same unit and with one "
                    "batch size."
                )
            check_hardware(arm_settings.trainer)
            check_loss_options(arm_settings.loss)
            check_online(
                arm_settings.online,
                arm_settings.selector,
                arm_settings.loss,
                arm_settings.trainer.strategy,
            )
            plan.append((arm, seed, arm_settings))
    return plan


def _budget(settings: TrainCommand) -> tuple[Limit | Budget, int]:
    """Return how long a run is, and its batch."""
    limit = limit_from(settings.budget) or budget_from(settings.scale)
    return limit, settings.scale.global_batch_size


def _composed(compose: ComposeArm, arm: str, seed: int) -> TrainCommand:
    try:
        return compose(arm, seed)
    except InputError as error:
        raise InputError(f"compare.arms.{arm}: {error}") from error
