"""`make` installs once, also when two of them start at the same time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# It answers what the Makefile asks of Python, and installs by waiting.
PYTHON = """#!/bin/sh
case "$*" in
    --version) echo Python 3.12.1 ;;
    "-m venv --clear .venv")
        echo made >>venvs; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip install"*)
        echo begun >>installs; while [ ! -e go ]; do sleep 0.05; done; test -x .venv/bin/python ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that `make setup` reads, with a Python that only says what it is asked for."""
    if not (shutil.which("make") and shutil.which("flock")):
        pytest.skip("needs make and flock")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def start(clone: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.Popen(
        ["make", "setup", "PYTHON=./python"],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path) -> None:
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} does not come")


def test_a_second_make_waits_for_the_first_and_installs_nothing(clone: Path) -> None:
    first = start(clone)
    wait_for(clone / "installs")
    second = start(clone)
    time.sleep(0.5)
    assert second.poll() is None
    (clone / "go").touch()
    said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "Waiting for another make" in said[1]
    assert (clone / "venvs").read_text() == "made\n"
    assert (clone / "installs").read_text() == "begun\n"


def test_a_make_after_one_that_was_killed_installs_anew(clone: Path) -> None:
    first = start(clone)
    wait_for(clone / "installs")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    (clone / "go").touch()
    second = start(clone)
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 0, said
    assert (clone / "venvs").read_text() == "made\n" * 2
    third = start(clone)
    assert "Installing" not in third.communicate(timeout=60)[0]


def test_changed_requirements_are_installed_into_the_same_environment(clone: Path) -> None:
    (clone / "go").touch()
    start(clone).communicate(timeout=60)
    later = time.time() + 5
    os.utime(clone / "pyproject.toml", (later, later))
    start(clone).communicate(timeout=60)
    assert (clone / "venvs").read_text() == "made\n"
    assert (clone / "installs").read_text() == "begun\n" * 2
