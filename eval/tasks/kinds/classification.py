"""Classification: one class an image, told by the similarity with prompts of the class names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.metrics.chance import class_chances
from siftclip.eval.metrics.class_metrics import (
    ClassPredictions,
    classification_metrics,
    confusion_counts,
    per_class_table,
    predict_classes,
)
from siftclip.eval.metrics.group_metrics import (
    FACE_OBJECTIVES,
    SPECIAL_METRICS,
    face_metrics,
    split_objectives,
)
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.tasks.kinds.base import TaskKind, TextFeatures
from siftclip.eval.tasks.kinds.parts import score_lists
from siftclip.eval.tasks.kinds.values import (
    Columns,
    Label,
    Task,
    TaskSamples,
    TaskScores,
)

log = logging.getLogger(__name__)


class Classification(TaskKind):
    """One class an image: `cls` holds its number. Some of DataComp's tasks have more metrics."""

    name: ClassVar[str] = "classification"
    suffix: ClassVar[str] = "cls"
    main_metric: ClassVar[str] = "acc1"
    has_classes: ClassVar[bool] = True
    one_class: ClassVar[bool] = True
    is_target: ClassVar[bool] = True

    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        classes = len(task.classnames)
        try:
            label = int(data)
        except ValueError:
            label = -1
        if not 0 <= label < classes:
            raise InputError(
                f"the label must be a number from 0 to {classes - 1}, as classnames.txt has "
                f"{classes} lines. Got {data[:20]!r}."
            )
        return Label(value=label)

    def check_samples(self, samples: TaskSamples) -> None:
        """Point out classes that nothing is asked about."""
        task = samples.task
        # DataComp's tasks with metrics of their own do have classes without samples.
        if task.special is not None:
            return
        classes = len(task.classnames)
        empty = classes - len(np.unique(samples.require_labels()))
        if empty:
            log.warning(
                "%s: %d of %d classes have no sample in the split %r: do the class names belong "
                "to these labels?",
                task.name, empty, classes, task.split,
            )  # fmt: skip

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        task = samples.task
        if not task.has_labels:
            return _score_faces(samples, images, texts)
        labels = samples.require_labels()
        classifier = texts.classifier(task.classnames, task.templates)
        predictions = predict_classes(images, classifier, labels)
        metrics, outcomes = classification_metrics(predictions, labels, len(task.classnames))
        if task.special is not None:
            special = SPECIAL_METRICS[task.special]
            more = special(predictions, labels, samples.require_metadata())
            metrics, outcomes = {**metrics, **more[0]}, {**outcomes, **more[1]}
        return TaskScores(metrics=metrics, outcomes=outcomes, predictions=predictions)

    def chances(self, samples: TaskSamples) -> Mapping[str, float]:
        if samples.labels is None:  # of faces
            return {}
        return class_chances(samples.labels, len(samples.task.classnames))

    def columns(self, samples: TaskSamples, scores: TaskScores) -> Columns | None:
        if samples.labels is None:  # of faces
            return None
        if scores.predictions is None:
            return _few_shot_columns(samples, scores.outcomes["acc1"])
        return _columns(samples, scores.predictions)

    def class_table(self, samples: TaskSamples, scores: TaskScores) -> list[dict[str, Any]] | None:
        if samples.labels is None or scores.predictions is None:
            return None
        names = samples.task.classnames
        confusion = confusion_counts(scores.predictions.argmax, samples.labels, len(names))
        return per_class_table(confusion, names)


def _score_faces(samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
    names = split_objectives(samples.task.classnames)
    templates = split_objectives(samples.task.templates)
    predicted = [
        predict_classes(images, texts.classifier(tuple(names[what]), tuple(templates[what])))
        for what in FACE_OBJECTIVES
    ]
    columns = np.column_stack([prediction.argmax for prediction in predicted])
    metrics, outcomes = face_metrics(columns, samples.require_metadata())
    return TaskScores(metrics=metrics, outcomes=outcomes)


def _labelled(samples: TaskSamples) -> Columns:
    names = np.asarray(samples.task.classnames, dtype=np.object_)
    return {"label": samples.labels, "label_name": names[samples.labels]}


def _columns(samples: TaskSamples, predictions: ClassPredictions) -> Columns:
    names = np.asarray(samples.task.classnames, dtype=np.object_)
    best = predictions.top[:, 0]
    metadata = {} if samples.metadata is None else {"metadata": samples.metadata.tolist()}
    return {
        **_labelled(samples),
        "prediction": best,
        "prediction_name": names[best],
        "correct": best == samples.labels,
        "score": predictions.scores[:, 0],
        "label_score": predictions.label_score,
        "label_rank": predictions.label_rank,
        "top5_names": names[predictions.top].tolist(),
        "top5_scores": score_lists(predictions.scores),
        **metadata,
    }


def _few_shot_columns(samples: TaskSamples, outcomes: Outcomes) -> Columns:
    return {**_labelled(samples), "share_correct": outcomes.arrays["value"]}
