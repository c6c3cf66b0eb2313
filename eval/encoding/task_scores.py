"""From features to the metrics of a task: the features of its texts, and its scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.encoding.feature_cache import SharedCache
from siftclip.eval.tasks.images import content_id
from siftclip.eval.tasks.kinds.registry import find_kind
from siftclip.eval.tasks.kinds.values import TaskSamples, TaskScores


class TextEncoder(Protocol):
    """What turns texts into unit features, float32 [n, d]."""

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


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
    return find_kind(samples.task.kind).score(samples, images, texts)
