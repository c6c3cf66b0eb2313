"""The check of a GPU machine: its items run here in small, and one that fails or hangs is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_checks import harness

    monkeypatch.setattr(harness, "GRACE_SECONDS", 1.0)
    return harness


@pytest.fixture
def outcome_of(harness: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """`outcome_of(function, seconds=60)`: what an item that calls it has found."""

    def run(function: Callable[[Any, Any], None], *, seconds: float = 60) -> Any:
        item = harness.Item(name="an item", seconds=seconds, run=function)
        setup = harness.Setup(device=torch.device("cpu"), tiny=True, work=tmp_path)
        return harness.run_item(item, setup, seconds_left=100, log=tmp_path / "log")

    return run


def runs(pid: int) -> bool:
    """Whether a process is there; one that nobody has waited for is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_what_an_item_finds_is_told(outcome_of: Callable[..., Any], tmp_path: Path) -> None:
    def item(setup: Any, facts: Any) -> None:
        os.write(1, b"printed\n")  # past the capturing of pytest
        facts["rate"] = setup.size(1000, 3)

    found = outcome_of(item)
    assert (found.status, found.facts, found.error) == ("passed", {"rate": 3}, "")
    assert (tmp_path / "log").read_text() == "printed\n"


def test_a_failure_costs_one_item_and_no_fact(
    outcome_of: Callable[..., Any], harness: ModuleType
) -> None:
    def wrong(setup: Any, facts: Any) -> None:
        facts["first"] = 1
        harness.require(False, "wrong numbers")

    def dead(setup: Any, facts: Any) -> None:
        facts["first"] = 1
        os._exit(3)  # as a process ends whose kernel has failed badly

    found = outcome_of(wrong)
    assert (found.status, found.facts) == ("failed", {"first": 1})
    assert found.error == "CheckError: wrong numbers"
    assert "in wrong" in found.trace
    found = outcome_of(dead)
    assert (found.status, found.facts) == ("failed", {"first": 1})
    assert "died" in found.error


def test_an_item_that_hangs_is_cut_off(outcome_of: Callable[..., Any], tmp_path: Path) -> None:
    def hang(setup: Any, facts: Any) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(600)
        facts["child"] = child
        os.waitpid(child, 0)

    start = time.monotonic()
    found = outcome_of(hang, seconds=6)
    assert found.status == "cut off"
    assert time.monotonic() - start < 30
    deadline = time.monotonic() + 30
    while runs(found.facts["child"]):  # it has been killed, and whoever inherits it looks later
        assert time.monotonic() < deadline, "what it has started is left"
        time.sleep(0.01)


def test_without_time_an_item_is_not_begun(outcome_of: Callable[..., Any]) -> None:
    def item(setup: Any, facts: Any) -> None:
        facts["begun"] = True

    found = outcome_of(item, seconds=1)
    assert (found.status, found.facts) == ("not run", {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_items_run_without_a_gpu(run_python: Any, tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--seconds", "850", "--out", str(tmp_path / "found")]
    done = run_python(str(BENCHMARKS / "gpu_check.py"), *words, cwd=tmp_path)
    record = json.loads((tmp_path / "found" / "gpu_check.json").read_text())
    statuses = {item["name"]: item["status"] for item in record["items"]}
    errors = {item["name"]: item["error"] for item in record["items"] if item["error"]}
    assert len(statuses) == 12
    assert set(statuses.values()) == {"passed"}, errors
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "found" / "gpu_check.md").read_text()
    assert table.count("| passed |") == 12
