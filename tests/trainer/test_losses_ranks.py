"""On several ranks every loss has the value and the gradients of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("losses_on_ranks.py")


def test_losses_on_ranks_equal_one_process(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    # gloo prints too, in torch 2.9
    found = [line for line in result.stdout.splitlines() if line.endswith(" equal")]
    assert found == ["2 ranks: 17 equal", "4 ranks: 17 equal"]
