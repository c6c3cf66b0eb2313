"""Two commands at once on what one of them writes: the second says who holds it, or comes later."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from siftclip.files import read_json, read_jsonl
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

Completed = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., Any]


def steps(run: Path) -> Counter[int]:
    """How often the log has the loss of each step."""
    records = read_jsonl(run / "metrics.jsonl")
    return Counter(record["step"] for record in records if "train/loss" in record)


def wait_for(condition: Callable[[], Any], process: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the first command ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_one_trains_a_run_and_a_killed_one_does_not_block_it(
    base: list[str], cli: Completed, start_cli: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [*base, f"run_dir={run}", "scale.samples_seen=640", "trainer.keep_checkpoints=1"]
    options += ["trainer.checkpoint_every_n_steps=5"]
    first = start_cli("train", *options)
    wait_for(lambda: len(steps(run)) > 6, first)
    first.send_signal(signal.SIGSTOP)  # it lives, but does not get to its end meanwhile
    second = cli("train", *options)
    assert second.returncode == 2
    assert f"The run {run} is being written by process {first.pid} on " in second.stderr
    assert "(siftclip train)" in second.stderr
    assert "Traceback" not in second.stderr
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (run / LOCK_NAME).exists()
    third = cli("train", *options)
    assert third.returncode == 0, third.stderr
    assert not (run / LOCK_NAME).exists()
    assert set(steps(run)) == set(range(1, 41))
    # what the killed one had logged after its last checkpoint is there once more, nothing else
    assert sum(count > 1 for count in steps(run).values()) <= 5


def test_all_ranks_of_the_second_command_end(
    base: list[str], cli: Completed, tmp_path: Path
) -> None:
    with locked(tmp_path / "run" / LOCK_NAME, owner="another"):
        second = cli("train", *base, f"run_dir={tmp_path / 'run'}", ranks=2)
    assert second.returncode != 0
    assert f"is being written by process {os.getpid()} on" in second.stderr
    assert "is being written by another command" in second.stderr  # the other rank


@pytest.mark.slow
def test_two_comparisons_share_an_arm(
    base: list[str], demo_data: DemoData, cli: Completed, start_cli: Start, tmp_path: Path
) -> None:
    options = [
        *base,
        "scale.samples_seen=640",
        f"eval.root={demo_data.tasks}",
        "eval.tasks=[colour]",
        "compare.seeds=[0]",
    ]
    first = start_cli("compare", *options, "compare.name=a")
    outputs = tmp_path / "outputs"
    wait_for(lambda: any(outputs.glob("train/*/metrics.jsonl")), first)
    first.send_signal(signal.SIGSTOP)
    (held,) = outputs.glob("train/*")
    own = '+compare.arms.own=["selector=random","selector.fraction=0.4"]'
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(cli, "compare", *options, own, "compare.name=b")
        wait_for(lambda: len([*outputs.glob("train/*/summary.json")]) == 2 or running.done(), first)
        first.send_signal(signal.SIGCONT)
        second = running.result()
    assert second.returncode == 0, second.stderr
    assert first.wait(120) == 0, (tmp_path.with_suffix(".printed") / "stderr").read_text()
    said = f"seed 0, comes after the others. The run {held} is being written by process {first.pid}"
    assert said in re.sub(r"\s+", " ", second.stderr)
    runs = [*outputs.glob("train/*")]
    assert len(runs) == 3
    for run in runs:
        assert steps(run) == Counter(range(1, 41))
        assert len(read_jsonl(run / "eval_results.jsonl")) == 1
        assert not (run / LOCK_NAME).exists()
    for name, arms in (("a", 2), ("b", 3)):
        rows = (outputs / "compare" / name / "results.csv").read_text().splitlines()
        assert len({row.split(",")[0] for row in rows[1:]}) == arms


def test_a_run_that_another_has_finished_meanwhile_is_not_trained_again(
    base: list[str], compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look before the lock is not the last one."""
    config = compose("train", base)
    run = train_stage(config)
    before = (run.path / "summary.json").stat().st_mtime_ns
    looks = iter([None, read_json(run.path / "summary.json")])
    monkeypatch.setattr(RunDir, "summary", property(lambda _: next(looks)))
    assert train_stage(config).path == run.path
    assert (run.path / "summary.json").stat().st_mtime_ns == before
    assert set(steps(run.path).values()) == {1}


def test_what_is_kept_is_made_once(base: list[str], compose: Any) -> None:
    """Two selections at once: the second waits, and reads what the first has written."""
    config = compose("select", [*base, "selector=clip_score", "selector.fraction=0.5"])
    manifest = select_stage(config).folder / "selection.json"
    made, aside = manifest.stat().st_mtime_ns, manifest.with_name("aside.json")
    manifest.rename(aside)
    with ThreadPoolExecutor(1) as executor:
        with locked(manifest.with_name(LOCK_NAME), owner="another"):
            second = executor.submit(select_stage, config)
            time.sleep(0.3)
            assert not second.done()
            aside.rename(manifest)
        assert second.result(timeout=60).folder == manifest.parent
    assert manifest.stat().st_mtime_ns == made
