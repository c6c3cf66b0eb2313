"""A YAML of the user's own that cannot be loaded is named in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from siftclip.trainer.cli.main import main

BROKEN = {
    "open list": (b"a: [", "expected the node content"),
    "not UTF-8": (b"a: \xff", "codec can't decode"),
    "name twice": (b"name: x\nname: y\n", "duplicate key name"),
    "object of Python": (b"a: !!python/object/apply:os.system [true]", "could not determine"),
    "deep": (b"[" * 20_000, "nested too deeply"),
    "number": (b"3\n", "Invalid loaded object type"),
    "tab": (b"\ta: b\n", "cannot start any token"),
}


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], str]:
    """`refused()`: what a command says that is given `selector/mine.yaml` of the test's folder."""
    (tmp_path / "selector").mkdir()

    def command() -> str:
        words = ["select", "--config-dir", str(tmp_path), "selector=mine", "pool.root=x"]
        monkeypatch.setattr("sys.argv", ["siftclip", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return command


@pytest.mark.parametrize("name", BROKEN)
def test_broken_yaml(name: str, tmp_path: Path, refused: Callable[[], str]) -> None:
    content, reason = BROKEN[name]
    path = tmp_path / "selector" / "mine.yaml"
    path.write_bytes(content)
    said = refused()
    assert f"siftclip select: error: {path} is not a configuration in YAML: " in said
    assert reason in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("defaults: 3\n", "defaults must be a list (got int)."),
        ("defaults: [mine]\na: 1\n", "selector/mine: its defaults lead back to itself."),
    ],
)
def test_broken_defaults(
    content: str, reason: str, tmp_path: Path, refused: Callable[[], str]
) -> None:
    (tmp_path / "selector" / "mine.yaml").write_text(content)
    said = refused()
    assert reason in said
    assert said.count("\n") == 1


def test_a_pipe_in_the_place_of_a_yaml_is_no_configuration(
    tmp_path: Path, refused: Callable[[], str]
) -> None:
    os.mkfifo(tmp_path / "selector" / "mine.yaml")
    assert "selector=mine: there is no such configuration" in refused()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("# @package _global_\n3: 5\n", "3 is not an option. The configuration has"),
        ("# @package _global_\npool: {true: 5}\n", "pool.True is not an option"),
        ("seed: 1\n", "experiment is a group of files, each of which begins with the line '# @pa"),
        ("# @package _global_\npool: null\n", "something else in the place of pool."),
    ],
)
def test_an_experiment_that_fits_nothing(
    content: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(content)
    words = ["index", "--config-dir", str(tmp_path), "experiment=mine", "pool.root=x"]
    monkeypatch.setattr("sys.argv", ["siftclip", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
