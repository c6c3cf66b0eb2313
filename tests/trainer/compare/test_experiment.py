"""Comparisons as experiments: what fails, what goes on, parts, processes, and what is kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pytest
from compared import planned, run_compare

from siftclip.errors import InputError
from siftclip.trainer.compare import workers
from siftclip.trainer.compare.plan import chosen_runs
from siftclip.trainer.compare.run_notes import RunNotes, read_notes
from siftclip.trainer.compare.workers import shares_of
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.launch import TrainingStopped
from siftclip.trainer.settings.lightning import TrainerSettings

Compose = Callable[..., Any]
HELPERS = Path(__file__).parents[2] / "helpers"
FAILING = "failing_callbacks.Failing"


@pytest.fixture
def options(base: list[str], demo_data: DemoData) -> list[str]:
    """A comparison of two arms with two seeds."""
    return [
        *base,
        f"eval.root={demo_data.tasks}",
        "eval.tasks=[digit,colour]",
        "+eval.groups.both=[digit,colour]",
        "compare.name=small",
        "compare.seeds=[0,1]",
    ]


def failing_arm(counter: Path, times: int) -> str:
    callback = f"+trainer.callbacks=[{{_target_:{FAILING},counter:{counter},times:{times}}}]"
    return f'+compare.arms.failing=["selector.fraction=0.5","{callback}"]'


def test_a_run_that_fails_loses_no_other(
    compose: Compose, options: list[str], tmp_path: Path
) -> None:
    missing = '+compare.arms.missing=["selector=external","selector.path=/no/such/file.npy"]'
    outcome = run_compare(
        compose, [*options, failing_arm(tmp_path / "count", 100), missing, "compare.seeds=[0]"]
    )
    assert outcome.comparison is not None
    assert [line.split(":")[0] for line in outcome.failed] == ["failing, seed 0", "missing, seed 0"]
    assert "RuntimeError: a callback that fails" in outcome.failed[0]
    assert "/no/such/file.npy" in outcome.failed[1]
    # tried twice, but not where the input is to blame
    assert (tmp_path / "count").stat().st_size == 2
    notes = {note.arm: note for note in read_notes(outcome.folder)}
    assert {arm: note.state for arm, note in notes.items()} == {
        "clip_score": "finished", "random": "finished", "failing": "failed", "missing": "failed",
    }  # fmt: skip
    assert "a callback that fails" in (outcome.folder / notes["failing"].log).read_text()
    assert notes["missing"].log == ""
    results = outcome.comparison.results
    assert results[results["arm"] == "random"]["value"].notna().all()
    assert results[results["arm"] == "failing"]["value"].isna().all()
    report = (outcome.folder / "report.md").read_text()
    assert "failing, seed 0: failed: RuntimeError" in report
    with pytest.raises(InputError, match="2 runs or tasks failed"):
        outcome.require_complete()


def test_a_run_that_fails_once_is_tried_again(
    compose: Compose, options: list[str], tmp_path: Path
) -> None:
    outcome = run_compare(
        compose, [*options, failing_arm(tmp_path / "count", 1), "compare.only=[failing/1]"]
    )
    assert outcome.failed == ()
    assert outcome.table == "1 of 6 runs of the comparison are done."
    assert not (outcome.folder / "report.md").exists()


def test_all_that_fails(compose: Compose, options: list[str]) -> None:
    broken = ["selector=external", "selector.path=/no/such/file.npy"]
    arms = f"compare.arms={{a:{json.dumps(broken)},b:{json.dumps(broken)}}}"
    with pytest.raises(InputError, match=r"none of 4 runs is finished\. a, seed 0: .*no/such"):
        run_compare(compose, [*options, "~compare.arms", f"+{arms}"])


def test_the_other_group_of_the_baseline(compose: Compose, options: list[str]) -> None:
    outcome = run_compare(compose, [*options, "compare.aa=true", "compare.baseline=clip_score"])
    found = outcome.comparison
    assert found is not None
    assert dict(found.seeds) == {
        "random": (0, 1), "clip_score": (0, 1), "clip_score_again": (2, 3),
    }  # fmt: skip
    assert (found.baseline, found.again) == ("clip_score", "clip_score_again")
    assert "A/A: clip_score_again is clip_score with other seeds." in outcome.table
    runs = found.runs[found.runs["arm"] == "clip_score_again"]
    assert sorted(runs["seed"]) == [2, 3]
    with pytest.raises(InputError, match=r"compare\.baseline must be one of .* Got 'no'"):
        run_compare(compose, [*options, "compare.baseline=no"])


def test_every_number_of_the_tests_follows_from_the_files(
    compose: Compose, options: list[str]
) -> None:
    """A script that knows nothing of us computes the same from results.csv and differences.csv."""
    from scipy.stats import t

    outcome = run_compare(compose, options)
    results = pd.read_csv(outcome.folder / "results.csv")
    found = pd.read_csv(outcome.folder / "differences.csv")
    main = results[results["metric"] == "main_metric"]
    assert set(found["column"]) == set(main["task"]) == {"digit", "colour", "average/both"}
    assert main[["low", "high", "chance"]].notna().all(axis=None)
    for column, rows in found.groupby("column"):
        values = main[main["task"] == column].groupby("arm")["value"]
        pooled = values.var(ddof=1).mean()
        (row,) = rows[rows["arm"] != rows["baseline"]].to_dict("records")
        mean = values.mean()
        assert row["difference"] == pytest.approx(mean[row["arm"]] - mean[row["baseline"]])
        if pooled:
            assert row["seed_variance"] == pytest.approx(pooled)
        variance = row["seed_variance"] * (1 / 2 + 1 / 2) + row["image_variance"]
        statistic = abs(row["difference"]) / variance**0.5
        # of two arms, Dunnett's test is a t test
        assert row["p_value"] == pytest.approx(2 * t.sf(statistic, row["freedom"]), abs=1e-3)
        assert row["least"] == pytest.approx(t.isf(0.025, row["freedom"]) * variance**0.5, rel=1e-2)
        assert row["high"] - row["low"] == pytest.approx(2 * row["least"])


def test_another_comparison_does_not_replace_a_report(
    compose: Compose, options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed = "compare.seeds=[0]"
    first = run_compare(compose, [*options, seed])
    report = (first.folder / "report.md").read_text()
    more = run_compare(compose, [*options, seed, '+compare.arms.half=["selector.fraction=0.5"]'])
    assert more.comparison is not None
    assert "holds another comparison" not in caplog.text  # it has all of the first one
    assert [path.name for path in first.folder.parent.iterdir()] == ["small"]
    run_compare(compose, [*options, seed, "optim.lr=0.01"])
    assert "holds another comparison of this name" in caplog.text
    (aside,) = first.folder.parent.glob("small.replaced-*")
    assert "half" in (aside / "report.md").read_text()
    assert (first.folder / "report.md").read_text() != report


def test_parts_and_names_of_runs(compose: Compose, options: list[str]) -> None:
    plan = planned(compose, options)
    names = [run.name for run in plan.runs]
    assert names == ["random/0", "clip_score/0", "random/1", "clip_score/1"]
    parts = [chosen_runs(plan, only=(), part=f"{number}/3") for number in (1, 2, 3)]
    assert sorted(run.name for part in parts for run in part) == sorted(names)
    assert [run.name for run in chosen_runs(plan, only=("random",), part=None)] == names[::2]
    for part in ("0/3", "4/3", "x", "1/0", "1"):
        with pytest.raises(InputError, match=r"compare\.part must be i/n"):
            chosen_runs(plan, only=(), part=part)
    with pytest.raises(InputError, match=r"compare\.only must name .* Got 'random/7'"):
        chosen_runs(plan, only=("random/7",), part=None)


def test_the_last_part_writes_the_report(compose: Compose, options: list[str]) -> None:
    first = run_compare(compose, [*options, "compare.part=2/2"])
    assert first.table == "2 of 4 runs of the comparison are done."
    assert not (first.folder / "report.md").exists()
    last = run_compare(compose, [*options, "compare.part=1/2"])
    assert last.comparison is not None
    assert (last.folder / "report.md").exists()


def test_shares_of_a_machine() -> None:
    trainer = TrainerSettings(devices=1)
    shares = shares_of(2, trainer, [0, 1, 2, 5, 6], [])
    assert [sorted(share.cores) for share in shares] == [[0, 1], [2, 5, 6]]
    on_gpus = shares_of(2, TrainerSettings(), range(4), ["a", "b", "c", "d", "e"])
    assert [(share.gpus, share.processes) for share in on_gpus] == [
        (("a", "b"), 2), (("c", "d"), 2),
    ]  # fmt: skip
    with pytest.raises(InputError, match="2 runs of 3 GPUs each need 6, and there are 4"):
        shares_of(2, TrainerSettings(devices=3), range(4), list("abcd"))
    with pytest.raises(InputError, match=r"at most the number of cores, 1\. Got 2"):
        shares_of(2, trainer, [3], [])


def test_processes_need_a_command(compose: Compose, options: list[str]) -> None:
    with pytest.raises(InputError, match=r"compare\.parallel is for siftclip compare alone"):
        run_compare(compose, [*options, "compare.parallel=2"])


def _failing_words(options: list[str], tmp_path: Path, times: int, *, kill: bool) -> list[str]:
    callback = (
        f"trainer.callbacks=[{{_target_:{FAILING},counter:{tmp_path / 'count'},times:{times},"
        f"kill:{str(kill).lower()}}}]"
    )
    arm = f'+compare.arms.failing=["selector.fraction=0.5","{callback}"]'
    return [
        "compare",
        *options,
        "compare.seeds=[0]",
        arm,
        "~compare.arms.random",
        "compare.parallel=2",
    ]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_processes_train_at_once_and_a_killed_one_is_tried_again(
    options: list[str],
    tmp_path: Path,
    typed: Callable[..., Any],
    start_python: Callable[..., Any],
    child_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With processes that are forked; the next test starts them as a comparison does."""
    started: list[Any] = []
    child_environment["PYTHONPATH"] = str(HELPERS)

    def fork(command: Sequence[str], environment: Any, output: IO[bytes]) -> Any:
        folder = tmp_path / f"printed{len(started)}"
        folder.mkdir()
        (folder / "stderr").symlink_to(output.name)
        started.append(start_python(*command[1:], cwd=tmp_path, folder=folder))
        return started[-1]

    monkeypatch.setattr(workers, "_open", fork)
    done = typed(*_failing_words(options, tmp_path, 1, kill=True))
    assert len(started) == 3
    assert done.returncode == 0, done.stderr
    assert "failing/0 failed and is tried again" in done.stderr
    folder = tmp_path / "outputs" / "compare" / "small"
    assert {note.state for note in read_notes(folder)} == {"finished"}
    assert len(list((folder / "logs").glob("*.log"))) == 2
    results = pd.read_csv(folder / "results.csv")
    assert results["value"].notna().all()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_stopped_comparison_stops_its_processes_and_goes_on(
    options: list[str], start_cli: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["compare", *options, "compare.seeds=[0]", "compare.parallel=2",
             "scale.samples_seen=16000", "trainer.checkpoint_every_n_steps=5"]  # fmt: skip
    process = start_cli(*words)
    folder = tmp_path / "outputs" / "compare" / "small"
    runs = tmp_path / "outputs" / "train"
    deadline = time.monotonic() + 200
    while len({path.parts[-3] for path in runs.glob("*/checkpoints/step-*.ckpt")}) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    status = process.wait(120)
    errors = (tmp_path.with_suffix(".printed") / "stderr").read_text()
    assert status == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM with all runs at a checkpoint" in errors
    assert not list(runs.glob("*/summary.json"))
    assert {note.state for note in read_notes(folder)} == {"running"}
    stops = [path.read_text() for path in (folder / "logs").glob("*.log")]
    assert all("stopped by SIGTERM at step" in text for text in stops), stops


def test_a_stop_says_which_run_it_was(
    compose: Compose, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*args: Any, **kwargs: Any) -> None:
        raise TrainingStopped(signal.SIGINT, place="at step 3 of 9")

    monkeypatch.setattr("siftclip.trainer.compare.running.train_stage", stopping)
    with pytest.raises(TrainingStopped, match=r"by SIGINT at step 3 of 9 of random/0; the same"):
        run_compare(compose, options)


def test_a_damaged_note_is_told(compose: Compose, options: list[str], tmp_path: Path) -> None:
    outcome = run_compare(compose, [*options, "compare.seeds=[0]"])
    notes = RunNotes(folder=outcome.folder)
    path = next((outcome.folder / "runs").iterdir())
    path.write_text('{"arm": 3}')
    with pytest.raises(InputError, match=rf"{path.name}: arm must be a text.*Delete it"):
        read_notes(notes.folder)
    shutil.rmtree(outcome.folder / "runs")
    with pytest.raises(InputError, match="is not the folder of a comparison"):
        read_notes(notes.folder)


READY = ("datacomp_filtering", "fraction_sweep", "budget_sweep", "selector_loss", "loop_flops")


@pytest.mark.parametrize("name", [*READY, "loop_seconds"])
def test_ready_experiments_can_be_planned(
    name: str, compose: Compose, base: list[str], demo_data: DemoData
) -> None:
    """Every arm with every seed is a valid configuration, at one budget."""
    kept = [word for word in base if word.startswith(("pool.", "features.", "output_dir"))]
    words = [f"experiment={name}", *kept, f"eval.root={demo_data.tasks}", "compare.seeds=[0]"]
    plan = planned(compose, words)
    assert len(plan.runs) == len(plan.arms) >= 4
    assert plan.baseline in plan.arms


@pytest.mark.slow
def test_budgets_are_swept_by_a_comparison_each(
    cli: Callable[..., Any], base: list[str], demo_data: DemoData, tmp_path: Path
) -> None:
    words = ["experiment=budget_sweep", "scale.samples_seen=32,64", "compare.seeds=[0]"]
    tasks = [f"eval.root={demo_data.tasks}", "eval.tasks=[digit]"]
    kept = [word for word in base if not word.startswith(("scale.samples", "experiment"))]
    result = cli("compare", "--multirun", *words, *kept, *tasks)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {path.parent.name for path in (tmp_path / "outputs/compare").glob("*/report.html")}
    assert found == {"budget_32", "budget_64"}
