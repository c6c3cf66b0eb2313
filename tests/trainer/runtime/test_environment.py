"""What a run was computed with is kept session by session, and runs of different code are told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from siftclip.errors import InputError
from siftclip.trainer.runtime.environment import (
    CODE,
    MACHINE,
    environment,
    environments,
    git_commit,
    keep_environment,
    mixed,
    source_digest,
)


def test_what_decides_about_results_is_there() -> None:
    now = environment(ranks=2, loader_workers=3, precision="32-true")
    assert set(CODE) | set(MACHINE) <= now.keys()
    assert now["torch"] == torch.__version__.split("+")[0]
    assert now["threads"] == torch.get_num_threads()
    assert now["cpu"]
    assert (now["ranks"], now["loader_workers"], now["precision"]) == (2, 3, "32-true")


def test_a_session_elsewhere_is_noted(tmp_path: Path) -> None:
    here = environment(ranks=1, loader_workers=0, precision="32-true")
    assert keep_environment(tmp_path, here, step=0) == []
    assert keep_environment(tmp_path, here, step=10) == []
    assert environments(tmp_path) == [here]
    there = {**here, "threads": 64, "cpu": "another"}
    told = keep_environment(tmp_path, there, step=20)
    assert told == [f"cpu another, before {here['cpu']}", f"threads 64, before {here['threads']}"]
    assert keep_environment(tmp_path, there, step=30) == []
    assert environments(tmp_path) == [here, there]
    keep_environment(tmp_path, there, step=0)  # the run begins anew
    assert environments(tmp_path) == [there]
    assert environments(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("versions.json", "[]"),
        ("sessions.jsonl", "{}\n"),
        ("sessions.jsonl", '{"environment": 1}\n'),
    ],
)
def test_damaged_records_are_one_line(tmp_path: Path, name: str, text: str) -> None:
    keep_environment(tmp_path, {"git": "a"}, step=0)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name} must "):
        environments(tmp_path)


@pytest.mark.parametrize("name", ["versions.json", "sessions.jsonl"])
@pytest.mark.parametrize("damage", ["half", "list", "folder", "pipe", "loop"])
def test_damaged_notes_of_sessions_end_no_run(name: str, damage: str, tmp_path: Path) -> None:
    keep_environment(tmp_path, {"git": "a"}, step=0)
    keep_environment(tmp_path, {"git": "b"}, step=5)
    path = tmp_path / name
    path.unlink()
    makers: dict[str, Callable[[], object]] = {
        "half": lambda: path.write_text('{"git": "a'),
        "list": lambda: path.write_text("[1]\n"),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name),
    }
    makers[damage]()
    keep_environment(tmp_path, {"git": "c"}, step=10)
    assert environments(tmp_path)[-1] == {"git": "c"}
    assert keep_environment(tmp_path, {"git": "c"}, step=20) == []


def test_runs_that_were_computed_differently_are_told_apart() -> None:
    here = environment(ranks=1, loader_workers=0, precision="32-true")
    old = {name: value for name, value in here.items() if name not in MACHINE}
    assert mixed({"a s0": [here], "a s1": [here, {**here, "loader_workers": 8}]}) == {}
    differing = mixed({"a s0": [here], "b s0": [here, {**here, "git": "x"}], "b s1": [old]})
    assert differing["git"] == {str(here["git"]): ["a s0", "b s0", "b s1"], "x": ["b s0"]}
    assert differing["cpu"] == {here["cpu"]: ["a s0", "b s0"], "not recorded": ["b s1"]}
    assert set(differing) == {"git", *MACHINE}


def test_the_commit_is_that_of_this_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    commit = ["git", "-C", str(tmp_path), *who, "commit", "-qm", "a", "--allow-empty"]
    subprocess.run(commit, check=True)
    installed = tmp_path / "site-packages" / "environment.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr("siftclip.trainer.runtime.environment.__file__", str(installed))
    assert git_commit() is None
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    assert git_commit() is not None


def test_edits_of_one_commit_are_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "trainer" / "runtime" / "environment.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr("siftclip.trainer.runtime.environment.__file__", str(file))
    digests = []
    for text in ("a = 1", "a = 2", "a = 2"):
        file.write_text(text)
        digests.append(source_digest.__wrapped__())
    assert digests[0] != digests[1] == digests[2]
    assert "source" in CODE
