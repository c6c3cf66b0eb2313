"""What guessing scores: the level above which a metric says something about a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from siftclip.eval.metrics.outcomes import Metrics
from siftclip.eval.metrics.retrieval_metrics import MEAN_RECALL_KS, RECALL_KS


def class_chances(labels: np.ndarray, classes: int) -> Metrics:
    """Compute what guesses by the frequency of the classes score, as in DataComp's task list.

    Args:
        labels: int64 [n], from 0 to classes - 1.
        classes: how many there are.

    Returns:
        acc1, the sum of the squared frequencies, and mean_per_class_recall, 1 / the number of
        classes that have samples.

    Example:
        >>> import numpy as np
        >>> from siftclip.eval.metrics.chance import class_chances
        >>> class_chances(np.array([0, 0, 0, 1]), 3)
        {'acc1': 0.625, 'mean_per_class_recall': 0.5}
    """
    shares = np.bincount(labels, minlength=classes) / len(labels)
    return {
        "acc1": float((shares**2).sum()),
        "mean_per_class_recall": float(1 / (shares > 0).sum()),
    }


def retrieval_chances(captions: np.ndarray, ks: Sequence[int] = RECALL_KS) -> Metrics:
    """Compute the metrics of `retrieval_metrics` for candidates in random order.

    Args:
        captions: int64 [I], how many each image has, at least 1.
        ks: how many candidates are retrieved.
    """
    images, total = len(captions), int(captions.sum())
    counts, of_images = np.unique(captions, return_counts=True)
    chances: Metrics = {}
    for k in ks:
        missed = np.ones(len(counts))
        for place in range(k):
            missed *= np.maximum(total - counts - place, 0) / max(total - place, 1)
        by_image, by_text = min(1.0, k / images), float(1 - (missed @ of_images) / images)
        chances[f"image_retrieval_recall@{k}"] = by_image
        chances[f"text_retrieval_recall@{k}"] = by_text
        if k in MEAN_RECALL_KS:
            chances[f"mean_recall@{k}"] = (by_image + by_text) / 2
    return chances
