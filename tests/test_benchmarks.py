"""The benchmarks run: nothing is timed here, but what is not run rots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_benchmark_pool_and_its_measurements(tmp_path: Path) -> None:
    pool = str(tmp_path / "pool")
    options = ["--samples", "600", "--shard-samples", "200", "--workers", "1"]
    run("make_pool.py", pool, *options)
    assert len(list((tmp_path / "pool" / "shards").glob("*.tar"))) == 3
    assert "| siftclip, one process |" in run("indexing.py", pool, "--rounds", "1")
    assert "| all | 0.3" in run("shuffling.py", pool, "--fractions", "1.0")


@pytest.mark.slow
def test_benchmarks_of_training() -> None:
    step = run("training_step.py", "--batch", "4", "--steps", "2", "--rounds", "1")
    assert "| ours |" in step
    loss = run("loss_memory.py", "--batch", "64", "--rounds", "1", "--repeats", "1")
    assert "siftclip" in loss
    options = ["--model", "ViT-S-32", "--batch", "2", "--micro-batch", "1"]
    assert "scale" in run("large_batch.py", *options, "--way", "both")
