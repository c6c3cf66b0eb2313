"""What a comparison has done, and what the rest will cost: `siftclip compare plan=true`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from siftclip.errors import InputError
from siftclip.files import identity_hash
from siftclip.progress import duration, track
from siftclip.tables import ruled_table
from siftclip.trainer.builders.selection import selector_from
from siftclip.trainer.compare.plan import OF_THE_COMMAND, Plan, PlannedRun
from siftclip.trainer.compare.run_notes import RunNotes
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.online import OnceSettings
from siftclip.trainer.stages.train import plan_stage

MEASURED, EARLIER = "measured steps", "its finished runs"
_BYTES_OF_WEIGHT = 4  # in a model; with the two moments of the optimiser in a checkpoint
_OF_CHECKPOINT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmForecast:
    """What the runs of one arm have cost and will."""

    arm: str
    finished: int
    runs: int
    seconds: float  # of training one run
    flops: float | None  # of one run; None: not known
    disk_bytes: int  # of a finished run
    source: str  # where the seconds come from

    @property
    def seconds_left(self) -> float:
        """Seconds for the runs that are not finished."""
        return self.seconds * (self.runs - self.finished)


def forecast_arms(plan: Plan, notes: RunNotes, *, progress: bool) -> list[ArmForecast]:
    """Forecast the runs of each arm.

    From its finished runs, on whatever machine they were made; else from those of an arm whose
    steps are the same; else from a few measured steps, for which the arm selects, as it would for
    training. Nothing else is kept. What is selected before training moves no step, so that arms
    which differ in nothing else are measured once, with the one that needs no features if there is.

    Raises:
        InputError: an arm cannot be trained.
    """
    by_arm = {arm: [run for run in plan.runs if run.arm == arm] for arm in plan.arms}
    known: dict[str, ArmForecast] = {}  # by the digest of the steps
    found: dict[str, ArmForecast] = {}
    finished = {
        arm: [at for run in runs if (at := _finished(run, notes)) is not None]
        for arm, runs in by_arm.items()
    }
    order = sorted(by_arm, key=lambda arm: 0 if finished[arm] else _effort(by_arm[arm][0]))
    for arm in track(order, total=len(order), label="plan", unit="arm", bar=progress):
        runs = by_arm[arm]
        steps = step_digest(runs[0].settings)
        if finished[arm]:
            found[arm] = _from_runs(arm, runs, finished[arm])
        elif steps in known:
            alike = known[steps]
            source = f"runs of {alike.arm}" if alike.finished else f"steps of {alike.arm}"
            found[arm] = replace(alike, arm=arm, finished=0, runs=len(runs), source=source)
        else:
            found[arm] = _measured(arm, runs)
        known.setdefault(steps, found[arm])
    return [found[arm] for arm in by_arm]


def step_digest(settings: TrainCommand) -> str:
    """Return a hash of all that moves the cost of a step: equal where that is equal."""
    dropped = {*OF_THE_COMMAND, "seed"}
    if isinstance(settings.online, OnceSettings):
        dropped |= {"selector", "target"}
    values = settings.composed.values
    return identity_hash({name: each for name, each in values.items() if name not in dropped})


def _effort(run: PlannedRun) -> int:
    """Order runs by what a forecast takes that measures: no features first, then the others."""
    with _of_arm(run.arm):
        selector = selector_from(run.settings.selector).selector
    return 2 if selector.requires.features else 1


@contextmanager
def _of_arm(arm: str) -> Iterator[None]:
    """Name the arm in errors of the input."""
    try:
        yield
    except InputError as error:
        raise InputError(f"compare.arms.{arm}: {error}") from error


def _from_runs(arm: str, runs: Sequence[PlannedRun], finished: Sequence[RunDir]) -> ArmForecast:
    summaries = [at.shown_summary for at in finished]
    known = [summary for summary in summaries if summary]
    flops = [summary["flops"] for summary in known if "flops" in summary]
    return ArmForecast(
        arm=arm,
        finished=len(finished),
        runs=len(runs),
        seconds=fmean(summary["train_seconds"] for summary in known),
        flops=fmean(flops) if len(flops) == len(known) else None,
        disk_bytes=max(_size(at.path) for at in finished),
        source=EARLIER,
    )


def _measured(arm: str, runs: Sequence[PlannedRun]) -> ArmForecast:
    settings = runs[0].settings
    with _of_arm(arm):
        record = plan_stage(settings).record()
    kinds = ("training_flops", "scoring_flops")
    trainer, steps = settings.trainer, record["steps"]
    checkpoints = min(trainer.keep_checkpoints, -(-steps // trainer.checkpoint_every_n_steps))
    if trainer.keep_every_n_steps is not None:
        checkpoints += steps // trainer.keep_every_n_steps
    return ArmForecast(
        arm=arm,
        finished=0,
        runs=len(runs),
        seconds=record["train_seconds"],
        flops=sum(record[kind] for kind in kinds) if record.keys() >= {*kinds} else None,
        disk_bytes=record["parameters"] * _BYTES_OF_WEIGHT * (1 + _OF_CHECKPOINT * checkpoints),
        source=MEASURED,
    )


def _finished(run: PlannedRun, notes: RunNotes) -> RunDir | None:
    note = notes.read(run)
    at = None if note is None else note.run_dir(notes.folder)
    return at if at is not None and at.is_finished else None


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink())


def seconds_left(forecasts: Sequence[ArmForecast]) -> float:
    """Return the seconds of training for all runs that are not finished, one after the other."""
    return sum(each.seconds_left for each in forecasts)


def plan_table(forecasts: Sequence[ArmForecast], *, parallel: int) -> str:
    """Format what is there and what is left to do, one row per arm, and their sum.

    Args:
        forecasts: of all arms.
        parallel: runs that are trained at once.
    """
    header = ["arm", "finished", "to train", "per run", "left", "TFLOP per run", "MB per run", "by"]
    rows = [
        [
            each.arm,
            f"{each.finished} of {each.runs}",
            str(each.runs - each.finished),
            duration(each.seconds),
            duration(each.seconds_left),
            "unknown" if each.flops is None else f"{each.flops / 1e12:.3g}",
            f"{each.disk_bytes / 1e6:.0f}",
            each.source,
        ]
        for each in forecasts
    ]
    left = seconds_left(forecasts)
    runs = sum(each.runs - each.finished for each in forecasts)
    at_once = max(1, min(parallel, runs))
    text = f"{runs} runs are left to train: {duration(left)} one after the other"
    if at_once > 1:
        text += f", about {duration(left / at_once)} with {at_once} at once if devices allow"
    note = "Seconds are those of training, without selecting before it, starting and evaluating."
    return "\n".join([ruled_table([header, *rows]), "", f"{text}.", note])
