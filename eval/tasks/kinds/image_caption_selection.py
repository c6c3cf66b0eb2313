"""Selection between captions: which caption belongs to which image of a small instance."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.metrics.pair_metrics import caption_selection_metrics
from siftclip.eval.tasks.kinds.base import ImagesOfSample, TaskKind, TextFeatures
from siftclip.eval.tasks.kinds.parts import caption_lists, read_captions
from siftclip.eval.tasks.kinds.values import (
    Columns,
    Label,
    Task,
    TaskSamples,
    TaskScores,
)


class ImageCaptionSelection(TaskKind):
    """Captions in `txt`: the first line is right, or line i is that of image i (Winoground)."""

    name: ClassVar[str] = "image_caption_selection"
    suffix: ClassVar[str] = "txt"
    main_metric: ClassVar[str] = "text_acc"
    images: ClassVar[ImagesOfSample] = "one_or_numbered"

    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        return Label(captions=read_captions(data))

    def check_samples(self, samples: TaskSamples) -> None:
        """Check that all samples have equally many images and captions."""
        images, captions = np.diff(samples.first_image), np.asarray([*map(len, samples.captions)])
        for name, counts in (("images", images), ("captions", captions)):
            odd = np.flatnonzero(counts != counts[0])
            if len(odd):
                raise InputError(
                    f"{samples.task.root}: every sample must have as many {name} as the first, "
                    f"{counts[0]}. {samples.keys[odd[0]]} has {counts[odd[0]]}."
                )

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        flat = [caption for captions in samples.captions for caption in captions]
        features, rows = texts.distinct(flat)
        count = len(samples)
        metrics, outcomes = caption_selection_metrics(
            torch.unflatten(images, 0, (count, -1)), torch.unflatten(features[rows], 0, (count, -1))
        )
        return TaskScores(metrics=metrics, outcomes=outcomes)

    def columns(self, samples: TaskSamples, scores: TaskScores) -> Columns:
        right = {
            name: outcomes.arrays["value"].astype(np.bool_)
            for name, outcomes in scores.outcomes.items()
        }
        return {"captions": caption_lists(samples), **right}
