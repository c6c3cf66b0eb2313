"""Trains the runs of a comparison one after the other; one that fails stops no other."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from siftclip.errors import InputError
from siftclip.locks import HeldError
from siftclip.progress import show_progress
from siftclip.reading import in_one_line
from siftclip.trainer.compare.plan import PlannedRun
from siftclip.trainer.compare.run_notes import LOGS, RunNotes
from siftclip.trainer.runtime.fault_log import write_fault_log
from siftclip.trainer.runtime.launch import TrainingStopped, find_launch
from siftclip.trainer.runtime.run_dir import RunDir, is_rank_zero
from siftclip.trainer.stages.train import train_stage
from siftclip.writing import DISK_FULL, WriteError, make_folder

ATTEMPTS = 2  # of what is no fault of the input

log = logging.getLogger(__name__)


def train_all(runs: Sequence[PlannedRun], notes: RunNotes, *, progress: bool) -> None:
    """Train runs in their order, and note what becomes of each.

    What another command is training at the moment comes last: it may be finished by then, and if
    not, there is nothing left to do but to wait for it.

    Args:
        runs: of the plan.
        notes: of the comparison.
        progress: whether to draw a bar.
    """
    later: list[tuple[int, PlannedRun]] = []
    with show_progress(total=len(runs), label="compare", unit="run", bar=progress) as bar:
        for number, run in enumerate(runs, start=1):
            bar.set_postfix_str(f"{run.arm}, seed {run.seed}")
            _say("run %d of %d, %s, seed %d", number, len(runs), run.arm, run.seed)
            try:
                _train(run, notes, number=number, of=len(runs), wait=False)
                bar.update()
            except HeldError as error:
                later.append((number, run))
                if is_rank_zero():
                    log.warning("%s, seed %d, comes after the others. %s", run.arm, run.seed, error)
        for number, run in later:
            _train(run, notes, number=number, of=len(runs), wait=True)
            bar.update()


def _train(run: PlannedRun, notes: RunNotes, *, number: int, of: int, wait: bool) -> None:
    """Train a run, again if it fails and the input is not to blame; note what has become of it."""
    start = time.monotonic()
    several = find_launch(os.environ) is not None  # ranks: the others would wait for one that fails
    for attempt in range(1, ATTEMPTS + 1):
        at: list[RunDir] = []

        def found(directory: RunDir, at: list[RunDir] = at) -> None:
            at.append(directory)
            if is_rank_zero():
                notes.write(run, "running", at=directory)

        try:
            trained = train_stage(run.settings, wait=wait, found=found)
        except HeldError:
            raise
        except TrainingStopped as stop:
            raise TrainingStopped(stop.signal, place=f"{stop.place} of {run.name}") from None
        except Exception as error:
            faulty = isinstance(error, InputError)
            full = isinstance(error, WriteError) and error.number in DISK_FULL  # every run fails
            if several or full:
                raise
            if not faulty and attempt < ATTEMPTS:
                log.warning("%s failed and is tried again: %s", run.name, in_one_line(error))
                continue
            _note_failure(run, notes, at[0] if at else None, error)
            return
        break
    if is_rank_zero():
        notes.write(run, "finished", at=trained)
        losses = [record["train/loss"] for record in trained.records() if record.get("train/loss")]
        loss = f", loss {losses[-1]:.3f}" if losses else ""
        _say("run %d of %d is done after %.0f s%s", number, of, time.monotonic() - start, loss)


def _note_failure(run: PlannedRun, notes: RunNotes, at: RunDir | None, error: Exception) -> None:
    """Note a failure, with a traceback in a file where the input is not to blame."""
    log_file: Path | None = None
    reason = str(error)
    if not isinstance(error, InputError):
        make_folder(notes.folder / LOGS)
        log_file = write_fault_log(error, notes.folder / LOGS)
        reason = f"{type(error).__name__}: {in_one_line(error)}"
    notes.write(run, "failed", at=at, reason=reason, log="" if log_file is None else str(log_file))
    more = "" if log_file is None else f" (log {log_file})"
    log.error("%s, seed %d, failed: %s%s", run.arm, run.seed, reason, more)


def _say(text: str, *values: object) -> None:
    if is_rank_zero():
        log.info(f"compare: {text}", *values)
