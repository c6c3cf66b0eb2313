"""Pools and commands that items share."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from gpu_checks.harness import Setup, require, send_output_to
from siftclip.trainer.cli.main import main
from siftclip.trainer.demo.pool import DemoData, write_demo_data

MAKE_POOL = Path(__file__).resolve().parents[1] / "tools" / "make_pool.py"


def workers() -> int:
    """Loader processes: all cores but one."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def photo_pool(setup: Setup) -> Path:
    """A pool of photographs, made once."""
    folder = setup.work / "pool"
    samples, shard = setup.size((8000, 500), (120, 60))
    words = [sys.executable, str(MAKE_POOL), str(folder), "--samples", str(samples)]
    words += ["--shard-samples", str(shard), "--workers", str(workers())]
    subprocess.run(words, check=True)
    return folder


def demo_pool(setup: Setup) -> DemoData:
    """A pool of handwritten digits, made once."""
    return write_demo_data(
        setup.work / "demo",
        pool_samples=240,
        teacher_samples=48,
        classification_samples=30,
        count_samples=20,
        retrieval_samples=20,
        progress=False,
    )


def accelerator(setup: Setup) -> str:
    """The device in the words of an option."""
    return f"trainer.accelerator={'gpu' if setup.on_gpu else 'cpu'}"


class Command:
    """A siftclip command in a process of its own, forked: it need not import anything.

    To be started before this process has used the GPU, or several threads of torch.
    """

    def __init__(self, setup: Setup, name: str, *words: str) -> None:
        """Start it; what it prints goes to a file of this name."""
        self.log = setup.work / f"{name}.log"
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_run, args=(self.log, words))
        self.process.start()

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8")

    def finish(self) -> str:
        """Wait for its end, which must be a good one, and return what it has printed."""
        self.process.join()
        last = self.text.strip()[-400:]
        require(self.process.exitcode == 0, f"ended with {self.process.exitcode}: {last}")
        return self.text


def _run(log: Path, words: tuple[str, ...]) -> None:
    with log.open("w", encoding="utf-8") as file:
        send_output_to(file.fileno())
    sys.argv = ["siftclip", *words]
    main()
