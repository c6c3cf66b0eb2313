from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from torch.utils.data import DataLoader

from siftclip.datamodules.clip_models import ClipModel
from siftclip.eval import evaluate
from siftclip.eval.clip_benchmark_fixes import none_for_nan, repaired
from siftclip.eval.evaluate import evaluate_tasks, fingerprint
from siftclip.eval.results import TaskResult, read_results, wilson_interval
from siftclip.eval.task_dataset import TaskDataset, collate_captions
from siftclip.eval.tasks import Task, find_tasks
from siftclip.selectors.errors import InputError

MakeTask = Callable[..., Path]


def run(clip: ClipModel, tasks: list[Task], **options: Any) -> list[TaskResult]:
    return evaluate_tasks(clip, tasks, progress=False, **options)


@contextmanager
def changed_weights(clip: ClipModel) -> Iterator[None]:
    parameter = clip.model.visual.attnpool.c_proj.weight
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.flatten()[0] += 1
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(original)


def test_metrics_are_those_of_clip_benchmark(task_root: Path, clip: ClipModel) -> None:
    tasks = find_tasks(task_root)
    results = run(clip, tasks, batch_size=5)
    model = clip.model.eval()
    assert [result.key for result in results] == [task.name for task in tasks]
    for task, result in zip(tasks, results, strict=True):
        dataset = TaskDataset(task, clip.eval_transform)
        with repaired():
            if task.kind == "retrieval":
                loader = DataLoader(dataset, batch_size=5, collate_fn=collate_captions)
                expected = zeroshot_retrieval.evaluate(
                    model, loader, clip.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
                )
            else:
                expected = zeroshot_classification.evaluate(
                    model, DataLoader(dataset, batch_size=5), clip.tokenizer,
                    dataset.classes, dataset.templates, "cpu", amp=False,
                )  # fmt: skip
        metrics = dict(result.metrics)
        main = metrics.pop("main_metric")
        assert main == metrics[result.main_metric_name]
        if task.kind == "retrieval":
            for k in (1, 5):
                both = (
                    expected[f"text_retrieval_recall@{k}"] + expected[f"image_retrieval_recall@{k}"]
                )
                expected[f"mean_recall@{k}"] = both / 2
        assert metrics == none_for_nan(expected)
        assert result.samples == len(dataset)


def test_correctness_and_interval(task_root: Path, clip: ClipModel) -> None:
    captions, few, many_labels, things = run(clip, find_tasks(task_root))
    assert many_labels.correct is None
    for result, metric in [
        (captions, "text_retrieval_recall@1"),
        (few, "acc1"),
        (things, "acc1"),
    ]:
        assert result.correct is not None
        assert result.correct.shape == (result.samples,)
        assert result.correct.mean() == pytest.approx(result.metrics[metric])
    for result in (few, things):
        assert result.main_metric is not None
        assert result.interval == wilson_interval(result.main_metric, result.samples)
    assert captions.interval is many_labels.interval is None
    assert few.metrics["acc5"] is None


def test_another_main_metric_and_title(task_root: Path, clip: ClipModel) -> None:
    (things,) = find_tasks(task_root, ["things"])
    other = replace(things, main_metric="mean_per_class_recall", title="The Things")
    (result,) = run(clip, [other])
    assert result.metrics["main_metric"] == result.metrics["mean_per_class_recall"]
    assert (result.dataset, result.interval) == ("The Things", None)
    with pytest.raises(InputError, match=r"main metric of things must be one of \['acc1', .*'f1'"):
        run(clip, [replace(things, main_metric="f1")])


def test_a_training_run_is_not_disturbed(task_root: Path, clip: ClipModel) -> None:
    """Modes of all modules, gradients, weights, statistics and global random states."""
    model = clip.model
    model.visual.eval()  # a frozen tower
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    run(clip, find_tasks(task_root))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert (random.getstate(), str(np.random.get_state())) == random_states[1:]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_mode_is_restored_after_an_error(
    tmp_path: Path, make_task: MakeTask, clip: ClipModel
) -> None:
    make_task(tmp_path / "x", members=[[("png", b"?"), ("cls", b"0")]], shards=1)
    before = zeroshot_classification.accuracy
    with pytest.raises(InputError, match="cannot be decoded"):
        run(clip, find_tasks(tmp_path))
    assert clip.model.training
    assert zeroshot_classification.accuracy is before


def test_fp32_whatever_is_around(task_root: Path, clip: ClipModel) -> None:
    """Number 4 of clip_benchmark's faults: bf16 made results move with the batch size."""
    tasks = find_tasks(task_root)
    seen: set[tuple[torch.dtype, bool]] = set()
    hooks = [
        module.register_forward_hook(lambda m, _, out: seen.add((out.dtype, m.training)))
        for module in (clip.model.visual, clip.model.ln_final)
    ]
    expected = run(clip, tasks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(clip, tasks, batch_size=3)
    for hook in hooks:
        hook.remove()
    assert seen == {(torch.float32, False)}
    assert [result.metrics for result in inside] == [result.metrics for result in expected]


def test_a_model_in_bf16_is_copied_to_fp32(task_root: Path, clip: ClipModel) -> None:
    import copy

    tasks = find_tasks(task_root, ["things"])
    low = replace(clip, model=copy.deepcopy(clip.model).bfloat16())
    (result,) = run(low, tasks)
    (expected,) = run(replace(clip, model=copy.deepcopy(low.model).float()), tasks)
    assert result.metrics == expected.metrics
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}


