"""On several ranks every loss has the value and the gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("losses_on_ranks.py")


@pytest.mark.slow
def test_losses_on_ranks_equal_one_process(run_python: Any, tmp_path: Path) -> None:
    result = run_python(str(SCRIPT), str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    # gloo prints too, in torch 2.9
    found = [line for line in result.stdout.splitlines() if line.endswith(" equal")]
    assert found == ["2 ranks: 26 equal", "4 ranks: 26 equal"]
