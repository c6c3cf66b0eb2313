"""Signals: training ends after a step with a checkpoint, on all ranks the same, and continues.

Processes are forked from this one, which has imported everything; what they run is real.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from siftclip.trainer.cli.application import application
from siftclip.trainer.compare import arms, running
from siftclip.trainer.loop import checkpointing
from siftclip.trainer.loop.checkpointing import StepCheckpoint, StopOnSignal
from siftclip.trainer.runtime.launch import TrainingStopped
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import DemoCommand, TrainCommand

Tiny = Callable[..., Any]
LONG = 3000
STOPPED = re.compile(r"siftclip train: stopped by (\w+) at step (\d+) of (\d+); the same command")


class Forked:
    """A process in a session of its own, as a terminal or torchrun starts one."""

    def __init__(self, target: Callable[[], None], stderr: Path) -> None:
        def run() -> None:
            os.setsid()
            with stderr.open("wb") as file:
                os.dup2(file.fileno(), 2)
            sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115 - for good
            target()

        self.stderr = stderr
        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()

    def wait_for(self, what: str, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.is_alive(), f"ended before {what}: {self.stderr.read_text()}"
            assert time.monotonic() < deadline, f"{what} did not come"
            time.sleep(0.01)

    def signal_group(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)

    def status(self) -> int | None:
        self.process.join(60)
        return self.process.exitcode


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], None], Path], Forked]]:
    """`fork(target, stderr)`: a process that does not outlive the test."""
    GlobalHydra.instance().clear()
    started: list[Forked] = []

    def start(target: Callable[[], None], stderr: Path) -> Forked:
        started.append(Forked(target, stderr))
        return started[-1]

    yield start
    for forked in started:
        if forked.process.is_alive():
            forked.signal_group(signal.SIGKILL)


def write_step(path: Path, step: int, *, seconds: float = 0.002) -> None:
    """Tell the test how far training is, and take the time of a step."""
    path.write_text(str(step))
    time.sleep(seconds)


def step_in(path: Path) -> int:
    text = path.read_text() if path.is_file() else ""
    return int(text or 0)


def command(training: Any, folder: Path) -> Callable[[], None]:
    """`siftclip train`, but with tiny weights."""

    @application("train", DemoCommand)
    def main(settings: DemoCommand) -> None:
        stop = StopOnSignal(agree_every_n_steps=5)
        trainer = training.fit(StepCheckpoint(folder, every_n_steps=1000), stop)
        stop.raise_if_stopped(trainer.global_step, training.total_steps)

    def run() -> None:
        sys.argv = ["siftclip", "train"]
        main()

    return run


# ---- one process -------------------------------------------------------------------------------
@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_group_ends_with_a_checkpoint(
    number: signal.Signals, fork: Any, tiny_training: Tiny, tmp_path: Path
) -> None:
    """The group, loader processes and all, as a terminal, torchrun and schedulers signal it."""
    progress, run = tmp_path / "progress", RunDir(path=tmp_path)
    training = tiny_training(
        total_steps=LONG,
        num_workers=2,
        # long enough for a loader process to die, and to take the step along
        after_batch=lambda step: write_step(progress, step, seconds=0.1),
    )
    forked = fork(command(training, run.checkpoints), tmp_path / "stderr")
    forked.wait_for("step 5", lambda: step_in(progress) >= 5)
    forked.signal_group(number)
    assert forked.status() == 128 + number
    errors = forked.stderr.read_text()
    assert "Traceback" not in errors
    found = STOPPED.search(errors)
    assert found is not None, errors
    assert found[1] == number.name
    step = int(found[2])
    assert 5 <= step < 1000
    assert int(found[3]) == LONG
    assert run.latest_checkpoint() == run.checkpoints / f"step-{step}.ckpt"
    # what follows is what an unbroken run does
    short = tiny_training(total_steps=step + 5)
    short.fit(resume=run.latest_checkpoint())
    whole = tiny_training(total_steps=step + 5)
    whole.fit()
    assert torch.equal(short.weight, whole.weight)


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    fork: Any, tiny_training: Tiny, tmp_path: Path
) -> None:
    progress = tmp_path / "progress"

    def hang_in_step_12(step: int) -> None:
        write_step(progress, step)
        if step == 12:
            time.sleep(300)

    training = tiny_training(total_steps=LONG, num_workers=2, after_batch=hang_in_step_12)
    forked = fork(command(training, tmp_path / "checkpoints"), tmp_path / "stderr")
    forked.wait_for("step 12", lambda: step_in(progress) == 12)
    forked.signal_group(signal.SIGINT)
    forked.wait_for("the answer", lambda: "A second one ends it" in forked.stderr.read_text())
    forked.signal_group(signal.SIGINT)
    assert forked.status() == 130
    errors = forked.stderr.read_text()
    assert "siftclip train: interrupted; the same command continues." in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_forked_children_are_not_told_to_stop(tiny_training: Tiny) -> None:
    """They inherit the handler; in a loader process a second Ctrl-C would print a traceback."""
    statuses: list[int] = []

    def fork_in_step_2(step: int) -> None:
        if step != 2:
            return
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                os._exit(1)
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    stop = StopOnSignal()
    assert tiny_training(total_steps=4, after_batch=fork_in_step_2).fit(stop).global_step == 4
    assert statuses == [0]
    assert stop.stopped_by is None


HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@pytest.fixture
def handlers() -> Iterator[dict[signal.Signals, Any]]:
    """Handlers of the caller's, which must be there again after training."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    mine = {number: lambda number, frame: None for number in HANDLED}
    for number, handler in mine.items():
        signal.signal(number, handler)
    yield mine
    for number, handler in before.items():
        signal.signal(number, handler)


