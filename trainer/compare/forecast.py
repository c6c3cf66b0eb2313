"""What a comparison has done, and what the rest will cost: `siftclip compare plan=true`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from siftclip.errors import InputError
from siftclip.progress import duration, track
from siftclip.tables import ruled_table
from siftclip.trainer.compare.plan import Plan, PlannedRun
from siftclip.trainer.compare.run_notes import RunNotes
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import plan_stage

MEASURED, EARLIER = "measured steps", "its finished runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmForecast:
    """What the runs of one arm have cost and will."""

    arm: str
    finished: int
    runs: int
    seconds: float  # of training one run
    flops: float | None  # of one run; None: not known
    disk_bytes: int | None  # of a finished run; None: none is finished
    source: str  # where the seconds come from

    @property
    def seconds_left(self) -> float:
        """Seconds for the runs that are not finished."""
        return self.seconds * (self.runs - self.finished)


def forecast_arms(plan: Plan, notes: RunNotes, *, progress: bool) -> list[ArmForecast]:
    """Forecast the runs of each arm.

    From the arm's finished runs, on whatever machine they were made; else from a few measured
    steps, for which the arm selects, as it would for training. Nothing else is kept.

    Raises:
        InputError: an arm cannot be trained.
    """
    by_arm = {arm: [run for run in plan.runs if run.arm == arm] for arm in plan.arms}
    return [
        _forecast(arm, runs, notes)
        for arm, runs in track(
            by_arm.items(), total=len(by_arm), label="plan", unit="arm", bar=progress
        )
    ]


def _forecast(arm: str, runs: Sequence[PlannedRun], notes: RunNotes) -> ArmForecast:
    finished = [at for run in runs if (at := _finished(run, notes)) is not None]
    summaries = [at.shown_summary for at in finished]
    if summaries:
        flops = [summary["flops"] for summary in summaries if "flops" in summary]
        return ArmForecast(
            arm=arm,
            finished=len(finished),
            runs=len(runs),
            seconds=fmean(summary["train_seconds"] for summary in summaries),
            flops=fmean(flops) if len(flops) == len(summaries) else None,
            disk_bytes=max(_size(at.path) for at in finished),
            source=EARLIER,
        )
    try:
        record = plan_stage(runs[0].settings).record()
    except InputError as error:
        raise InputError(f"compare.arms.{arm}: {error}") from error
    kinds = ("training_flops", "scoring_flops")
    return ArmForecast(
        arm=arm,
        finished=0,
        runs=len(runs),
        seconds=record["train_seconds"],
        flops=sum(record[kind] for kind in kinds) if record.keys() >= {*kinds} else None,
        disk_bytes=None,
        source=MEASURED,
    )


def _finished(run: PlannedRun, notes: RunNotes) -> RunDir | None:
    note = notes.read(run)
    at = None if note is None else note.run_dir(notes.folder)
    return at if at is not None and at.is_finished else None


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink())


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
            "unknown" if each.disk_bytes is None else f"{each.disk_bytes / 1e6:.0f}",
            each.source,
        ]
        for each in forecasts
    ]
    left = sum(each.seconds_left for each in forecasts)
    runs = sum(each.runs - each.finished for each in forecasts)
    at_once = min(parallel, runs)
    text = f"{runs} runs are left to train: {duration(left)} one after the other"
    if at_once > 1:
        text += f", about {duration(left / at_once)} with {at_once} at once if devices allow"
    note = "Seconds are those of training, without selecting before it, starting and evaluating."
    return "\n".join([ruled_table([header, *rows]), "", f"{text}.", note])
