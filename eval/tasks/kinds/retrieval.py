"""Retrieval: of images by their captions, and of captions by their images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor

from siftclip.eval.metrics.chance import retrieval_chances
from siftclip.eval.metrics.retrieval_metrics import retrieval_metrics
from siftclip.eval.tasks.kinds.base import TaskKind, TextFeatures
from siftclip.eval.tasks.kinds.parts import caption_lists, read_captions
from siftclip.eval.tasks.kinds.values import (
    Columns,
    Label,
    Task,
    TaskSamples,
    TaskScores,
)


class Retrieval(TaskKind):
    """An image and its captions, one per line of `txt`; those of the other samples are wrong."""

    name: ClassVar[str] = "retrieval"
    suffix: ClassVar[str] = "txt"
    main_metric: ClassVar[str] = "mean_recall@1"
    is_target: ClassVar[bool] = True

    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        return Label(captions=read_captions(data))

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        flat = [caption for captions in samples.captions for caption in captions]
        features, rows = texts.distinct(flat)
        counts = [len(captions) for captions in samples.captions]
        metrics, outcomes = retrieval_metrics(
            images, features, rows.cpu().numpy(), np.repeat(np.arange(len(counts)), counts)
        )
        return TaskScores(metrics=metrics, outcomes=outcomes)

    def chances(self, samples: TaskSamples) -> Mapping[str, float]:
        return retrieval_chances(np.asarray([len(captions) for captions in samples.captions]))

    def columns(self, samples: TaskSamples, scores: TaskScores) -> Columns:
        columns: Columns = {"captions": caption_lists(samples)}
        for name, outcomes in scores.outcomes.items():
            k = name.partition("@")[2]
            columns[f"text_hit@{k}"] = outcomes.arrays["value"]
            columns[f"image_hits@{k}"] = outcomes.arrays["hits"]
        return columns
