"""Features of tasks are those that evaluation works with, and selectors can read them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from tiny_runs import without_model

from siftclip.datamodules.features.files import read_feature_file
from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.errors import InputError
from siftclip.eval.tasks.samples import read_samples
from siftclip.eval.tasks.task import find_tasks
from siftclip.selectors.core.source import FeatureFile
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.settings.commands import EvalCommand, EvalSections
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.stages.evaluation import eval_stage
from siftclip.trainer.stages.target import target_stage

Compose = Callable[..., DictConfig]


@pytest.fixture
def options(base: list[str], demo_data: DemoData, model_folder: Path) -> list[str]:
    return [
        *without_model(base),
        "target.split=test",
        f"target.root={demo_data.tasks}",
        "features.name=mine",
        f"features.model.name={model_folder}",
        "features.batch_size=7",
    ]


def test_class_features_classify_as_evaluation_does(
    options: list[str],
    compose: Compose,
    demo_data: DemoData,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = compose("target", options)
    folder, paths = target_stage(config)
    assert "target.split=test is the split that siftclip eval tests on" in caplog.text
    tasks = find_tasks(demo_data.tasks).complete()
    assert [path.name for path in paths] == [f"{task.name}-test.npz" for task in tasks]
    assert folder.name == "mine"
    clip = clip_model_from(config.features.model)
    evaluation = compose(
        "eval", [f"eval.root={demo_data.tasks}", "progress=false"], kind=EvalSections
    )
    report = eval_stage(evaluation, clip, results_path=None)
    for task, path, result in zip(tasks, paths, report.results, strict=True):
        arrays = dict(np.load(path))
        image = arrays["img"].astype(np.float32)
        assert arrays["img"].dtype == np.float16
        np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=2e-3)
        samples = read_samples(task)
        assert len(image) == len(samples)
        if task.kind == "retrieval":
            with torch.no_grad():
                tokens = clip.tokenizer([samples.captions[3][0]])
                text = clip.model.encode_text(tokens, normalize=True)[0]  # type: ignore[operator]
            np.testing.assert_allclose(arrays["txt"][3], text, atol=1e-3)
            assert "class_txt" not in arrays
            continue
        guesses = (image @ arrays["class_txt"].astype(np.float32).T).argmax(axis=1)
        accuracy = np.mean(guesses == samples.labels)
        assert accuracy == pytest.approx(result.metrics["acc1"], abs=1.5 / len(image))


def test_finished_tasks_are_kept_and_a_selector_can_read_them(
    options: list[str], compose: Compose, demo_data: DemoData
) -> None:
    tasks = find_tasks(demo_data.tasks).complete()
    task = next(task for task in tasks if task.kind == "classification")
    config = compose("target", [*options, f"target.tasks={task.name}"])
    folder, (path,) = target_stage(config)
    written = path.stat().st_mtime_ns
    assert target_stage(config) == (folder, [path])
    assert path.stat().st_mtime_ns == written
    target_stage(compose("target", [*options, f"target.tasks={task.name}", "reuse=false"]))
    assert path.stat().st_mtime_ns > written
    rows = torch.cat(list(read_feature_file(FeatureFile(path=str(folder), key="img"), 5)))
    assert np.array_equal(rows.numpy(), np.load(path)["img"])


def test_target_needs_a_model(options: list[str], compose: Compose) -> None:
    with pytest.raises(InputError, match=r"target needs the model whose features the pool has"):
        target_stage(compose("target", ["features=metadata", *options[:-2]]))


@pytest.mark.parametrize("change", ["classnames", "templates", "tar"])
def test_a_changed_task_is_embedded_again(
    options: list[str],
    compose: Compose,
    demo_data: DemoData,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
) -> None:
    caplog.set_level(logging.INFO)
    task = next(t for t in find_tasks(demo_data.tasks).complete() if t.kind == "classification")
    root = tmp_path / "tasks" / task.root.name
    shutil.copytree(task.root, root)
    config = compose("target", [*options, f"target.root={root}"])
    _, (path,) = target_stage(config)
    before = dict(np.load(path))
    if change == "tar":
        for tar in sorted(root.rglob("*.tar")):
            os.utime(tar)  # a copy: its images may be others
        told = "the tars"
    else:
        name = {
            "classnames": "classnames.txt",
            "templates": "zeroshot_classification_templates.txt",
        }
        file = root / name[change]
        file.write_text(file.read_text().replace("a", "o"))
        told = "the task"
    target_stage(config)
    assert f"not reused: {path} of " in caplog.text
    assert told in caplog.text
    after = dict(np.load(path))
    assert np.array_equal(before["img"], after["img"])
    assert np.array_equal(before["class_txt"], after["class_txt"]) == (change == "tar")


def test_features_of_two_models_are_not_read_together(
    options: list[str], compose: Compose, demo_data: DemoData, tmp_path: Path
) -> None:
    first, second = [t.name for t in find_tasks(demo_data.tasks).complete()][:2]
    config = compose("target", [*options, f"target.tasks={first}"])
    target_stage(config)
    model = compose("target", options, kind=EvalCommand).model
    other = load_clip_model("other", architecture=to_plain(model.architecture))
    save_model_folder(other, tmp_path / "other")
    with pytest.raises(InputError, match=r"holds features of another model .*-test\.npz"):
        target_stage(
            compose(
                "target",
                [*options, f"target.tasks={second}", f"features.model.name={tmp_path / 'other'}"],
            )
        )
