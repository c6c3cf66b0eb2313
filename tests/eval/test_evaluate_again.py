"""What is evaluated again, and what is taken from a results file."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.eval.evaluate import EvalOptions, evaluate_tasks
from siftclip.eval.results.files import TaskResult, read_results
from siftclip.eval.tasks.kinds.values import Task, TaskSamples
from siftclip.eval.tasks.preparation import prepare_tasks
from siftclip.eval.tasks.task import find_tasks

ChangedWeights = Callable[[], AbstractContextManager[None]]
OPTIONS = EvalOptions(progress=False, resamples=0)


def run(
    clip: ClipModel,
    tasks: Sequence[Task],
    *,
    results_path: Path,
    again: Sequence[str] = (),
    resamples: int = 0,
) -> list[TaskResult]:
    options = replace(OPTIONS, resamples=resamples)
    found = evaluate_tasks(clip, tasks, options=options, results_path=results_path, again=again)
    assert found.failures == ()
    return [*found.results]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tasks that are really run from here on."""
    from siftclip.eval import evaluate as module

    names: list[str] = []
    original = module.score_task

    def spy(samples: TaskSamples, *arguments: Any) -> Any:
        names.append(samples.task.name)
        return original(samples, *arguments)

    monkeypatch.setattr(module, "score_task", spy)
    return names


def test_resume_runs_only_what_is_missing(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, evaluated: list[str]
) -> None:
    path = tmp_path / "eval_results.jsonl"
    first = run(clip, tasks[1:3], results_path=path, resamples=10)
    assert evaluated == ["cues", "few"]
    with path.open("a") as file:
        file.write('{"key": "things", "da')  # killed in the middle of a line
    results = run(clip, tasks, results_path=path, resamples=10)
    assert sorted(evaluated) == ["captions", "cues", "few", "many_labels", "pairs", "things"]
    assert [result.key for result in results] == [task.name for task in tasks]
    assert [replace(r, seconds=0) for r in results[1:3]] == [replace(r, seconds=0) for r in first]
    for again, before in zip(results[1:3], first, strict=True):
        assert again.outcomes is not None
        assert before.outcomes is not None
        assert before.units is not None
        np.testing.assert_array_equal(
            again.outcomes.arrays["value"], before.outcomes.arrays["value"]
        )
        assert again.units is not None
        assert again.units.tolist() == before.units.tolist()
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert keys[:2] == ["cues", "few"]
    assert sorted(keys) == sorted(evaluated)
    run(clip, tasks, results_path=path, again=["few"])
    assert evaluated[6:] == ["few"]
    assert len(read_results(path)) == 6


def test_results_of_a_task_that_has_changed_are_not_taken(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, evaluated: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Other templates, samples or metrics under the same name."""
    path = tmp_path / "r.jsonl"
    few, things = (task for task in tasks if task.name in ("few", "things"))
    run(clip, [few, things], results_path=path)
    with caplog.at_level(logging.WARNING):
        run(clip, [replace(few, templates=("one {c}",)), things], results_path=path)
    assert evaluated == ["few", "things", "few"]
    assert "tasks that have changed are removed: few" in caplog.text
    part = prepare_tasks([things], max_samples=5)
    (result,) = evaluate_tasks(clip, part, options=OPTIONS, results_path=path).results
    assert result.samples == 5
    (result,) = run(clip, [things], results_path=path)
    assert result.samples == 14
    (result,) = run(clip, [replace(things, main_metric="mean_per_class_recall")], results_path=path)
    assert result.main_metric_name == "mean_per_class_recall"
    assert sorted(result.key for result in read_results(path)) == ["few", "things"]


def test_results_of_tars_that_were_replaced_are_not_taken(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, evaluated: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Other images of equal sizes under the same keys."""
    path = tmp_path / "r.jsonl"
    few, things = (task for task in tasks if task.name in ("few", "things"))
    copies = []
    for number, shard in enumerate(things.shards):
        copies.append(tmp_path / f"{number}.tar")
        shutil.copy(shard, copies[-1])
    things = replace(things, shards=tuple(copies))
    run(clip, [few, things], results_path=path)
    (kept,) = run(clip, [things], results_path=path)
    assert evaluated == ["few", "things"]
    status = copies[0].stat()
    os.utime(copies[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with caplog.at_level(logging.WARNING):
        run(clip, [few, things], results_path=path)
    assert evaluated == ["few", "things", "things"]
    assert "evaluated again: things" in caplog.text
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # as an earlier version wrote them
        del line["tars"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(clip, [things], results_path=path)[0].metrics == kept.metrics
    assert evaluated[3:] == ["things"]
    assert sorted(result.key for result in read_results(path)) == ["few", "things"]


def test_a_result_that_is_nan_is_not_kept(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, evaluated: list[str]
) -> None:
    path = tmp_path / "r.jsonl"
    few, things = (task for task in tasks if task.name in ("few", "things"))
    before = run(clip, [few, things], results_path=path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["metrics"]["main_metric"] = math.nan
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run(clip, [few, things], results_path=path)[1].main_metric == before[1].main_metric
    assert evaluated == ["few", "things", "things"]


def test_only_results_that_are_asked_for_count_as_reused(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "r.jsonl"
    few, things = (task for task in tasks if task.name in ("few", "things"))
    run(clip, [few], results_path=path)
    run(clip, [few, things], results_path=path)
    assert "reused the results of 1 of 2 tasks" in caplog.text
    caplog.clear()
    broken = replace(few, name="broken", shards=(tmp_path / "gone.tar",))
    evaluate_tasks(clip, [broken], options=OPTIONS, results_path=path)
    assert "reused" not in caplog.text
    assert [result.key for result in read_results(path)] == ["few", "things"]


def test_a_finished_task_is_on_disk_when_the_run_dies(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from siftclip.eval import evaluate as module

    path = tmp_path / "eval_results.jsonl"
    original = module.score_task
    seen: list[str] = []

    def die(samples: TaskSamples, *arguments: Any) -> Any:
        seen.append(samples.task.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(samples, *arguments)

    monkeypatch.setattr(module, "score_task", die)
    with pytest.raises(KeyboardInterrupt):
        run(clip, tasks, results_path=path)
    assert [result.key for result in read_results(path)] == seen[:2]


def test_another_model_is_evaluated_anew(
    task_root: Path, clip: ClipModel, changed_weights: ChangedWeights, tmp_path: Path,
    evaluated: list[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "eval_results.jsonl"
    chosen = find_tasks(task_root, ["few", "things"]).complete()
    (old, _) = run(clip, chosen, results_path=path)
    with changed_weights(), caplog.at_level(logging.WARNING):
        (new,) = run(clip, chosen[:1], results_path=path)
    assert evaluated == ["few", "things", "few"]
    assert "2 results of another model are removed" in caplog.text
    assert new.model != old.model
    assert [result.model for result in read_results(path)] == [new.model]


def test_a_file_of_another_tool_is_left_alone(
    tasks: list[Task], clip: ClipModel, tmp_path: Path
) -> None:
    path = tmp_path / "eval_results.jsonl"
    line = json.dumps({"key": "cars", "dataset": "Cars", "metrics": {"main_metric": 0.5}}) + "\n"
    path.write_text(line)
    with pytest.raises(InputError, match=r"'cars' that does not say which model.*another file"):
        run(clip, tasks, results_path=path)
    assert path.read_text() == line
