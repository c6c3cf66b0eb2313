"""From features to the metrics of a task: what is asked of which texts, by kind of task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.encoding.feature_cache import SharedCache
from siftclip.eval.metrics.class_metrics import (
    ClassPredictions,
    class_logits,
    classification_metrics,
    multilabel_metrics,
    predict_classes,
)
from siftclip.eval.metrics.group_metrics import (
    FACE_OBJECTIVES,
    SPECIAL_METRICS,
    face_metrics,
    split_objectives,
)
from siftclip.eval.metrics.outcomes import Metrics, Outcomes
from siftclip.eval.metrics.pair_metrics import (
    association_metrics,
    association_prompt,
    caption_selection_metrics,
)
from siftclip.eval.metrics.retrieval_metrics import retrieval_metrics
from siftclip.eval.tasks.images import content_id
from siftclip.eval.tasks.samples import TaskSamples
from siftclip.eval.tasks.task import TaskKind


class TextEncoder(Protocol):
    """What turns texts into unit features, float32 [n, d]."""

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What a model has reached on a task."""

    metrics: Metrics
    outcomes: dict[str, Outcomes]  # by the metrics that can be the main one
    predictions: ClassPredictions | None = None  # of classification


class TaskTexts:
    """The texts that tasks need, as features. Equal classifiers are built once.

    Args:
        encode: what computes features.
        cache: where the classes of this model are kept for later runs, if anywhere.
        device: of the features.
    """

    def __init__(
        self,
        encode: TextEncoder,
        cache: SharedCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.encode = encode
        self.cache = cache
        self.device = device
        self._classifiers: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def classifier(self, classnames: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """Build the zero-shot classifier of these names, float32 [d, C].

        Of each class the mean of its prompts' unit features, scaled to length 1, as open_clip and
        clip_benchmark have it.
        """
        key = (classnames, templates)
        if key not in self._classifiers:
            self._classifiers[key] = self._classes(classnames, templates).T.contiguous()
        return self._classifiers[key]

    def _classes(self, classnames: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        # Not by single names: a feature's last bit depends on what it was in a batch with.
        asked = json.dumps([classnames, templates]).encode()
        numbers = [content_id(b"%d %b" % (row, asked)) for row in range(len(classnames))]
        ids = np.asarray(numbers, dtype=np.uint64)
        if self.cache is not None and self.cache.known(ids).all():
            return torch.from_numpy(self.cache.features(ids)).to(self.device)
        prompts = [t.replace("{c}", name) for name in classnames for t in templates]
        features, rows = self.distinct(prompts)
        means = torch.unflatten(features[rows], 0, (len(classnames), len(templates))).mean(dim=1)
        classes = F.normalize(means, dim=-1)
        if self.cache is not None:
            self.cache.add(ids, classes.cpu().numpy())
        return classes

    def distinct(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode the distinct texts, [U, d], and find which one each text is, int64 [n]."""
        numbers: dict[str, int] = {}
        rows = [numbers.setdefault(text, len(numbers)) for text in texts]
        features = self.encode(list(numbers))
        return features, torch.tensor(rows, device=features.device)


def score_task(samples: TaskSamples, images: Tensor, texts: TaskTexts) -> TaskScores:
    """Compute the metrics of a task from the features of its images.

    Args:
        samples: of the task, n of them.
        images: float32 [m, d], unit vectors, in the order of the task's images.
        texts: where features of texts come from.

    Raises:
        InputError: features are not finite, or labels or metadata are wrong.
    """
    finite = images.isfinite().all(dim=1)
    if not finite.all():
        raise InputError(
            f"{samples.task.name}: the model gives NaN or infinite features for "
            f"{int((~finite).sum())} of {len(images)} images, so there is nothing to measure."
        )
    return _SCORES[samples.task.kind](samples, images, texts)


def _classification(samples: TaskSamples, images: Tensor, texts: TaskTexts) -> TaskScores:
    task = samples.task
    if task.special == "faces":
        return _faces(samples, images, texts)
    if samples.labels is None:
        raise RuntimeError("classification has labels")
    classifier = texts.classifier(task.classnames, task.templates)
    predictions = predict_classes(images, classifier, samples.labels)
    metrics, outcomes = classification_metrics(predictions, samples.labels, len(task.classnames))
    if task.special is not None:
        if samples.metadata is None:
            raise RuntimeError("tasks with metrics of their own have metadata")
        more = SPECIAL_METRICS[task.special](predictions, samples.labels, samples.metadata)
        metrics, outcomes = {**metrics, **more[0]}, {**outcomes, **more[1]}
    return TaskScores(metrics=metrics, outcomes=outcomes, predictions=predictions)


def _faces(samples: TaskSamples, images: Tensor, texts: TaskTexts) -> TaskScores:
    names = split_objectives(samples.task.classnames)
    templates = split_objectives(samples.task.templates)
    predicted = [
        predict_classes(images, texts.classifier(tuple(names[what]), tuple(templates[what])))
        for what in FACE_OBJECTIVES
    ]
    if samples.metadata is None:
        raise RuntimeError("face tasks have metadata")
    columns = np.column_stack([prediction.argmax for prediction in predicted])
    metrics, outcomes = face_metrics(columns, samples.metadata)
    return TaskScores(metrics=metrics, outcomes=outcomes)


def _multilabel(samples: TaskSamples, images: Tensor, texts: TaskTexts) -> TaskScores:
    task = samples.task
    logits = class_logits(images, texts.classifier(task.classnames, task.templates))
    if samples.labels is None:
        raise RuntimeError("multilabel tasks have labels")
    metrics, outcomes = multilabel_metrics(logits, samples.labels)
    return TaskScores(metrics=metrics, outcomes=outcomes)


def _retrieval(samples: TaskSamples, images: Tensor, texts: TaskTexts) -> TaskScores:
    flat = [caption for captions in samples.captions for caption in captions]
    features, rows = texts.distinct(flat)
    counts = [len(captions) for captions in samples.captions]
    metrics, outcomes = retrieval_metrics(
        images, features, rows.cpu().numpy(), np.repeat(np.arange(len(counts)), counts)
    )
    return TaskScores(metrics=metrics, outcomes=outcomes)


def _caption_selection(samples: TaskSamples, images: Tensor, texts: TaskTexts) -> TaskScores:
    flat = [caption for captions in samples.captions for caption in captions]
    features, rows = texts.distinct(flat)
    count = len(samples)
    metrics, outcomes = caption_selection_metrics(
        torch.unflatten(images, 0, (count, -1)), torch.unflatten(features[rows], 0, (count, -1))
    )
    return TaskScores(metrics=metrics, outcomes=outcomes)


def _association(samples: TaskSamples, images: Tensor, texts: TaskTexts) -> TaskScores:
    cues = [association_prompt(captions[0]) for captions in samples.captions]
    features, rows = texts.distinct(cues)
    owner = np.repeat(np.arange(len(samples)), np.diff(samples.first_image))
    pairs = (images.double() * features[rows][torch.from_numpy(owner)].double()).sum(dim=1)
    scores = np.split(pairs.cpu().numpy(), samples.first_image[1:-1])
    metrics, outcomes = association_metrics(scores, samples.associations)
    return TaskScores(metrics=metrics, outcomes=outcomes)


_Score = Callable[[TaskSamples, Tensor, TaskTexts], TaskScores]
_SCORES: Mapping[TaskKind, _Score] = {
    "classification": _classification,
    "multilabel": _multilabel,
    "retrieval": _retrieval,
    "image_caption_selection": _caption_selection,
    "association": _association,
}
