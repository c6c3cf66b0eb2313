"""`siftclip runs` as a person types it: what it shows, what it asks, what it leaves."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.errors import InputError
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.cli.confirmation import confirmed
from siftclip.trainer.stages.train import train_stage

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(base: list[str], composing: Callable[..., Any]) -> Path:
    """A finished run, in `outputs` of the test's own folder."""
    with composing() as compose:
        words = ["selector=random", "selector.fraction=0.5", "trainer.checkpoint_every_n_steps=3"]
        return Path(train_stage(compose("train", [*base, *words])).path)


def test_a_run_from_its_list_to_its_end(run: Path, typed: Cli) -> None:
    listed = typed("runs", "list").stdout
    lines = listed.splitlines()
    assert lines[0].split() == ["name", "size", "written", "state", "uses", "made", "by"]
    assert lines[1].startswith("runs: 1, ")
    assert lines[2].split()[0] == run.name
    assert "finished" in lines[2]
    assert "random, vit_tiny, 96 samples" in lines[2]
    assert "runs: 1" not in typed("runs", "list", "scores").stdout
    shown = typed("runs", "show", run.name).stdout
    assert f"run        {run.resolve()}" in shown
    assert "refers to  selections/random-" in shown
    assert "MB  checkpoints/" in shown
    kept = typed("runs", "gc")
    assert kept.returncode == 0
    assert "checkpoints   1      2" in kept.stdout
    assert "A longer budget is another run" in " ".join(kept.stdout.split())
    refused = typed("runs", "gc", "checkpoints")
    assert refused.returncode == 2
    assert "Nothing was removed: there is no terminal to ask on. runs.yes=true" in refused.stderr
    assert len(list(run.glob("checkpoints/*"))) == 2
    freed = typed("runs", "gc", "checkpoints", "runs.yes=true")
    assert freed.returncode == 0, freed.stderr
    assert f"removed    train/{run.name}: " in freed.stdout
    assert not list(run.glob("checkpoints/*"))
    assert "nothing of these kinds can go" in typed("runs", "gc", "checkpoints").stdout
    (run / "notes.txt").write_text("mine")
    (selection,) = (run.parents[1] / "selections").iterdir()
    needed = typed("runs", "rm", f"selections/{selection.name}", "runs.yes=true")
    assert needed.returncode == 2
    assert f"is referred to: train/{run.name} (trained on it). runs_rm.force=true" in needed.stderr
    both = f"runs_rm.run=[{run.name},selections/{selection.name}]"
    removed = typed("runs", "rm", both, "runs.yes=true")
    assert removed.returncode == 0, removed.stderr
    assert "in 12 files; left: notes.txt" in removed.stdout
    assert not selection.exists()
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert "other      train: 1 file, 4 B; never removed" in typed("runs", "list").stdout


def test_what_is_held_or_wrong_is_one_message(run: Path, typed: Cli) -> None:
    def fault(*words: str) -> str:
        result = typed("runs", *words)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        return result.stderr

    with locked(run / LOCK_NAME, owner="it"):
        assert "is being written by process" in fault("rm", str(run), "runs_rm.force=true")
        assert "being written" in typed("runs", "list").stdout
    assert "runs_gc.kinds must be some of" in fault("gc", "checkpoint")
    assert "Did you mean 'checkpoints'?" in fault("gc", "checkpoint")
    assert "runs_list.kinds must be some of" in fault("list", "run")
    assert "runs_rm.run must name a run" in fault("rm")
    assert "siftclip runs list shows what there is" in fault("rm", "nothing")
    assert "must be a folder that commands have written into" in fault("gc", "output_dir=nowhere")
    (run / "config.yaml").write_text("a: [")
    assert "is not known: " in fault("rm", run.name)
    assert "unreadable " in typed("runs", "list").stdout
    assert run.exists()


def test_names_of_strangers_cannot_steer_a_terminal(run: Path, typed: Cli) -> None:
    (run / "\x1b[2Jx").write_text("mine")
    (run.parents[1] / "\x1b]0;title\x07").write_text("mine")
    for words in (["list"], ["show", run.name], ["gc"]):
        printed = typed("runs", *words).stdout
        assert "\x1b" not in printed
        assert "\x07" not in printed
    assert r"\x1b[2Jx" in typed("runs", "list").stdout


# ---- asking -------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False), ("yet\n", False)],
)
def test_answers(
    answer: str, is_yes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    assert confirmed("Remove it", yes=False, option="runs.yes") is is_yes
    assert output.getvalue() == "Remove it? [y/N] "


def test_nobody_is_asked_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(InputError, match=r"runs\.yes=true removes it"):
        confirmed("Remove it", yes=False, option="runs.yes")
    assert confirmed("Remove it", yes=True, option="runs.yes")


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_real_terminal_is_asked(
    answer: str, run: Path, at_terminal: Callable[..., tuple[int, str]]
) -> None:
    was_there: list[bool] = []
    status, text = at_terminal(
        *("runs", "rm", run.name), answer=answer, before=lambda: was_there.append(run.exists())
    )
    assert (status, was_there) == (0, [True]), text
    assert run.exists() is (answer == "n")
