"""Association (WinoGAViL): which of several images go with a cue."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.metrics.pair_metrics import association_metrics, association_prompt
from siftclip.eval.tasks.kinds.base import ImagesOfSample, TaskKind, TextFeatures
from siftclip.eval.tasks.kinds.values import (
    Columns,
    Label,
    Task,
    TaskSamples,
    TaskScores,
)
from siftclip.records import is_unicode


class Association(TaskKind):
    """Numbered images, and `json` with the `cue` and the numbers of its `associations`."""

    name: ClassVar[str] = "association"
    suffix: ClassVar[str] = "json"
    main_metric: ClassVar[str] = "jaccard_score_10-12"
    images: ClassVar[ImagesOfSample] = "numbered"

    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        try:
            record = json.loads(data)
            cue, chosen = record["cue"], np.asarray(record["associations"])
            valid = isinstance(cue, str) and cue.strip() and is_unicode(cue) and chosen.ndim == 1
            valid = valid and chosen.dtype == int and len(chosen) > 0
            valid = valid and set(chosen.tolist()) <= set(range(images))
        except (KeyError, TypeError, ValueError, RecursionError):  # the last of a thousand brackets
            valid = False
        if not valid:
            raise InputError(
                'the .json member must be {"cue": a text, "associations": [numbers of images '
                f"from 0 to {images - 1}]}}. Got {data[:80]!r}."
            )
        return Label(captions=(cue,), associated=np.isin(np.arange(images), chosen))

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        cues = [association_prompt(captions[0]) for captions in samples.captions]
        features, rows = texts.distinct(cues)
        owner = np.repeat(np.arange(len(samples)), np.diff(samples.first_image))
        pairs = (images.double() * features[rows][torch.from_numpy(owner)].double()).sum(dim=1)
        scores = np.split(pairs.cpu().numpy(), samples.first_image[1:-1])
        metrics, outcomes = association_metrics(scores, samples.associations)
        return TaskScores(metrics=metrics, outcomes=outcomes)

    def columns(self, samples: TaskSamples, scores: TaskScores) -> Columns:
        return {
            "cue": [captions[0] for captions in samples.captions],
            "candidates": np.diff(samples.first_image),
            "associated": [np.flatnonzero(marks).tolist() for marks in samples.associations],
            "jaccard": scores.outcomes["avg_jaccard_score"].arrays["value"],
        }
