from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from torch import Tensor

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.eval.encoding.encoder import EncodeOptions, Encoder
from siftclip.eval.encoding.task_scores import TaskTexts, score_task
from siftclip.eval.significance.resampling import point_value
from siftclip.eval.tasks.kinds.values import Task, TaskSamples
from siftclip.eval.tasks.samples import read_samples
from siftclip.eval.tasks.task import find_tasks, read_task

WIDTH = 24


class Words:
    """A text encoder: unit noise that depends on the text alone; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        seeds = [zlib.crc32(text.encode()) for text in texts]
        rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return F.normalize(torch.stack(rows), dim=-1)


def noise(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, WIDTH, generator=generator), dim=-1)


@pytest.fixture(scope="module")
def tasks(task_root: Path) -> dict[str, TaskSamples]:
    return {task.name: read_samples(task) for task in find_tasks(task_root).tasks}


@torch.no_grad()
def test_classifier_equals_clip_benchmark(clip: ClipModel, task_root: Path) -> None:
    task = read_task(task_root / "wds_things")
    model = clip.model.eval()
    options = EncodeOptions(device=torch.device("cpu"), batch_size=5, progress=False)
    ours = TaskTexts(Encoder(clip, options).texts).classifier(task.classnames, task.templates)
    theirs = zero_shot_classifier(
        model, clip.tokenizer, list(task.classnames), list(task.templates), "cpu", amp=False
    )
    assert ours.shape == theirs.shape == (64, 6)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_equal_texts_and_classifiers_are_encoded_once() -> None:
    words = Words()
    texts = TaskTexts(words)
    one = texts.classifier(("cat", "dog", "cat"), ("a {c}", "{c}", "a {c}"))
    assert words.asked == ["a cat", "cat", "a dog", "dog"]
    assert texts.classifier(("cat", "dog", "cat"), ("a {c}", "{c}", "a {c}")) is one
    assert len(words.asked) == 4
    assert torch.equal(one[:, 0], one[:, 2])
    # the mean counts the template that is there twice twice
    cat = words(["a cat", "cat"])
    torch.testing.assert_close(one[:, 0], F.normalize(2 * cat[0] + cat[1], dim=0))
    features, rows = texts.distinct(["x", "y", "x"])
    assert rows.tolist() == [0, 1, 0]
    assert torch.equal(features, words(["x", "y"]))


def test_a_name_with_braces_is_no_template() -> None:
    words = Words()
    TaskTexts(words).classifier(("{c} {0}",), ("a {c}",))
    assert words.asked == ["a {c} {0}"]


@pytest.mark.parametrize("name", ["things", "few", "many_labels", "captions", "pairs", "cues"])
def test_outcomes_make_the_metrics(tasks: dict[str, TaskSamples], name: str) -> None:
    samples = tasks[name]
    scores = score_task(samples, noise(len(samples.places)), TaskTexts(Words()))
    main = samples.task.main_metric
    assert main in scores.outcomes
    for metric, outcomes in scores.outcomes.items():
        assert outcomes.units == len(samples)
        assert point_value(outcomes) == pytest.approx(scores.metrics[metric], abs=1e-6)
    assert (scores.predictions is not None) == (samples.task.kind == "classification")


def test_classification_equals_a_loop(tasks: dict[str, TaskSamples]) -> None:
    samples, words = tasks["things"], Words()
    images = noise(14, seed=3)
    scores = score_task(samples, images, TaskTexts(words))
    hits = 0
    for image, label in zip(images, samples.labels, strict=True):  # type: ignore[arg-type]
        values = []
        for name in samples.task.classnames:
            prompts = words([f"a photo of a {name}", f"the {name}"])
            values.append(float(image @ F.normalize(prompts.mean(dim=0), dim=0)))
        hits += int(np.argmax(values)) == label
    assert scores.metrics["acc1"] == pytest.approx(hits / 14)


def test_associations_equal_a_loop(tasks: dict[str, TaskSamples]) -> None:
    samples, words = tasks["cues"], Words()
    images = noise(len(samples.places), seed=4)
    scores = score_task(samples, images, TaskTexts(words))
    values = []
    for i in range(len(samples)):
        own = images[samples.first_image[i] : samples.first_image[i + 1]]
        (cue,) = words([f"A thing {i}"])  # "A" and lower case, DataComp's prompt
        right = set(np.flatnonzero(samples.associations[i]).tolist())
        chosen = set(sorted(range(len(own)), key=lambda k: -float(own[k] @ cue))[: len(right)])
        values.append(len(chosen & right) / len(chosen | right))
    assert scores.metrics["avg_jaccard_score"] == pytest.approx(np.mean(values))
    assert scores.metrics["jaccard_score_10-12"] == pytest.approx(values[5])  # the one with 10


def with_metadata(task: Task, special: str, metadata: list[list[int]], labels: list[int]) -> Any:
    count = len(labels)
    return TaskSamples(
        task=replace(task, special=special),
        keys=np.asarray([str(i) for i in range(count)]),
        places=np.zeros((count, 3), dtype=np.int64),
        first_image=np.arange(count + 1),
        labels=np.asarray(labels),
        captions=(),
        associations=(),
        metadata=np.asarray(metadata),
    )


def test_special_metrics_join_those_of_classification(tasks: dict[str, TaskSamples]) -> None:
    regions = [[i % 3, i % 2] for i in range(12)]
    samples = with_metadata(tasks["things"].task, "geode", regions, [i % 6 for i in range(12)])
    scores = score_task(samples, noise(12), TaskTexts(Words()))
    by_region = [scores.metrics[f"acc_region:{r}"] for r in range(3)]
    assert scores.metrics["acc_wg"] == min(by_region)
    assert scores.metrics["acc1"] == pytest.approx(np.mean(by_region))
    assert {"acc1", "mean_per_class_recall", "acc_wg"} <= scores.outcomes.keys()


def test_faces_have_four_classifiers(tasks: dict[str, TaskSamples]) -> None:
    what = ["race", "gender", "age", "toxic"]
    names = [f"{kind}:{kind}: {i}" for kind in what for i in range(20)]
    task = replace(
        tasks["things"].task,
        classnames=tuple(names),
        templates=tuple(f"{kind}:some {{c}}" for kind in what),
        main_metric=None,
    )
    people = [[i % 9, i % 2, i % 7, int(i % 7 != 1)] for i in range(30)]
    samples = with_metadata(task, "faces", people, [0] * 30)
    words = Words()
    scores = score_task(replace(samples, labels=None), noise(30), TaskTexts(words))
    assert len(words.asked) == 80
    assert "some race: 3" in words.asked
    assert scores.outcomes == {}
    assert 0 <= scores.metrics["acc_gender_avg"] <= 1


@pytest.mark.parametrize("name", ["things", "many_labels", "captions", "pairs", "cues"])
def test_features_that_are_no_numbers(tasks: dict[str, TaskSamples], name: str) -> None:
    samples = tasks[name]
    images = noise(len(samples.places))
    images[3, 1] = math.nan
    images[5, 0] = math.inf
    with pytest.raises(InputError, match=rf"{name}: .* NaN or infinite features for 2 of"):
        score_task(samples, images, TaskTexts(Words()))

    def broken(texts: Sequence[str]) -> Tensor:
        return torch.full((len(texts), WIDTH), math.nan)

    with pytest.raises(InputError, match="NaN"):
        score_task(samples, noise(len(samples.places)), TaskTexts(broken))
