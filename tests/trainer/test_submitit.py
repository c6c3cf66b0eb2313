"""Sweeps through submitit, whose local jobs are the same processes that it would queue in Slurm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra

from siftclip.trainer.cli.application import application
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.settings.commands import DemoCommand

pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher", reason="needs the extra: pip install siftclip[slurm]"
)

# Jobs get their function pickled by value, as that of a script; this file they cannot import.
STAGE = """
import os, signal, sys, types
from pathlib import Path

# The real one imports all of Lightning, which takes longer than everything else here.
sys.modules["siftclip.trainer.runtime.run_dir"] = types.SimpleNamespace(is_rank_zero=lambda: True)

from siftclip.errors import InputError
from siftclip.trainer.runtime.launch import TrainingStopped


def stage(settings):
    task = os.environ["SUBMITIT_LOCAL_GLOBALID"]
    seed = settings.common.seed
    record = Path(settings.common.output_dir) / f"seed-{seed}-task-{task}"
    again = record.exists()
    with record.open("a") as file:
        file.write(" ".join(sys.argv[1:3]) + "\\n")
    if seed == 1:
        raise InputError("pool.root is wrong.")
    if seed == 2 and not again:
        raise TrainingStopped(signal.SIGUSR2, place="at step 3 of 9")
"""


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """`main(*overrides)`: a sweep of a small command, run to its end."""

    def run(*overrides: str) -> None:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        monkeypatch.setitem(sys.modules, "siftclip.trainer.runtime.run_dir", sys)  # until the end
        exec(STAGE, namespace)  # noqa: S102 - the text above
        launcher = ["hydra/launcher=submitit_local", f"output_dir={tmp_path}"]
        arguments = ["siftclip", "select", "--multirun", *launcher, *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.chdir(tmp_path)
        GlobalHydra.instance().clear()
        application("select", DemoCommand)(namespace["stage"])()

    return run


@pytest.mark.slow
def test_tasks_run_the_command_and_a_stopped_job_runs_again(
    main: Callable[..., None], tmp_path: Path
) -> None:
    once = "select --multirun\n"
    main("seed=0", "hydra.launcher.tasks_per_node=2")
    main("seed=2")
    found = {path.name: path.read_text() for path in tmp_path.glob("seed-*")}
    assert found == {
        "seed-0-task-0": once,
        "seed-0-task-1": once,
        "seed-2-task-0": once * 2,  # queued again by submitit's handler
    }


def test_a_fault_of_the_user_reaches_the_waiting_command_as_one_message(
    main: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main("seed=1")
    assert caught.value.code == 1  # Hydra's
    errors = capfd.readouterr().err
    assert "siftclip select: error: pool.root is wrong.\n" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_parts_of_a_comparison_are_jobs(
    cli: Callable[..., Any], base: list[str], demo_data: DemoData, tmp_path: Path
) -> None:
    """As an array of Slurm would run it: the part that finishes last writes the report."""
    tasks = [
        f"eval.root={demo_data.tasks}",
        "eval.tasks=[digit]",
        "compare.seeds=[0]",
        "compare.name=jobs",
    ]
    jobs = ["--multirun", "compare.part=1/2,2/2", "hydra/launcher=submitit_local"]
    result = cli("compare", *base, *tasks, *jobs)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "outputs" / "compare" / "jobs"
    assert len(list((tmp_path / "outputs" / "train").iterdir())) == 2
    results = pd.read_csv(folder / "results.csv")
    assert set(results["arm"]) == {"random", "clip_score"}
    assert results["value"].notna().all()
    assert (folder / "report.html").exists()
    again = cli("compare", *base, *tasks)  # of all, here: nothing is left to train
    assert again.returncode == 0, again.stderr
    assert "replaced" not in again.stderr
    assert len(list((tmp_path / "outputs" / "train").iterdir())) == 2
