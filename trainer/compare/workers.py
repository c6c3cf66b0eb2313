"""Trains several runs of a comparison at once, each in a process of its own.

A process is the same command with `compare.only`, so that it composes the same settings; it has its
share of the GPUs and cores, and a log file. What becomes of its run it notes itself, see
`run_notes`; one that ends without a word, such as a killed one, has failed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from siftclip.errors import InputError
from siftclip.files import has_content
from siftclip.progress import Progress, show_progress
from siftclip.reading import open_file
from siftclip.trainer.compare.plan import PlannedRun
from siftclip.trainer.compare.run_notes import RunNotes
from siftclip.trainer.compare.running import ATTEMPTS
from siftclip.trainer.runtime.launch import STOPS, TrainingStopped, device_count, find_launch
from siftclip.trainer.runtime.run_dir import METRICS_NAME, RunDir
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.writing import make_folder, writing_to

POLL_SECONDS = 0.5
_INPUT_FAULT = 2  # the exit status of a fault of the input
_TAIL_BYTES = 1 << 16  # of a log, in which its last record is looked for

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process has of the machine."""

    cores: frozenset[int]
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them; empty: there are none
    processes: int  # ranks that train the run together


@dataclass(slots=True)
class _Worker:
    """A process that trains a run."""

    run: PlannedRun
    share: Share
    process: subprocess.Popen[bytes]
    attempt: int
    start: float
    bar: Progress
    step: int = 0