def test_workers_change_nothing(task_root: Path, clip: ClipModel) -> None:
    """Number 2 of clip_benchmark's faults: `few` has one tar."""
    tasks = find_tasks(task_root, ["few"])
    (alone,), (many,) = run(clip, tasks), run(clip, tasks, num_workers=2, batch_size=3)
    assert alone.metrics == many.metrics


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tasks that are really run from here on."""
    names: list[str] = []
    original = evaluate._evaluate_task

    def spy(task: Task, *arguments: Any) -> TaskResult:
        names.append(task.name)
        return original(task, *arguments)

    monkeypatch.setattr(evaluate, "_evaluate_task", spy)
    return names


def test_resume_runs_only_what_is_missing(
    task_root: Path, clip: ClipModel, tmp_path: Path, evaluated: list[str]
) -> None:
    path = tmp_path / "eval_results.jsonl"
    tasks = find_tasks(task_root)
    first = run(clip, tasks[1:3], results_path=path)
    assert evaluated == ["few", "many_labels"]
    with path.open("a") as file:
        file.write('{"key": "things", "da')  # killed in the middle of a line
    results = run(clip, tasks, results_path=path)
    assert evaluated == ["few", "many_labels", "captions", "things"]
    assert [result.key for result in results] == [task.name for task in tasks]
    assert [replace(r, seconds=0) for r in results[1:3]] == [replace(r, seconds=0) for r in first]
    assert results[1].correct is not None
    assert first[0].correct is not None
    assert results[1].correct.tolist() == first[0].correct.tolist()
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert keys == ["few", "many_labels", "captions", "things"]


def test_a_finished_task_is_on_disk_when_the_next_one_fails(
    task_root: Path, clip: ClipModel, tmp_path: Path, make_task: MakeTask
) -> None:
    path = tmp_path / "eval_results.jsonl"
    make_task(tmp_path / "bad", members=[[("png", b"?"), ("cls", b"0")]], shards=1)
    tasks = [*find_tasks(task_root, ["few"]), *find_tasks(tmp_path / "bad")]
    with pytest.raises(InputError, match="cannot be decoded"):
        run(clip, tasks, results_path=path)
    assert [result.key for result in read_results(path)] == ["few"]


def test_another_model_is_evaluated_anew(
    task_root: Path, clip: ClipModel, tmp_path: Path, evaluated: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "eval_results.jsonl"
    tasks = find_tasks(task_root, ["few", "things"])
    (old, _) = run(clip, tasks, results_path=path)
    with changed_weights(clip), caplog.at_level(logging.WARNING):
        (new,) = run(clip, tasks[:1], results_path=path)
    assert evaluated == ["few", "things", "few"]
    assert "2 results of another model are removed" in caplog.text
    assert new.model != old.model
    assert [result.model for result in read_results(path)] == [new.model]


def test_a_file_of_another_tool_is_left_alone(
    task_root: Path, clip: ClipModel, tmp_path: Path
) -> None:
    path = tmp_path / "eval_results.jsonl"
    line = json.dumps({"key": "cars", "dataset": "Cars", "metrics": {"main_metric": 0.5}}) + "\n"
    path.write_text(line)
    with pytest.raises(InputError, match=r"'cars' that does not say which model.*another file"):
        run(clip, find_tasks(task_root), results_path=path)
    assert path.read_text() == line


def test_fingerprint(clip: ClipModel) -> None:
    before = fingerprint(clip)
    assert len(before) == 64
    clip.model.eval()
    assert fingerprint(clip) == before
    with changed_weights(clip):
        assert fingerprint(clip) != before
    assert fingerprint(clip) == before
    assert fingerprint(replace(clip, config={**clip.config, "quick_gelu": True})) != before


def test_wrong_options(task_root: Path, clip: ClipModel) -> None:
    tasks = find_tasks(task_root, ["few"])
    with pytest.raises(InputError, match=r"each task once. Got \['few'\]"):
        run(clip, tasks * 2)
    with pytest.raises(InputError, match=r"eval\.batch_size must be"):
        run(clip, tasks, batch_size=0)
    with pytest.raises(InputError, match=r"eval\.num_workers must be"):
        run(clip, tasks, num_workers=-1)


def test_one_bar_that_goes_away(
    task_root: Path, clip: ClipModel, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate_tasks(clip, find_tasks(task_root, ["few"]))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "evaluate" in printed.err
    assert printed.err.split("\r")[-1].strip() == ""
    run(clip, find_tasks(task_root, ["few"]))
    assert capfd.readouterr() == ("", "")


def test_every_kind_has_an_evaluator() -> None:
    from siftclip.eval.metrics import EVALUATORS
    from siftclip.eval.tasks import MAIN_METRICS

    assert set(EVALUATORS) == set(MAIN_METRICS)
