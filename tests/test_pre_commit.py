"""What runs before a commit is what `make lint` and CI run, with the same versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
BIN = ".venv/bin/"


def hooks() -> list[dict[str, Any]]:
    """The hooks of the pre-commit configuration."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "local"  # nothing to download, no second version of a tool
    found: list[dict[str, Any]] = repository["hooks"]
    return found


def linters() -> list[str]:
    """The commands of `make lint`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    return [line.strip() for line in recipe.splitlines()]


def tools(commands: list[str]) -> list[str]:
    """Commands without the options by which one checks what the other mends."""
    return [re.sub(r" (--check|--force-exclude|\.)(?= |$)", "", command) for command in commands]


def test_hooks_are_the_tools_of_make_lint() -> None:
    assert tools([hook["entry"] for hook in hooks()]) == tools(linters())
    assert len(linters()) >= 5


def test_hooks_run_in_the_environment_of_the_project() -> None:
    for hook in hooks():
        assert hook["language"] == "system", hook["id"]
        assert hook["entry"].startswith(BIN), hook["id"]
        assert hook["name"] == hook["entry"].split(" --")[0].removeprefix(BIN)


def test_ci_runs_make_lint() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "make lint" in commands


def test_their_packages_are_installed_for_developers_in_pinned_versions() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (developers,) = re.findall(r"^dev = \[\n(.*?)^\]", pyproject, flags=re.DOTALL | re.MULTILINE)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for package in ("ruff", "mypy", "import-linter", "codespell", "pre-commit"):
        assert re.search(rf'^ *"{package}(\[.*\])?>=', developers, flags=re.MULTILINE), package
        assert re.search(rf"^{package}==", pins, flags=re.MULTILINE), package
