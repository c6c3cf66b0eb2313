"""A command whose disk fills says so in a line, and finishes with room as if nothing had been."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_off import WORKS, answers, leftovers

TIMES = {"train": 2, "embed": 1, "compare": 1, "data compact": 1}  # in CI; other commands nightly
NIGHTLY_TIMES = 2  # of each command: 24 in all
ROOM_BYTES = 64 << 20  # beside what a command writes


def _can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`mount(bytes)`: a disk of this size; `mount` again with another size makes it larger."""
    if not _can_mount():
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()

    def mounted(size_bytes: int) -> Path:
        again = ["-o", f"remount,size={size_bytes}"] if os.path.ismount(disk) else []
        words = again or ["-t", "tmpfs", "-o", f"size={size_bytes}"]
        done = subprocess.run(["mount", *words, "tmpfs", str(disk)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return disk

    yield mounted
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_at_random(folders: Any, mount: Callable[[int], Path], name: str, seed: int) -> None:
    """Give a command a disk that is full after a random part of what it writes; then room."""
    work, whole = WORKS[name], folders.whole(name)
    free_bytes = random.Random(f"{name} {seed}").randrange(whole.size_bytes)
    disk = mount(1 << 30)
    folder = folders.make(work, disk)
    used_bytes = shutil.disk_usage(disk).used
    mount(used_bytes + free_bytes)
    result = folders.run(folder, work)
    if result.returncode == 0:  # what it deletes on its way made room enough
        assert answers(folder, work) == whole.answers
        return
    assert result.returncode == 2, result.stderr[-4000:]
    assert "Traceback" not in result.stderr, result.stderr[-4000:]
    last = [line for line in result.stderr.splitlines() if line.strip()][-1]
    assert re.search("No space left on device|its disk has", last), result.stderr[-4000:]
    mount(used_bytes + 2 * whole.size_bytes + ROOM_BYTES)
    folders.finish(folder, work)
    assert answers(folder, work) == whole.answers
    assert not list(leftovers(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name, times in TIMES.items() for seed in range(times)]
)
def test_a_full_disk(name: str, seed: int, folders: Any, mount: Callable[[int], Path]) -> None:
    fill_at_random(folders, mount, name, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10, 10 + NIGHTLY_TIMES))
@pytest.mark.parametrize("name", WORKS)
def test_a_full_disk_of_every_command(
    name: str, seed: int, folders: Any, mount: Callable[[int], Path]
) -> None:
    fill_at_random(folders, mount, name, seed)
