"""The same command twice at the same time gives the right answer once; none writes over another."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from broken_off import WORKS, answers, leftovers

IN_CI = ("train", "select", "embed")
NIGHTLY_TIMES = 2  # of each command: 24 in all
HELD = "is being written by"


def run_twice(folders: Any, name: str, seed: int) -> None:
    """Start a command, and the same again at a random moment of the first."""
    work, whole = WORKS[name], folders.whole(name)
    folder = folders.make(work)
    processes = [folders.start(folder, work)]
    time.sleep(random.Random(f"{name} {seed}").uniform(0, whole.seconds))
    processes.append(folders.start(folder, work))
    statuses = [process.wait() for process in processes]
    said = folders.errors(folder)
    assert 0 in statuses, said
    assert set(statuses) <= {0, 2}, said
    if 2 in statuses:  # the other has it
        assert any(HELD in text for text in folders.all_errors(folder))
    assert not any("Traceback" in text for text in folders.all_errors(folder))
    assert answers(folder, work) == whole.answers
    assert not list(leftovers(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_two_at_once(name: str, folders: Any) -> None:
    run_twice(folders, name, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 1 + NIGHTLY_TIMES))
@pytest.mark.parametrize("name", WORKS)
def test_two_at_once_of_every_command(name: str, seed: int, folders: Any) -> None:
    run_twice(folders, name, seed)
