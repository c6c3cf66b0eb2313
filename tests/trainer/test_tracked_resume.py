"""A run that is killed in the middle is one run everywhere: each record once, none missing."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracked_runs import Curves, curves_of_log, mlflow_curves, tensorboard_curves
from wandb_offline import read_part, read_parts
from wandb_server import wandb_server

from siftclip.files import read_json, read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.tracking.mlflow_runs import default_uri, mlflow_key

pytestmark = pytest.mark.slow

OF_TIME = re.compile("time|seconds|per_second|wait|memory")
AXES = {"samples", "flops", "seconds"}
WHERE = [name for name in ("tensorboard", "mlflow") if importlib.util.find_spec(name) is not None]


def wait_for_step(folder: Path, step: int, process: Any) -> Path:
    """Wait until the run below a folder has logged a step, while its process lives."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for run in (folder / "train").glob("*"):
            if any(record["step"] >= step for record in read_jsonl(run / "metrics.jsonl")):
                return run
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def require_whole(found: Curves, expected: Curves, rename: Callable[[str], str]) -> None:
    """The curves of the log, each point once and in order, and those of the axes."""
    for key, points in expected.items():
        curve = found[rename(key)]
        assert [step for step, _ in curve] == [step for step, _ in points], key
        if not OF_TIME.search(key):  # else another session's, where steps were repeated
            assert [value for _, value in curve] == pytest.approx([v for _, v in points]), key
    steps = [step for step, _ in expected["train/loss"]]
    assert {axis: [step for step, _ in found[axis]] for axis in AXES} == dict.fromkeys(AXES, steps)
    assert found["samples"] == [(step, 16.0 * step) for step in steps]
    assert found["flops"] == [(step, pytest.approx(v)) for step, v in expected["cost/flops"]]
    assert [step for step, _ in found["selection/samples"]] == [0]


def test_a_killed_run_is_one_run_everywhere(
    base: list[str], start_python: Callable[..., Any], demo_data: DemoData, tmp_path: Path
) -> None:
    options = [
        *("scale.samples_seen=960", "trainer.checkpoint_every_n_steps=7", "logger=wandb"),
        *("logger.mode=offline", "logger.samples=2", "logger.gradients_every_n_steps=20"),
        "logger.artifacts=[selection,evaluation]",  # tables come with logger.samples
        *(f"logger.{name}=true" for name in WHERE),
        *(f"eval.root={demo_data.tasks}", "eval.tasks=[digit]", "eval.during.every_n_steps=10"),
    ]
    words = ["-m", "siftclip.trainer.cli", "train", *base, *options]
    for number, step in enumerate((12, 33)):
        folder = tmp_path / f"printed{number}"
        folder.mkdir()
        process = start_python(*words, cwd=tmp_path, folder=folder)
        run = wait_for_step(tmp_path / "outputs", step, process)
        parts = sorted(run.glob("wandb/offline-run-*/*.wandb"))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert len(parts) == number + 1
        time.sleep(2)  # wandb's own process ends, too
        parts[-1].write_bytes(parts[-1].read_bytes()[:-20])  # as where it is killed with the first
        assert not (run / "summary.json").exists()
        first = read_part(parts[0])  # of a run that is far from its end
        assert first.rows[0]["selection/samples"] == 72
        assert first.rows[0]["trainer/global_step"] == 0
    assert start_python(*words, cwd=tmp_path, folder=tmp_path).wait(300) == 0
    log = read_jsonl(run / "metrics.jsonl")
    expected = curves_of_log(log)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 61))
    assert [step for step, _ in expected["eval_during/digit"]] == list(range(10, 61, 10))
    parts_of_wandb = read_parts(run)
    assert len(parts_of_wandb) == 3
    assert {part.run.run_id for part in parts_of_wandb} == {(run / "wandb_id").read_text().strip()}
    rows = [row for part in parts_of_wandb for row in part.rows]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    curves: Curves = {}
    for row in rows:
        for key in row.keys() - AXES:
            curves.setdefault(key, []).append((row["trainer/global_step"], row[key]))
    training = [row for row in rows if "train/loss" in row]
    curves |= {axis: [(r["trainer/global_step"], r[axis]) for r in training] for axis in AXES}
    require_whole(curves, expected, rename=str)
    steps_of = {key: [step for step, _ in points] for key, points in curves.items()}
    assert steps_of["gradients/logit_scale/_type"] == [20, 40, 60]
    for table, step in (("selection/examples", 0), ("selection/scores", 0), ("eval/tasks", 60)):
        assert steps_of[f"{table}/path"] == [step]
    artifacts = [artifact.name for part in parts_of_wandb for artifact in part.artifacts]
    assert sorted(artifacts) == sorted(set(artifacts))
    assert parts_of_wandb[-1].summary["train/loss"] == expected["train/loss"][-1][1]
    assert parts_of_wandb[-1].summary["selection/samples"] == 72
    if "tensorboard" in WHERE:
        require_whole(tensorboard_curves(run / "tensorboard"), expected, rename=str)
    if "mlflow" in WHERE:
        uri, run_id = default_uri(tmp_path / "outputs"), (run / "mlflow_id").read_text().strip()
        require_whole(mlflow_curves(uri, run_id), expected, rename=mlflow_key)
    seconds = read_json(run / "summary.json")["train_seconds"]
    assert curves["seconds"][-1][1] == pytest.approx(seconds, abs=1e-3)
    require_wandb_syncs(run, rows)


def require_wandb_syncs(run: Path, rows: list[dict[str, Any]]) -> None:
    """The command sends all rows once, in their order, and artifacts with where they come from."""
    run_id = (run / "wandb_id").read_text().strip()
    parts = map(str, sorted(run.glob("wandb/offline-run-*")))
    with wandb_server() as server:
        own = {
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": server.url,
            "WANDB_CACHE_DIR": str(run / "cache"),
            "WANDB_CONFIG_DIR": str(run / "settings"),
            "HOME": str(run / "another_home"),  # nothing that is sent may lie in the first one
        }
        command = [sys.executable, "-m", "wandb", "sync", *parts]
        done = subprocess.run(
            command, env={**os.environ, **own}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        sent = server.rows(run_id)
    assert [row["_step"] for row in sent] == list(range(len(rows)))
    assert [row.get("train/loss") for row in sent] == [row.get("train/loss") for row in rows]
    artifacts = {artifact.kind: artifact for artifact in server.artifacts.values()}
    assert all(artifact.is_committed for artifact in artifacts.values())
    inputs = [artifacts[kind] for kind in ("pool", "features", "selection")]
    assert [artifact.used_by for artifact in inputs] == [[run_id]] * 3
    assert artifacts["evaluation"].made_by == run_id
    selection = next(i for i, a in server.artifacts.items() if a.kind == "selection")
    content = server.uploads[f"{selection}/selection.npy"]
    assert content == (run / "selection.npy").read_bytes()
