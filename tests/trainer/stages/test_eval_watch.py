"""Checkpoints of a run are evaluated beside it, each once."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from tiny_runs import NARROW_TEXT

from siftclip.datamodules.models.load import load_clip_model
from siftclip.errors import InputError
from siftclip.eval.evaluate import evaluate_tasks
from siftclip.eval.results.files import read_results
from siftclip.eval.tasks.task import find_tasks
from siftclip.files import read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.stages import eval_watch
from siftclip.trainer.stages.eval_watch import watch_stage
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def finished(base_of: Any, composing: Any, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with an average of its weights and the checkpoints of steps 2, 4 and 6."""
    with composing() as compose:
        options = [*base_of(tmp_path_factory.mktemp("watched")), "optim.ema_decay=0.5"]
        kept = ["trainer.checkpoint_every_n_steps=2", "trainer.keep_every_n_steps=2"]
        return train_stage(compose("train", [*options, *kept]))


@pytest.fixture
def run(finished: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(path=Path(shutil.copytree(finished.path, tmp_path / "run")))


@pytest.fixture
def options(run: RunDir, demo_data: DemoData) -> list[str]:
    return [
        f"watch.run={run.path}",
        f"eval.root={demo_data.tasks}",
        "eval.tasks=[digit,colour]",
        "+eval.groups.both=[digit,colour]",
        "eval.resamples=20",
        "watch.interval_seconds=0.02",
        *("logger=csv", "progress=false", "trainer.accelerator=cpu", "data.num_workers=0"),
    ]


def test_the_command_says_where_the_results_are(
    cli: Callable[..., subprocess.CompletedProcess[str]], options: list[str], run: RunDir
) -> None:
    result = cli("eval", "watch", *options)
    assert result.returncode == 0, result.stderr
    for step in (2, 4, 6):
        assert f"step {step}\n" in result.stdout
    assert result.stdout.splitlines()[-1] == f"written    {run.path / 'eval_watch'}"


def test_each_checkpoint_is_evaluated_once(
    options: list[str], run: RunDir, compose: Compose, demo_data: DemoData
) -> None:
    config = compose("eval_watch", options)
    found = dict(watch_stage(config))
    assert list(found) == [2, 4, 6]
    log = {r["step"]: r for r in read_jsonl(run.path / "eval_watch" / "metrics.jsonl")}
    tasks = find_tasks(demo_data.tasks, ["digit", "colour"]).complete()
    for step, summary in found.items():
        clip = load_clip_model(
            "twin",
            architecture=to_plain(
                compose("train", ["model=vit_tiny", NARROW_TEXT, "pool.root=x"]).model.architecture
            ),
            pretrained=str(run.checkpoints / f"step-{step}.ckpt"),
        )
        expected = {r.key: r.metrics for r in evaluate_tasks(clip, tasks).results}
        assert {r.key: r.metrics for r in summary.results} == expected
        written = read_results(run.path / "eval_watch" / f"step-{step}.jsonl")
        assert {r.key: r.metrics for r in written} == expected
        mean = (expected["digit"]["acc1"] + expected["colour"]["acc1"]) / 2
        assert log[step]["eval/average/both"] == pytest.approx(mean)
    assert list(watch_stage(config)) == []


def test_raw_weights_are_others(options: list[str], compose: Compose) -> None:
    averaged = dict(watch_stage(compose("eval_watch", [*options, "watch.once=true"])))
    raw = dict(watch_stage(compose("eval_watch", [*options, "watch.weights=raw"])))
    assert averaged[2].results[0].model != raw[2].results[0].model


def test_an_interrupted_checkpoint_goes_on_with_its_next_task(
    options: list[str], run: RunDir, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose("eval_watch", [*options, "watch.once=true"])
    whole = dict(watch_stage(config))
    folder = run.path / "eval_watch"
    lines = (folder / "step-4.jsonl").read_text().splitlines()
    (folder / "step-4.jsonl").write_text(lines[0] + "\n" + lines[1][:30])
    again = dict(watch_stage(config))
    assert [result.metrics for result in again[4].results] == [
        result.metrics for result in whole[4].results
    ]
    first = [read_results(folder / "step-4.jsonl")[0].seconds, whole[4].results[0].seconds]
    assert first[0] == round(first[1], 3)  # the line that was whole is the old one


def test_more_tasks_are_added(options: list[str], compose: Compose) -> None:
    for step, summary in watch_stage(compose("eval_watch", options)):
        assert (step, len(summary.results)) in [(2, 2), (4, 2), (6, 2)]
    more = dict(watch_stage(compose("eval_watch", [*options, "eval.tasks=[digit,retrieval]"])))
    assert {step: [r.key for r in s.results] for step, s in more.items()} == {
        step: ["digit", "retrieval"] for step in (2, 4, 6)
    }


def test_it_waits_until_the_run_is_finished(
    options: list[str], run: RunDir, compose: Compose
) -> None:
    late, summary = run.checkpoints / "step-6.ckpt", run.path / "summary.json"
    away = [path.rename(run.path / f"{path.name}.away") for path in (late, summary)]
    found: list[int] = []
    config = compose("eval_watch", options)
    thread = threading.Thread(target=lambda: found.extend(step for step, _ in watch_stage(config)))
    thread.start()
    deadline = time.monotonic() + 60
    while found != [2, 4] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found == [2, 4]
    away[0].rename(late)  # as a whole, as the training does
    away[1].rename(summary)
    thread.join(60)
    assert not thread.is_alive()
    assert found == [2, 4, 6]


def test_a_checkpoint_that_is_removed_in_between(
    options: list[str],
    run: RunDir,
    compose: Compose,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = run.checkpoints / "step-4.ckpt"
    listed = eval_watch.checkpoints_in

    def list_and_remove(folder: Path) -> dict[int, Path]:
        found = listed(folder)
        gone.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(eval_watch, "checkpoints_in", list_and_remove)
    found = dict(watch_stage(compose("eval_watch", options)))
    assert list(found) == [2, 6]
    assert "step-4.ckpt was removed before" in caplog.text


def test_a_damaged_checkpoint_keeps_none_of_the_others_back(
    options: list[str], run: RunDir, compose: Compose
) -> None:
    damaged = run.checkpoints / "step-4.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    watched = watch_stage(compose("eval_watch", options))
    found = [next(watched)[0], next(watched)[0]]
    with pytest.raises(InputError, match=r"step-4\.ckpt does not hold the weights of this model"):
        next(watched)
    assert found == [2, 6]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("watch.run=nowhere", r"watch.run='nowhere' must be the directory of a run"),
        ("watch.interval_seconds=0", r"watch.interval_seconds must be above 0"),
        ("watch.weights=best", r"watch.weights must be one of"),
        ("eval.tasks=[nope]", r"eval.tasks must name tasks"),
    ],
)
def test_wrong_options(wrong: str, message: str, options: list[str], compose: Compose) -> None:
    with pytest.raises(InputError, match=message):
        list(watch_stage(compose("eval_watch", [*options, wrong])))


@pytest.mark.parametrize(
    "text", ["{}", "model: 3", "model: {precision: fp32}", "model: {name: '${oc.env:HOME}'}"]
)
def test_a_configuration_without_a_model(
    text: str, options: list[str], run: RunDir, compose: Compose
) -> None:
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml must hold the model of a run, with a name"):
        list(watch_stage(compose("eval_watch", options)))
