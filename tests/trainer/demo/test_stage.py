"""The demo at a small size, from the console script, and again after it was killed."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = [
    "demo.pool_samples=300",
    "demo.teacher_samples=200",
    "scale.samples_seen=256",
    "scale.global_batch_size=32",
    "optim.warmup_steps=2",
    "logger=csv",
    "model=vit_tiny",
]


@pytest.mark.slow
def test_demo_ends_with_a_table_and_continues_after_a_kill(
    cli: Callable[..., subprocess.CompletedProcess[str]],
    start_cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    process = start_cli("demo", *SMALL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/train/*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    teacher = tmp_path / "outputs" / "demo" / "teacher" / "summary.json"
    trained_at = teacher.stat().st_mtime_ns
    result = cli("demo", *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert teacher.stat().st_mtime_ns == trained_at
    for word in ("random", "clip_score", "oracle", "digit", "colour", "count", "retrieval"):
        assert word in result.stdout
    (report,) = (line for line in result.stdout.splitlines() if line.startswith("report "))
    assert (tmp_path / report.split()[1]).is_file()
    assert (tmp_path / "outputs/compare/demo/results.csv").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
