"""One process and the ranks of a real gloo group keep the same samples with every selector."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from siftclip.selectors.ranks import OneRank

SCRIPT = Path(__file__).with_name("selectors_on_ranks.py")


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    answers: dict[str, list[int]] = runpy.run_path(str(SCRIPT))["decide"](OneRank())
    assert len(answers) > 30
    return answers


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_keep_what_one_process_keeps(
    alone: dict[str, list[int]], tmp_path: Path, size: int
) -> None:
    answers = tmp_path / "answers"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(SCRIPT), str(answers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(size):
        found = json.loads(Path(f"{answers}.{rank}").read_text())
        for name, kept in alone.items():
            assert found[name] == kept, f"{name} on rank {rank} of {size}"
