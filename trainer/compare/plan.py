"""What a comparison trains: every arm with every seed, checked before the first of them begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from siftclip.errors import InputError
from siftclip.files import identity_hash
from siftclip.trainer.builders.losses import check_loss_options
from siftclip.trainer.builders.online_options import check_online
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.settings.budget import Budget, Limit, budget_from, limit_from
from siftclip.trainer.settings.commands import CompareCommand, TrainCommand

ARM_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# Options that say how a command works, and not what a run is
OF_THE_COMMAND = ("compare", "logger", "output_dir", "plan", "progress", "reuse")
AGAIN_SUFFIX = "_again"  # of the second group of the baseline's seeds

ComposeArm: TypeAlias = Callable[[str, int], TrainCommand]  # the settings of an arm and a seed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """An arm with a seed."""

    arm: str
    seed: int
    settings: TrainCommand

    @property
    def name(self) -> str:
        """What `compare.only` and the files of the comparison call it."""
        return f"{self.arm}/{self.seed}"

    @property
    def digest(self) -> str:
        """A hash of the options: another comparison under the same name has other ones."""
        values = self.settings.composed.values
        return identity_hash({k: v for k, v in values.items() if k not in OF_THE_COMMAND})[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All runs of a comparison, seed by seed, so that what is done first is comparable."""

    runs: tuple[PlannedRun, ...]
    baseline: str  # the arm that the others are compared with
    again: str | None  # the arm that is the baseline with other seeds

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms, in their order."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    @property
    def seeds(self) -> dict[str, tuple[int, ...]]:
        """The seeds by arm."""
        return {arm: tuple(run.seed for run in self.runs if run.arm == arm) for arm in self.arms}


def plan_comparison(settings: CompareCommand, compose: ComposeArm) -> Plan:
    """List the settings of all runs.

    Args:
        settings: of the command.
        compose: makes the settings of an arm with a seed.

    Raises:
        InputError: an arm is not a valid configuration, or the arms differ in budget.
    """
    compare = settings.compare
    arms, seeds = tuple(compare.arms), tuple(compare.seeds)
    if not arms or not seeds:
        raise InputError(
            "compare.arms and compare.seeds must not be empty. "
            f"Got arms={list(arms)} and seeds={list(seeds)}."
        )
    if len(set(seeds)) < len(seeds):
        raise InputError(f"compare.seeds must be distinct. Got {list(seeds)}.")
    for arm in arms:
        if not ARM_NAME.fullmatch(arm):
            raise InputError(f"compare.arms: {arm!r} must consist of letters, digits, _ . -")
    baseline = arms[0] if compare.baseline is None else compare.baseline
    if baseline not in arms:
        raise InputError(f"compare.baseline must be one of {list(arms)}. Got {baseline!r}.")
    places = [(arm, arm, seed) for seed in seeds for arm in arms]
    again = f"{baseline}{AGAIN_SUFFIX}" if compare.aa else None
    if again in arms:
        raise InputError(f"compare.arms: with compare.aa, {again!r} is the baseline's other group.")
    if again is not None:
        others = range(max(seeds) + 1, max(seeds) + 1 + len(seeds))
        places += [(again, baseline, seed) for seed in others]
    budget = _budget(settings)
    runs = tuple(
        PlannedRun(
            arm=arm,
            seed=seed,
            settings=_logged_as(_arm_settings(compose, of, seed, budget), compare.name, arm, seed),
        )
        for arm, of, seed in places
    )
    return Plan(runs=runs, baseline=baseline, again=again)


def chosen_runs(plan: Plan, *, only: Sequence[str], part: str | None) -> tuple[PlannedRun, ...]:
    """Return the runs that this command is to train.

    Args:
        plan: of the comparison.
        only: `ARM` or `ARM/SEED`; empty: all.
        part: `i/n`: the runs i, i + n, i + 2 n ... of the plan, from 1; None: all.

    Raises:
        InputError: there is no such run, or the part is none.
    """
    names = {run.name for run in plan.runs} | set(plan.arms)
    unknown = [name for name in only if name not in names]
    if unknown:
        raise InputError(
            f"compare.only must name arms, or runs as ARM/SEED. Got {unknown[0]!r}; there are "
            f"{', '.join(run.name for run in plan.runs)}."
        )
    runs = [run for run in plan.runs if not only or run.name in only or run.arm in only]
    if part is None:
        return tuple(runs)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise InputError(f"compare.part must be i/n with i from 1 to n, such as 1/4. Got {part!r}.")
    return tuple(runs[number - 1 :: count])


def _arm_settings(
    compose: ComposeArm, arm: str, seed: int, budget: tuple[Limit | Budget, int]
) -> TrainCommand:
    """Compose an arm and check what can be checked without a file."""
    try:
        settings = compose(arm, seed)
    except InputError as error:
        raise InputError(f"compare.arms.{arm}: {error}") from error
    own = _budget(settings)
    if own != budget:
        raise InputError(
            f"compare.arms.{arm} has the budget {own[0]}, the others have {budget[0]}. All arms "
            "must have the same, in the same unit and with one batch size."
        )
    check_hardware(settings.trainer)
    check_loss_options(settings.loss)
    check_online(settings.online, settings.selector, settings.loss, settings.trainer.strategy)
    return settings


def _logged_as(settings: TrainCommand, comparison: str, arm: str, seed: int) -> TrainCommand:
    """Give a run the group and the name that loggers know it by."""
    return replace(settings, logger=settings.logger.of_arm(comparison, arm=arm, seed=seed))


def _budget(settings: TrainCommand) -> tuple[Limit | Budget, int]:
    """Return how long a run is, and its batch."""
    limit = limit_from(settings.budget) or budget_from(settings.scale)
    return limit, settings.scale.global_batch_size