def raise_at(step: int, number: signal.Signals, times: int = 1) -> Callable[[int], None]:
    def after_batch(reached: int) -> None:
        if reached == step:
            for _ in range(times):
                signal.raise_signal(number)

    return after_batch


@pytest.mark.parametrize("batches_a_step", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_training_ends_after_the_step_of_the_signal(
    number: signal.Signals,
    batches_a_step: int,
    tiny_training: Tiny,
    handlers: dict[signal.Signals, Any],
    tmp_path: Path,
) -> None:
    stop = StopOnSignal()
    training = tiny_training(
        total_steps=20, batches_a_step=batches_a_step, after_batch=raise_at(6, number)
    )
    trainer = training.fit(stop, StepCheckpoint(tmp_path, every_n_steps=4))
    assert trainer.global_step == 6
    assert stop.stopped_by is number
    assert [path.name for path in tmp_path.iterdir()] == ["step-6.ckpt"]
    assert {n: signal.getsignal(n) for n in HANDLED} == handlers
    with pytest.raises(TrainingStopped, match=rf"stopped by {number.name} at step 6 of 20"):
        stop.raise_if_stopped(6, 20)


def test_a_signal_between_the_batches_of_a_step(tiny_training: Tiny, tmp_path: Path) -> None:
    batches: list[int] = []

    def in_the_second_batch_of_step_5(step: int) -> None:
        batches.append(step)
        if len(batches) == 14:
            signal.raise_signal(signal.SIGTERM)

    stop = StopOnSignal()
    training = tiny_training(
        total_steps=20, batches_a_step=3, after_batch=in_the_second_batch_of_step_5
    )
    trainer = training.fit(stop, StepCheckpoint(tmp_path, every_n_steps=10))
    assert stop.stopped_by is signal.SIGTERM
    assert trainer.global_step == 5
    assert len(batches) == 15
    assert [path.name for path in tmp_path.iterdir()] == ["step-5.ckpt"]


def test_a_signal_in_the_last_step_still_counts(tiny_training: Tiny, tmp_path: Path) -> None:
    stop = StopOnSignal()
    training = tiny_training(total_steps=6, after_batch=raise_at(6, signal.SIGTERM))
    training.fit(stop, StepCheckpoint(tmp_path, every_n_steps=4))
    assert stop.stopped_by is signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["step-6.ckpt"]


def test_handlers_are_put_back_after_every_end(
    tiny_training: Tiny, handlers: dict[signal.Signals, Any]
) -> None:
    def fail(step: int) -> None:
        raise RuntimeError("stop here")

    tiny_training(total_steps=3).fit(StopOnSignal())
    assert {number: signal.getsignal(number) for number in HANDLED} == handlers
    with pytest.raises(RuntimeError, match="stop here"):
        tiny_training(total_steps=3, after_batch=fail).fit(StopOnSignal())
    assert {number: signal.getsignal(number) for number in HANDLED} == handlers
    twice = tiny_training(total_steps=3, after_batch=raise_at(2, signal.SIGINT, times=2))
    with pytest.raises(SystemExit) as caught:
        twice.fit(StopOnSignal())
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert {number: signal.getsignal(number) for number in HANDLED} == handlers


def test_other_threads_train_without_handlers(
    tiny_training: Tiny, handlers: dict[signal.Signals, Any]
) -> None:
    steps: list[int] = []

    def fit() -> None:
        steps.append(tiny_training(total_steps=3).fit(StopOnSignal()).global_step)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert steps == [3]
    assert {number: signal.getsignal(number) for number in HANDLED} == handlers


# ---- the whole command -------------------------------------------------------------------------
def test_submitits_handler_queues_the_job_again(
    tiny_training: Tiny,
    handlers: dict[signal.Signals, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its own handler would leave the process in the middle of a step, on rank 0 alone."""
    requeued: list[list[str]] = []

    def requeue(number: int, frame: object) -> None:
        requeued.append([path.name for path in tmp_path.iterdir()])
        sys.exit(144)

    signal.signal(signal.SIGUSR2, requeue)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    GlobalHydra.instance().clear()
    folder = tmp_path / "checkpoints"
    training = tiny_training(total_steps=9, after_batch=raise_at(5, signal.SIGUSR2))
    with pytest.raises(SystemExit) as caught:
        command(training, folder)()
    assert caught.value.code == 144
    assert requeued == [["checkpoints"]]
    assert [path.name for path in folder.iterdir()] == ["step-5.ckpt"]
    assert "stopped by SIGUSR2 at step 5 of 9" in capsys.readouterr().err


def test_a_stop_ends_the_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started: list[int] = []

    @application("train", DemoCommand)
    def main(settings: DemoCommand) -> None:
        started.append(settings.common.seed)
        raise TrainingStopped(signal.SIGTERM, place="at step 3 of 9")

    GlobalHydra.instance().clear()
    sweep = ["--multirun", "seed=0,1,2", f"output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["siftclip", "train", *sweep])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 143
    assert started == [0]
    message = "siftclip train: stopped by SIGTERM at step 3 of 9; the same command continues.\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_stop_ends_the_comparison(
    base: list[str], compose: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def stopped(settings: TrainCommand, **_: Any) -> RunDir:
        started.append(settings.common.seed)
        raise TrainingStopped(signal.SIGINT, place="at step 3 of 9")

    monkeypatch.setattr(running, "train_stage", stopped)
    overrides = [*base, "eval.root=tasks", "experiment=random_clip_score"]
    monkeypatch.setattr(arms, "tasks_from", lambda config: [])
    settings = compose("compare", overrides)
    composed = arms.arms_of_overrides(settings, overrides, lambda own: compose("compare", own))
    with pytest.raises(TrainingStopped):
        arms.compare_stage(settings, composed)
    assert started == [0]


# ---- several ranks -----------------------------------------------------------------------------
class StepsOfRank(Callback):
    """Writes down the rank's process and step; at the end the step, the signal and broadcasts."""

    def __init__(self, folder: Path, stop: StopOnSignal) -> None:
        self.folder, self.stop = folder, stop
        self.broadcasts = 0
        broadcast = torch.distributed.broadcast

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.broadcasts += 1
            return broadcast(*args, **kwargs)

        torch.distributed.broadcast = counted

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        write_step(self.folder / f"progress-{trainer.global_rank}", trainer.global_step)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        (self.folder / f"pid-{trainer.global_rank}").write_text(str(os.getpid()))

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        text = f"{trainer.global_step} {int(self.stop.stopped_by or 0)} {self.broadcasts}"
        (self.folder / f"end-{trainer.global_rank}").write_text(text)


def rank_main(training: Any, folder: Path) -> None:
    stop = StopOnSignal(agree_every_n_steps=5)
    saver = StepCheckpoint(folder / "checkpoints", every_n_steps=1000)
    resume = RunDir(path=folder).latest_checkpoint()
    options = {"devices": int(os.environ["LOCAL_WORLD_SIZE"]), "strategy": "ddp"}
    trainer = training.fit(stop, saver, StepsOfRank(folder, stop), resume=resume, **options)
    try:
        stop.raise_if_stopped(trainer.global_step, training.total_steps)
    except TrainingStopped as stopped:
        raise SystemExit(stopped.exit_status) from None


def torchrun(target: Callable[[], None]) -> Callable[[], None]:
    """torchrun's own launcher and agent, which fork two ranks instead of starting Python twice."""

    def run() -> None:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="test",
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(config, target)()

    return run


@pytest.mark.slow
def test_the_clock_of_any_rank_makes_all_of_two_write_a_checkpoint(
    fork: Any, tiny_training: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of rank 1 goes 20 seconds a step, and that of rank 0 stands."""
    seconds = [0.0]
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def tick(step: int) -> None:
        seconds[0] += 20 * int(os.environ["RANK"])

    saver = StepCheckpoint(
        tmp_path, every_n_steps=1000, every_minutes=1, keep_last=9, agree_every_n_steps=5
    )
    training = tiny_training(total_steps=12, after_batch=tick)

    def rank() -> None:
        training.fit(saver, devices=2, strategy="ddp")

    assert fork(torchrun(rank), tmp_path / "stderr").status() == 0
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {
        f"step-{step}.ckpt" for step in (5, 10, 12)
    }


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "rank 1"])
def test_two_ranks_end_at_the_same_step_and_continue(
    to: str, fork: Any, tiny_training: Tiny, tmp_path: Path
) -> None:
    def ranks(total_steps: int) -> Callable[[], None]:
        training = tiny_training(total_steps=total_steps, num_workers=1)
        return torchrun(lambda: rank_main(training, tmp_path))

    def ends() -> list[str]:
        return [(tmp_path / f"end-{rank}").read_text() for rank in range(2)]

    forked = fork(ranks(LONG), tmp_path / "stderr")
    for rank in range(2):
        path = tmp_path / f"progress-{rank}"
        forked.wait_for("step 11", lambda path=path: step_in(path) >= 11)
    pid = forked.process.pid if to == "launcher" else int((tmp_path / "pid-1").read_text())
    os.kill(pid, signal.SIGTERM)
    assert forked.status() == 1  # torchrun's own, with its own words
    step, by, broadcasts = (int(word) for word in ends()[0].split())
    assert by == signal.SIGTERM
    assert broadcasts < 5  # Lightning's, of whether it got a SIGTERM, would be one a step
    assert step % 5 == 0
    assert step < 1000
    assert ends()[1] == ends()[0]
    latest = RunDir(path=tmp_path).latest_checkpoint()
    assert latest == tmp_path / "checkpoints" / f"step-{step}.ckpt"
    assert torch.load(latest, weights_only=True)["global_step"] == step
    if to == "launcher":
        assert fork(ranks(step + 7), tmp_path / "stderr").status() == 0
        assert [end.split()[:2] for end in ends()] == [[str(step + 7), "0"]] * 2