def shares_of(
    parallel: int, trainer: TrainerSettings, cores: Sequence[int], gpus: Sequence[str]
) -> list[Share]:
    """Divide the machine between processes.

    Args:
        parallel: how many processes there are at most at one time.
        trainer: how many devices a run has; auto: as many GPUs as there are for each.
        cores: that this process may use.
        gpus: that it may use.

    Raises:
        InputError: there are fewer GPUs than the runs take, or fewer cores than processes.
    """
    wanted = device_count(trainer.devices if not isinstance(trainer.devices, tuple)
                          else list(trainer.devices))  # fmt: skip
    on_gpus = bool(gpus) and trainer.accelerator != "cpu"
    processes = wanted or (max(1, len(gpus) // parallel) if on_gpus else 1)
    if on_gpus and processes * parallel > len(gpus):
        raise InputError(
            f"compare.parallel={parallel} runs of {processes} GPUs each need "
            f"{processes * parallel}, and there are {len(gpus)}. Lower one of them."
        )
    if parallel > len(cores):
        raise InputError(
            f"compare.parallel must be at most the number of cores, {len(cores)}. Got {parallel}."
        )
    shares = []
    for number in range(parallel):
        first, last = (len(cores) * at // parallel for at in (number, number + 1))
        own = gpus[number * processes : (number + 1) * processes] if on_gpus else ()
        shares.append(
            Share(cores=frozenset(cores[first:last]), gpus=tuple(own), processes=processes)
        )
    return shares


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """List the GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def train_in_parallel(
    runs: Sequence[PlannedRun],
    notes: RunNotes,
    shares: Sequence[Share],
    words: Sequence[str],
    *,
    progress: bool,
) -> None:
    """Train runs, as many at once as there are shares.

    Args:
        runs: of the plan.
        notes: of the comparison.
        shares: of the machine.
        words: of the command line, behind the name of the program.
        progress: whether to draw bars.

    Raises:
        TrainingStopped: a signal asked to stop; all processes have ended with a checkpoint.
    """
    if find_launch(os.environ) is not None:
        raise InputError(
            "compare.parallel starts its processes itself: do not start it by torchrun or srun. "
            "With Slurm, start one job for each part (compare.part=i/n)."
        )
    waiting = [(run, 1) for run in runs]
    free, workers = [*shares], list[_Worker]()
    with ExitStack() as stack:
        stopping = stack.enter_context(_passing_signals(workers))
        total = stack.enter_context(
            show_progress(total=len(runs), label="compare", unit="run", bar=progress)
        )
        while waiting or workers:
            while waiting and free and not stopping:
                run, attempt = waiting.pop(0)
                share = free.pop()
                workers.append(_start(run, attempt, share, notes, words, progress=progress))
            time.sleep(POLL_SECONDS)
            for worker in [*workers]:
                status = worker.process.poll()
                _show(worker, notes)
                if status is None:
                    continue
                workers.remove(worker)
                free.append(worker.share)
                worker.bar.close()
                if stopping:
                    continue
                if _ended(worker, status, notes):
                    total.update()
                else:
                    waiting.insert(0, (worker.run, worker.attempt + 1))
            if stopping and not workers:
                break
    if stopping:
        raise TrainingStopped(stopping[0], place="with all runs at a checkpoint")


def _start(
    run: PlannedRun,
    attempt: int,
    share: Share,
    notes: RunNotes,
    words: Sequence[str],
    *,
    progress: bool,
) -> _Worker:
    """Start a process for a run, with its share of the machine."""
    path = notes.log_of(run)
    make_folder(path.parent)
    command = [sys.executable, "-m"]
    if share.processes > 1:
        number = f"--nproc-per-node={share.processes}"
        command += ["torch.distributed.run", "--standalone", number, "-m"]
    command += ["siftclip.trainer.cli", *words]
    command += [f"compare.only=[{run.name}]", "compare.parallel=1", "progress=false"]
    environment = dict(os.environ)
    if share.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share.cores)  # which the child inherits
    try:
        with writing_to(path), path.open("ab") as output:
            process = _open(command, environment, output)
    finally:
        os.sched_setaffinity(0, before)
    log.info("compare: %s, seed %d, begins; log %s", run.arm, run.seed, path)
    return _Worker(
        run=run,
        share=share,
        process=process,
        attempt=attempt,
        start=time.monotonic(),
        bar=show_progress(
            total=None, label=f"{run.arm}, seed {run.seed}", unit="step", bar=progress
        ),
    )


def _open(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    # A group of its own: Ctrl-C at a terminal reaches this process alone, which passes it on once
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _ended(worker: _Worker, status: int, notes: RunNotes) -> bool:
    """Note what a process that has ended leaves; False if its run is to be tried again."""
    run, path = worker.run, notes.log_of(worker.run)
    note = notes.read(run)
    seconds = time.monotonic() - worker.start
    if status == 0 and note is not None and note.state == "finished":
        log.info("compare: %s, seed %d, is done after %.0f s", run.arm, run.seed, seconds)
        return True
    if note is None or note.state != "failed":
        at = None if note is None else note.run_dir(notes.folder)
        ended = f"signal {-status}" if status < 0 else f"exit status {status}"
        errors = (line.strip() for line in _tail(path) if "rror" in line)
        reason = next(errors, f"its process ended with {ended}")
        note = notes.write(run, "failed", at=at, reason=reason, log=str(path))
    if status != _INPUT_FAULT and worker.attempt < ATTEMPTS:
        log.warning("%s failed and is tried again: %s", run.name, note.reason)
        return False
    log.error("%s, seed %d, failed: %s (log %s)", run.arm, run.seed, note.reason, path)
    return True


def _tail(path: Path) -> list[str]:
    """Return the last lines of a file, from the last one on; none if there is no file."""
    if not has_content(path):
        return []
    with open_file(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[::-1]


def _show(worker: _Worker, notes: RunNotes) -> None:
    """Advance the bar of a process to the step that its run has logged."""
    note = notes.read(worker.run)
    at = None if note is None else note.run_dir(notes.folder)
    if at is None:
        return
    step = _last_step(at)
    if step > worker.step:
        worker.bar.update(step - worker.step)
        worker.step = step


def _last_step(run: RunDir) -> int:
    """Return the last step in a run's log; 0 if there is none."""
    for line in _tail(run.path / METRICS_NAME):
        try:
            record = json.loads(line)
        except ValueError:  # it is just being written, or begins before what was read
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return int(record["step"])
    return 0


@contextmanager
def _passing_signals(workers: Sequence[_Worker]) -> Iterator[list[signal.Signals]]:
    """Pass signals that ask to stop on to all processes; yields those that have come."""
    asked: list[signal.Signals] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(signal.Signals(number))
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOPS}
    try:
        yield asked
    finally:
        for worker in workers:  # an error of this process: they would go on alone
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
