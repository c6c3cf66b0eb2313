from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siftclip.eval.probes.linear_probe import ProbeOptions, few_shot, linear_probe
from siftclip.eval.probes.probe_scores import ProbeSettings, score_probe
from siftclip.eval.significance.resampling import point_value
from siftclip.eval.tasks.kinds.values import TaskSamples
from siftclip.eval.tasks.task import read_task

CLASSES = 6


def make_split(task: Any, count: int, seed: int) -> tuple[TaskSamples, Tensor]:
    """Features that are noise about one direction a class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    labels[:CLASSES] = np.arange(CLASSES)
    centres = np.random.default_rng(0).standard_normal((CLASSES, 12))
    noise = generator.standard_normal((count, 12))
    features = torch.from_numpy(centres[labels] + 1.5 * noise).float()
    samples = TaskSamples(
        task=task,
        keys=np.asarray([str(i) for i in range(count)]),
        places=np.zeros((count, 3), dtype=np.int64),
        first_image=np.arange(count + 1),
        labels=labels,
        captions=(),
        associations=(),
        metadata=None,
    )
    return samples, F.normalize(features, dim=1)


@pytest.fixture(scope="module")
def splits(task_root: Path) -> tuple[Any, ...]:
    task = replace(read_task(task_root / "wds_things"), protocol="linear_probe")
    return *make_split(task, 80, 1), *make_split(task, 200, 2)


def under(splits: tuple[Any, ...], **changes: Any) -> tuple[Any, ...]:
    samples, *rest = splits
    return replace(samples, task=replace(samples.task, **changes)), *rest


def test_linear_probe(splits: tuple[Any, ...]) -> None:
    samples, images, train, train_images = splits
    settings = ProbeSettings(options=ProbeOptions(seed=3))
    scores = score_probe(*splits, settings)
    probe = linear_probe(
        train_images.numpy(), train.labels, images.numpy(), CLASSES, options=settings.options
    )
    guesses = probe.scores.argmax(axis=1)
    assert scores.metrics["acc1"] == pytest.approx(np.mean(guesses == samples.labels))
    assert scores.metrics["acc1"] > 0.4
    assert scores.metrics["l2"] == probe.l2
    assert scores.metrics["validation_acc1"] == probe.validation_accuracy
    recalls = [np.mean(guesses[samples.labels == c] == c) for c in range(CLASSES)]
    assert scores.metrics["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert scores.predictions is not None
    assert scores.predictions.argmax.tolist() == guesses.tolist()
    for name, outcomes in scores.outcomes.items():
        assert point_value(outcomes) == pytest.approx(scores.metrics[name], abs=1e-6)


def test_a_given_penalty_needs_no_validation(splits: tuple[Any, ...]) -> None:
    metrics = score_probe(*splits, ProbeSettings(options=ProbeOptions(l2=0.01))).metrics
    assert metrics["l2"] == 0.01
    assert "validation_acc1" not in metrics


def test_few_shot_is_the_mean_over_the_seeds(splits: tuple[Any, ...]) -> None:
    given = under(splits, protocol="few_shot", shots=3)
    samples, images, train, train_images = given
    scores = score_probe(*given, ProbeSettings(few_shot_seeds=(4, 5, 6)))
    arguments = (train_images.numpy(), train.labels, images.numpy(), CLASSES)
    right = [
        result.probe.scores.argmax(axis=1) == samples.labels
        for result in few_shot(*arguments, shots=[3], seeds=(4, 5, 6), options=ProbeOptions())
    ]
    accuracies = [one.mean() for one in right]
    assert scores.metrics["acc1"] == pytest.approx(np.mean(accuracies))
    assert scores.metrics["acc1_sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert scores.metrics["acc1_sd"] > 0
    share = scores.outcomes["acc1"].arrays["value"]
    np.testing.assert_allclose(share, np.mean(right, axis=0), atol=1e-6)
    assert share.dtype == np.float32
    for name, outcomes in scores.outcomes.items():
        assert point_value(outcomes) == pytest.approx(scores.metrics[name], abs=1e-6)
    assert scores.predictions is None  # there is one for each seed


def test_one_seed_has_no_deviation(splits: tuple[Any, ...]) -> None:
    given = under(splits, protocol="few_shot", shots=1)
    metrics = score_probe(*given, ProbeSettings(few_shot_seeds=(0,))).metrics
    assert "acc1_sd" not in metrics


def test_fewer_than_five_classes(splits: tuple[Any, ...]) -> None:
    samples, images, train, train_images = under(splits, protocol="few_shot", shots=2)
    task = replace(samples.task, classnames=samples.task.classnames[:4])
    few = samples.labels < 4
    samples = replace(replace(samples, task=task), labels=samples.labels[few])
    train_few = train.labels < 4
    train = replace(train, labels=train.labels[train_few])
    scores = score_probe(samples, images[few], train, train_images[train_few], ProbeSettings())
    assert math.isnan(scores.metrics["acc5"])
    assert "acc5" not in scores.outcomes
