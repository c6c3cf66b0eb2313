"""Metrics of linear probes and few-shot: from fitted classifiers to those of classification."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.metrics.class_metrics import classification_metrics, rank_classes
from siftclip.eval.metrics.outcomes import Metrics, Outcomes
from siftclip.eval.probes.linear_probe import ProbeOptions, few_shot, linear_probe
from siftclip.eval.tasks.kinds.values import Task, TaskSamples, TaskScores

IN_TRAIN = "count_test_images_in_train"  # the metric that counts them


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """What probes are fitted on and how."""

    train_split: str = "train"
    few_shot_seeds: tuple[int, ...] = (0, 1, 2)
    options: ProbeOptions = field(default_factory=ProbeOptions)


def score_probe(
    samples: TaskSamples,
    images: Tensor,
    train: TaskSamples,
    train_images: Tensor,
    settings: ProbeSettings,
) -> TaskScores:
    """Compute the metrics of a task whose protocol is linear_probe or few_shot.

    Few-shot metrics are means over the seeds; `acc1_sd` is the deviation of acc1 between them, and
    the outcome of an image the share of the seeds in which it is right.

    Args:
        samples: of the test split.
        images: their features, float32 [n, d], unit vectors.
        train: the samples that may be fitted on.
        train_images: their features, float32 [m, d].
        settings: how.
    """
    if samples.labels is None or train.labels is None:
        raise RuntimeError("probes are for tasks with labels")
    task, labels = samples.task, samples.labels
    classes = len(task.classnames)
    options = replace(settings.options, device=str(images.device))
    fitted = (train_images.cpu().numpy(), train.labels, images.cpu().numpy(), classes)
    if task.protocol == "linear_probe":
        probe = linear_probe(*fitted, options=options)
        predictions = rank_classes(torch.from_numpy(probe.scores), labels)
        metrics, outcomes = classification_metrics(predictions, labels, classes)
        metrics["l2"] = probe.l2
        if probe.validation_accuracy is not None:
            metrics["validation_acc1"] = probe.validation_accuracy
        return TaskScores(metrics=metrics, outcomes=outcomes, predictions=predictions)
    if task.shots is None:
        raise RuntimeError("few-shot tasks say how many")
    seeds = settings.few_shot_seeds
    draws = [
        classification_metrics(rank_classes(torch.from_numpy(result.probe.scores)), labels, classes)
        for result in few_shot(*fitted, shots=[task.shots], seeds=seeds, options=options)
    ]
    return _mean_of_draws(draws)


def count_in_train(test_ids: np.ndarray, train_ids: np.ndarray, task: Task) -> int:
    """Count the images of a test split that are in its train split, too.

    Equal bytes are one image; a copy that was encoded again is not seen.

    Args:
        test_ids: uint64 [n], see `images.content_id`.
        train_ids: uint64 [m].
        task: of the test split.

    Raises:
        InputError: all of them are.
    """
    shared = int(np.isin(test_ids, train_ids).sum())
    if shared == len(test_ids):
        raise InputError(
            f"{task.root}: a {task.protocol} must not be fitted on what it is tested on. All "
            f"{shared:,} images of {task.split!r} are in the train split, too. Name another split "
            "to fit on (train_split)."
        )
    return shared


def _mean_of_draws(draws: list[tuple[Metrics, dict[str, Outcomes]]]) -> TaskScores:
    values_of = {name: np.asarray([metrics[name] for metrics, _ in draws]) for name in draws[0][0]}
    metrics = {name: float(values.mean()) for name, values in values_of.items()}
    if len(draws) > 1:
        metrics["acc1_sd"] = float(values_of["acc1"].std(ddof=1))
    outcomes = {}
    for name, first in draws[0][1].items():
        values = np.mean([outcomes[name].arrays["value"] for _, outcomes in draws], axis=0)
        arrays = {**first.arrays, "value": values.astype(np.float32)}
        outcomes[name] = replace(first, arrays=arrays)
    return TaskScores(metrics=metrics, outcomes=outcomes)
