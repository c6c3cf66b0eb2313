"""One of two ranks is killed: the other ends too, and the same command continues.

Under torchrun's own agent, which forks the ranks; in a nightly run under torchrun as a person
starts it, with processes of their own.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_off import Work, answers, leftovers, train_words

WORK = Work(
    words=train_words(  # of enough steps that none has ended when a rank is killed
        *("selector=random", "selector.fraction=1", "trainer.devices=2"),
        "scale.samples_seen=1280",
    ),
    files=("outputs/train/*/model/*.safetensors", "outputs/train/*/metrics.jsonl"),
)
NIGHTLY_TIMES = 10
END_SECONDS = 90.0


@pytest.fixture
def torchrun(child_environment: dict[str, str]) -> Iterator[Any]:
    """`torchrun(folder)`: start the command on two ranks; what is left of it is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "siftclip.trainer.cli", *WORK.words],
                cwd=folder,
                env=child_environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ranks_of(launcher: int) -> list[int]:
    """Find the processes of the ranks below a launcher, which starts them by rank."""
    ranks = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        if parent == launcher:
            ranks.append(int(path.parent.name))
    return sorted(ranks)


def has_begun(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob("outputs/train/*/metrics.jsonl"))


@pytest.fixture(scope="session")
def whole(folders: Any) -> dict[str, Any]:
    """What the command answers on two ranks of which none is killed."""
    folder = folders.make(WORK)
    folders.finish(folder, WORK, ranks=2)
    return answers(folder, WORK)


def kill_a_rank(
    rank: int, seed: int, folders: Any, start: Callable[[Path], Any], whole: dict[str, Any]
) -> None:
    folder = folders.make(WORK)
    process = start(folder)
    deadline = time.monotonic() + 120
    while not has_begun(folder):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 1))
    pids = ranks_of(process.pid)
    if process.poll() is None and len(pids) == 2:
        os.kill(pids[rank], signal.SIGKILL)
        assert process.wait(END_SECONDS) != 0
    folders.finish(folder, WORK, ranks=2)
    assert answers(folder, WORK) == whole
    assert not list(leftovers(folder))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(rank: int, folders: Any, whole: dict[str, Any]) -> None:
    kill_a_rank(rank, 0, folders, lambda folder: folders.start(folder, WORK, ranks=2), whole)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 1 + NIGHTLY_TIMES))
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_ranks(
    rank: int, seed: int, folders: Any, torchrun: Any, whole: dict[str, Any]
) -> None:
    kill_a_rank(rank, seed, folders, torchrun, whole)
