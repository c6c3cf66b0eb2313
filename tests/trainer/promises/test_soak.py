"""A long run needs no more memory, file handles, threads or time a step at its end than before."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_off import Work, train_words

from siftclip.files import read_jsonl

STEPS = 50_000
IN_CI = 400


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process uses."""

    step: int
    memory_mb: float
    files: int
    threads: int


def usage(pid: int, step: int) -> Usage | None:
    """Read what a process uses; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return Usage(
        step=step,
        memory_mb=int(fields["VmRSS"].split()[0]) / 1024,
        files=files,
        threads=int(fields["Threads"]),
    )


def soak(folders: Any, steps: int, every: int) -> tuple[list[Usage], dict[int, float]]:
    """Train for so many steps and look every so often; also the seconds of a step, by step."""
    words = train_words(
        *("selector=random", "selector.fraction=1", "online=every_step"),
        *("selector@online.selector=jest", "online.selector.fraction=0.5"),
        *(f"scale.samples_seen={4 * steps}", "scale.global_batch_size=4", "run_dir=soak"),
        *(f"trainer.log_every_n_steps={every}", f"trainer.checkpoint_every_n_steps={5 * every}"),
    )
    work = Work(words=words, files=("soak/metrics.jsonl",))
    folder = folders.make(work)
    process, found = folders.start(folder, work), list[Usage]()
    log = folder / "soak" / "metrics.jsonl"
    while process.poll() is None:
        step = max((r["step"] for r in read_jsonl(log)), default=0) if log.exists() else 0
        if step and (not found or step > found[-1].step):
            now = usage(process.pid, step)
            found += [now] if now else []
        time.sleep(0.05)
    assert process.wait() == 0, folders.errors(folder)
    times = {r["step"]: r["train/batch_time"] for r in read_jsonl(log) if "train/batch_time" in r}
    assert max(times) == steps
    return found, times


def check(found: list[Usage], times: dict[int, float], *, growth_mb: float) -> None:
    """Compare the second half with the second quarter."""
    count = len(found)
    assert count >= 8
    before, after = found[count // 4 : count // 2], found[count // 2 :]
    grown = np.median([u.memory_mb for u in after[-4:]]) - np.median([u.memory_mb for u in before])
    assert grown < growth_mb, [u.memory_mb for u in found]
    assert max(u.files for u in after) <= max(u.files for u in before) + 2
    assert max(u.threads for u in after) <= max(u.threads for u in before)
    seconds = [times[step] for step in sorted(times)]
    half = len(seconds) // 2
    # an eighth at each end: other work on the machine comes and goes
    early, late = seconds[half // 4 : half], seconds[half:]
    assert np.median(late) < 1.5 * np.median(early)


@pytest.mark.slow
def test_a_short_soak(folders: Any) -> None:
    check(*soak(folders, IN_CI, 10), growth_mb=20)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_fifty_thousand_steps(folders: Any) -> None:
    check(*soak(folders, STEPS, 500), growth_mb=20)
