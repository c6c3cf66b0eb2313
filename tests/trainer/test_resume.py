"""A killed or interrupted run continues where it was, to the bit."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from wandb_server import wandb_server

from siftclip.datamodules.models.load import load_clip_model
from siftclip.files import read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.tracking.wandb_files import history
from siftclip.trainer.stages.train import train_stage

LONG_RUN = ["scale.samples_seen=1600", "trainer.checkpoint_every_n_steps=7"]


def losses(run: RunDir) -> dict[int, float]:
    """The loss of each step; of steps that were repeated, the last."""
    records = read_jsonl(run.path / "metrics.jsonl")
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def logged(run: RunDir) -> list[tuple[int, list[str]]]:
    """The step and the names of each record, in the order of the log."""
    records = read_jsonl(run.path / "metrics.jsonl")
    return [(record["step"], sorted(record)) for record in records]


def last_step(folder: Path) -> int:
    """The last step that a run below `folder` has logged; 0 before the first."""
    paths = folder.glob("train/*/metrics.jsonl")
    return max((r.get("step", 0) for path in paths for r in read_jsonl(path)), default=0)


def wait_for_step(folder: Path, step: int, process: Any) -> None:
    """Wait until a run below `folder` has logged `step`, while its process lives."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if last_step(folder) >= step:
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def wandb_service_of(pid: int) -> int:
    """Find the process that sends what a process logs to wandb."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"wandb-core") and str(pid).encode() in words:
                return int(path.parent.name)
    raise AssertionError(f"{pid} has no wandb-core")


@pytest.fixture(scope="module")
def whole(base_of: Any, composing: Any, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The long run, unbroken."""
    with composing() as compose:
        options = [*base_of(tmp_path_factory.mktemp("whole")), *LONG_RUN]
        return train_stage(compose("train", options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "step", "more"),
    [
        (signal.SIGKILL, 12, []),
        (signal.SIGKILL, 40, ["trainer.background_checkpoints=true"]),
        (signal.SIGINT, 25, []),
        (signal.SIGINT, 26, ["trainer.background_checkpoints=true"]),
    ],
)
def test_stopped_run_continues_to_the_bit(
    stop: signal.Signals,
    step: int,
    more: list[str],
    whole: RunDir,
    base: list[str],
    compose: Callable[..., DictConfig],
    start_cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    options = [*base, *LONG_RUN, *more]
    process = start_cli("train", *options)
    wait_for_step(tmp_path / "outputs", step, process)
    process.send_signal(stop)
    status = process.wait(60)
    if stop == signal.SIGINT:
        assert status == 130
        errors = (tmp_path.with_suffix(".printed") / "stderr").read_text()
        message = (
            r"siftclip train: stopped by SIGINT at step \d+ of 100; the same command continues"
        )
        assert re.search(message, errors), errors
        assert "Traceback" not in errors
    else:
        assert status == -stop
    (stopped,) = (RunDir(path=path) for path in (tmp_path / "outputs" / "train").iterdir())
    assert stopped.summary is None
    assert stopped.latest_checkpoint() is not None
    continued = train_stage(compose("train", options))
    assert continued.path == stopped.path
    assert losses(continued) == losses(whole)
    assert max(losses(continued)) == 100
    assert logged(continued) == logged(whole)
    expected = load_clip_model(str(whole.path)).model.state_dict()
    found = load_clip_model(str(continued.path)).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_logs_each_step_once(
    base: list[str],
    compose: Callable[..., DictConfig],
    start_python: Callable[..., Any],
    demo_data: DemoData,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With evaluations, in `metrics.jsonl` and over all parts of an offline wandb run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    during = ["eval.during.every_n_steps=10", "eval.during.max_samples=10", "eval.tasks=[digit]"]
    options = [*base, *LONG_RUN, f"eval.root={demo_data.tasks}", *during]
    whole = train_stage(compose("train", [*options, f"output_dir={tmp_path / 'whole'}"]))
    for number, steps in enumerate([5, 15, 25, 1]):
        step = last_step(tmp_path / "outputs") + steps  # not logged yet: each begins a part
        folder = tmp_path / f"printed{number}"
        folder.mkdir()
        words = ["train", *options, "logger=wandb"]
        process = start_python("-m", "siftclip.trainer.cli", *words, cwd=tmp_path, folder=folder)
        wait_for_step(tmp_path / "outputs", step, process)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    continued = train_stage(compose("train", [*options, "logger=wandb"]))
    assert logged(continued) == logged(whole)
    assert losses(continued) == losses(whole)
    paths = sorted(continued.path.glob("wandb/offline-run-*/*.wandb"))
    begun_too_late = [*continued.path.glob("wandb/empty-offline-run-*")]  # to have written anything
    assert len(paths) + len(begun_too_late) == 5
    deadline = time.monotonic() + 60
    while True:  # wandb's own process writes the files
        rows = [row for path in paths for row in history(path)]
        if any("eval/tasks" in row for row in rows) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    steps = [row["trainer/global_step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, 101))
    steps = [row["trainer/global_step"] for row in rows if "eval_during/digit" in row]
    assert steps == list(range(10, 101, 10))
    assert [row["_step"] for row in rows] == list(range(len(rows)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("uploads", [True, False], ids=["process", "machine"])
def test_a_server_of_wandb_gets_each_step_once(
    uploads: bool,
    base: list[str],
    child_environment: dict[str, str],
    start_python: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Also where a machine is lost, with rows that wandb's own process had not sent yet."""
    with wandb_server() as server:
        child_environment |= {
            "WANDB_MODE": "online",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": server.url,
            "WANDB_CACHE_DIR": str(tmp_path / "cache"),
            "WANDB_CONFIG_DIR": str(tmp_path / "settings"),
        }
        words = ["-m", "siftclip.trainer.cli", "train", *base, *LONG_RUN, "logger=wandb"]
        for number, steps in enumerate([5, 30]):
            step = last_step(tmp_path / "outputs") + steps
            folder = tmp_path / f"printed{number}"
            folder.mkdir()
            process = start_python(*words, cwd=tmp_path, folder=folder)
            wait_for_step(tmp_path / "outputs", step, process)
            service = wandb_service_of(process.pid)
            process.send_signal(signal.SIGKILL)
            if not uploads:
                os.kill(service, signal.SIGKILL)
            process.wait(60)
            while Path(f"/proc/{service}").exists():  # it ends once it has sent all
                time.sleep(0.05)
        assert start_python(*words, cwd=tmp_path, folder=tmp_path).wait(300) == 0
        (run,) = (RunDir(path=path) for path in (tmp_path / "outputs" / "train").iterdir())
        rows = server.rows((run.path / "wandb_id").read_text().strip())
    steps = [row["trainer/global_step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, 101))
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    sent = [row["train/loss"] for row in rows if "train/loss" in row]
    assert sent == pytest.approx([*losses(run).values()])


def test_other_worker_counts_continue_the_same_run(
    base: list[str], compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """Stopped between steps by a failing logger, continued with a worker process."""
    options = [*base, "scale.samples_seen=320", "trainer.checkpoint_every_n_steps=5"]
    whole = train_stage(compose("train", [*options, f"output_dir={tmp_path / 'whole'}"]))
    with pytest.MonkeyPatch.context() as patch:
        from siftclip.trainer.runtime.loggers import FileLogger

        original = FileLogger.log_metrics

        def fail_at_13(self: FileLogger, metrics: object, step: int | None = None) -> None:
            if step == 13:
                raise RuntimeError("stop here")
            original(self, metrics, step)  # type: ignore[arg-type]

        patch.setattr(FileLogger, "log_metrics", fail_at_13)
        with pytest.raises(RuntimeError, match="stop here"):
            train_stage(compose("train", options))
    continued = train_stage(compose("train", [*options, "data.num_workers=2"]))
    assert losses(continued) == losses(whole)
