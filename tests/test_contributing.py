"""CONTRIBUTING.md names files, targets of make and commands that are there and work."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
# What `make setup` makes
MADE = {".venv"}


def commands() -> list[str]:
    """The lines of the bash blocks that are commands."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def paths() -> list[str]:
    """Files and folders that the text names, `NAME` in place of any."""
    files = [word for word in CODE if re.fullmatch(r"[\w./-]*[\w-]+(/|\.\w+)|\.ci/run", word)]
    here = [word for word in files if "/" in word or re.search(r"\.(md|toml|txt)$", word)]
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    tests = [
        word.split("::")[0] for line in commands() for word in line.split() if "tests/" in word
    ]
    return sorted({*here, *links, *tests})


def targets() -> list[str]:
    """The targets of make that text and commands name."""
    named = [word for word in [*CODE, *commands()] if word.startswith("make ")]
    return sorted({shlex.split(line)[1] for line in named})


def headings(path: Path) -> set[str]:
    """The places in a page to which links lead."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def lines_that_begin_with(start: str) -> list[str]:
    """The commands that begin with a text, at least one."""
    found = [line for line in commands() if line.startswith(start)]
    assert found
    return found


def test_it_names_what_is_looked_for_here() -> None:
    assert {"trainer/", "constraints.txt", "configs/NAME.yaml", ".ci/run"} <= set(paths())
    assert len(paths()) >= 35
    assert {"setup", "test", "test-all", "lint", "docs", "record", "same-answers"} <= set(targets())
    starts = ("make ", "siftclip new ", ".venv/bin/python -m pytest ", ".venv/bin/pre-commit ")
    assert [line for line in commands() if not line.startswith(starts)] == []


@pytest.mark.parametrize("path", paths())
def test_files_and_folders_are_there(path: str) -> None:
    assert path in MADE or any(ROOT.glob(path.rstrip("/").replace("NAME", "*")))


@pytest.mark.parametrize("target", targets())
def test_make_knows_the_targets(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    dry = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=False)
    assert dry.returncode == 0, dry.stderr.decode()


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]*)#([^)]+)\)", TEXT)
    assert len(links) >= 4
    for file, place in links:
        assert place in headings(ROOT / (file or "CONTRIBUTING.md")), (file, place)


def test_public_names_and_groups_of_entry_points_are_there() -> None:
    groups = {"siftclip.selectors", "siftclip.losses", "siftclip.task_kinds"}
    dotted = {word for word in CODE if re.fullmatch(r"siftclip(\.\w+)+", word)}
    assert groups <= dotted
    assert {point.name for point in entry_points(group="siftclip.selectors")} >= {"clip_score"}
    assert len(dotted - groups) >= 6
    for word in dotted - groups:
        module, _, name = word.rpartition(".")
        assert hasattr(importlib.import_module(module), name), word


def test_commands_of_pytest_find_tests() -> None:
    lines = lines_that_begin_with(".venv/bin/python -m pytest ")
    words = [word for line in lines for word in line.split(" pytest ")[1].split()]
    places = [word for word in words if word.startswith("tests/")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *places, "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:]
    (keyword,) = set(words) - {*places, "-k"}
    for wanted in (*places, keyword):
        assert wanted in result.stdout, wanted


def test_commands_of_pre_commit_are_known(tmp_path: Path) -> None:
    lines = lines_that_begin_with(".venv/bin/pre-commit ")
    assert [line.split(maxsplit=1)[1] for line in lines] == ["install", "run --all-files"]
    shutil.copy(ROOT / ".pre-commit-config.yaml", tmp_path)
    for words in (["git", "init", "-q"], [sys.executable, "-m", "pre_commit", "install"]):
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    hook = (tmp_path / ".git" / "hooks" / "pre-commit").read_text(encoding="utf-8")
    assert "hook-type=pre-commit" in hook


def test_commands_that_write_packages_write_them(
    run_python: Callable[..., Any], tmp_path: Path
) -> None:
    for line in lines_that_begin_with("siftclip new "):
        program, *words = shlex.split(line)
        assert program == "siftclip"
        result = run_python("-m", "siftclip.trainer.cli", *words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / words[-1] / "pyproject.toml").is_file()
