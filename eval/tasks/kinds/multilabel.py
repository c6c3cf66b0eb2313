"""Multilabel classification: any number of classes an image."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.metrics.class_metrics import (
    TOP,
    average_precisions,
    class_logits,
    multilabel_metrics,
)
from siftclip.eval.tasks.kinds.base import TaskKind, TextFeatures
from siftclip.eval.tasks.kinds.parts import load_array, score_lists
from siftclip.eval.tasks.kinds.values import (
    Columns,
    Label,
    Task,
    TaskSamples,
    TaskScores,
)


class Multilabel(TaskKind):
    """Any number of classes an image: `npy` holds a one for each that it has, and else zeros."""

    name: ClassVar[str] = "multilabel"
    suffix: ClassVar[str] = "npy"
    main_metric: ClassVar[str] = "mean_average_precision"
    has_classes: ClassVar[bool] = True
    is_target: ClassVar[bool] = True

    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        classes = len(task.classnames)
        hot = load_array(data)
        if hot is None or hot.shape != (classes,) or not np.isin(hot, (0, 1)).all():
            raise InputError(
                f"the label must be an npy array of {classes} zeros and ones, as classnames.txt "
                f"has {classes} lines."
            )
        return Label(value=hot.astype(np.bool_))

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        task = samples.task
        logits = class_logits(images, texts.classifier(task.classnames, task.templates))
        metrics, outcomes = multilabel_metrics(logits, samples.require_labels())
        return TaskScores(metrics=metrics, outcomes=outcomes)

    def columns(self, samples: TaskSamples, scores: TaskScores) -> Columns:
        names = np.asarray(samples.task.classnames, dtype=np.object_)
        arrays = scores.outcomes[self.main_metric].arrays
        best = np.argsort(-arrays["scores"], axis=1, kind="stable")[:, :TOP]
        return {
            "label_names": [names[row].tolist() for row in arrays["labels"]],
            "top5_names": names[best].tolist(),
            "scores": score_lists(arrays["scores"]),
        }

    def class_table(self, samples: TaskSamples, scores: TaskScores) -> list[dict[str, Any]]:
        arrays = scores.outcomes[self.main_metric].arrays
        labels = arrays["labels"]
        precisions = average_precisions(torch.from_numpy(arrays["scores"]), labels)
        counts = labels.sum(axis=0).tolist()
        rows = zip(samples.task.classnames, counts, precisions.tolist(), strict=True)
        return [
            {"class": name, "samples": count, "average_precision": precision}
            for name, count, precision in rows
        ]
