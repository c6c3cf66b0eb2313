"""One process and the ranks of a real gloo group keep the same samples with every selector."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from siftclip.ranks import OneRank

SCRIPT = Path(__file__).with_name("selectors_on_ranks.py")


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    answers: dict[str, list[int]] = runpy.run_path(str(SCRIPT))["decide"](OneRank())
    assert len(answers) > 30
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_keep_what_one_process_keeps(
    alone: dict[str, list[int]], run_python: Any, tmp_path: Path, size: int
) -> None:
    answers = tmp_path / "answers"
    result = run_python(str(SCRIPT), str(answers), cwd=tmp_path, ranks=size)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(size):
        found = json.loads(Path(f"{answers}.{rank}").read_text())
        for name, kept in alone.items():
            assert found[name] == kept, f"{name} on rank {rank} of {size}"
