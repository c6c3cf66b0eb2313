"""A command that is killed at any moment is run again, and answers as if nothing had been."""

from __future__ import annotations

import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from broken_off import WORKS, answers, leftovers

KILLS = 2  # of each command; in a nightly run 17, which are 204 in all
NIGHTLY_KILLS = 17


def kill_at_random(folders: Any, name: str, kills: int, seed: int) -> None:
    """Kill a command at random moments, one kill after the other, and let it finish."""
    work, whole = WORKS[name], folders.whole(name)
    generator = random.Random(f"{name} {seed}")
    folder = folders.make(work)
    done = 0
    while done < kills:
        process = folders.start(folder, work)
        time.sleep(generator.uniform(0, whole.seconds))
        with suppress(ProcessLookupError):  # it has just ended
            process.send_signal(signal.SIGKILL)
        status = process.wait()
        if status == -signal.SIGKILL:
            done += 1
            continue
        assert status == 0, folders.errors(folder)
        check(folder, name, whole.answers)
        folder = folders.make(work)  # it was faster this time: begin anew
    folders.finish(folder, work)
    check(folder, name, whole.answers)
    shutil.rmtree(folder)


def check(folder: Path, name: str, expected: dict[str, Any]) -> None:
    assert answers(folder, WORKS[name]) == expected
    assert not list(leftovers(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_a_killed_command_answers_as_a_whole_one(name: str, folders: Any) -> None:
    kill_at_random(folders, name, KILLS, seed=0)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WORKS)
def test_two_hundred_kills(name: str, folders: Any) -> None:
    for seed in range(1, NIGHTLY_KILLS + 1):
        kill_at_random(folders, name, 1, seed)
