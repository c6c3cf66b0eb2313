"""Retrieval of images by captions and of captions by images, with scores that are exact.

A tie between candidates is real (the same caption under two images) or an accident of rounding,
and the order in which floats are summed decides which. So the features are rounded to multiples of
2^-26 and their products are taken in float64, where every partial sum is exact: the products are
multiples of 2^-52 and, for vectors of length 1, their absolute values sum to at most 1. A score is
then the same number in any block, on any device. Rounding moves it by about 6e-9, which is less
than the error of a sum in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Metrics, Outcomes

RECALL_KS = (1, 5, 10)
MEAN_RECALL_KS = (1, 5)  # the k whose two directions are averaged

_UNITS = 2.0**26  # in a length of 1
_LENGTH_TOLERANCE = 0.01  # of 1; the sums stay exact up to a length of 1.41


def fixed_point(features: Tensor) -> Tensor:
    """Round features to units of 2^-26: float32 [..., d] -> float64 [..., d], whole numbers.

    Any sum of products of two such vectors is exact, in whatever order it is taken.
    """
    return (features.double() * _UNITS).round_()


def require_unit_length(what: str, features: Tensor) -> None:
    """Raise InputError unless all vectors, float [..., d], are finite and of length 1."""
    # not `>`: NaN must not pass
    wrong = ~((features.norm(dim=-1) - 1).abs() <= _LENGTH_TOLERANCE)
    if wrong.any():
        raise InputError(
            f"{what} must be finite vectors of length 1. {int(wrong.sum())} of {wrong.numel()} "
            "are not: the model gives NaN, infinite or zero features for them."
        )


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    text_of_caption: np.ndarray,
    image_of_caption: np.ndarray,
    *,
    ks: Sequence[int] = RECALL_KS,
    chunk: int = 1024,
) -> tuple[Metrics, dict[str, Outcomes]]:
    """Compute Recall@k of images by their captions and of captions by their images.

    A hit is at least one positive among the k best; with fewer candidates than k all are among
    them. Each caption is a query and a candidate of its own, also where others read the same.
    Candidates of equal score are taken in random order, and the hit is the probability of one.
    Without ties these are clip_benchmark's numbers; with ties it leaves the order to topk.

    Args:
        image_features: float32 [I, d], of length 1, on any device.
        text_features: float32 [U, d] of the distinct captions, of length 1, on the same device.
        text_of_caption: int64 [T], the row of `text_features` of each caption.
        image_of_caption: int64 [T], the row of `image_features` that it belongs to.
        ks: how many candidates are retrieved.
        chunk: captions, and images, whose scores exist at one time: chunk^2 * 8 bytes.

    Returns:
        image_retrieval_recall@k and text_retrieval_recall@k for all k, and mean_recall@k, the mean
        of the two, for k = 1 and 5. Outcomes of the means: a unit is an image with its captions.

    Raises:
        InputError: features are not of length 1, indices are out of range, or an image has no
            caption.
    """
    _require_captions(image_features, text_features, text_of_caption, image_of_caption)
    image_hits, text_hits = _expected_hits(
        image_features, text_features, text_of_caption, image_of_caption, ks, chunk
    )
    queries = np.bincount(image_of_caption)
    metrics: Metrics = {}
    outcomes: dict[str, Outcomes] = {}
    for k in ks:
        image_recall, text_recall = float(image_hits[k].mean()), float(text_hits[k].mean())
        metrics[f"image_retrieval_recall@{k}"] = image_recall
        metrics[f"text_retrieval_recall@{k}"] = text_recall
        if k in MEAN_RECALL_KS:
            metrics[f"mean_recall@{k}"] = (image_recall + text_recall) / 2
            hits = np.bincount(image_of_caption, weights=image_hits[k])
            arrays = {"value": text_hits[k], "hits": hits, "queries": queries}
            outcomes[f"mean_recall@{k}"] = Outcomes(
                statistic="two_means",
                arrays={name: array.astype(np.float32) for name, array in arrays.items()},
            )
    return metrics, outcomes


def _require_captions(
    image_features: Tensor,
    text_features: Tensor,
    text_of_caption: np.ndarray,
    image_of_caption: np.ndarray,
) -> None:
    require_unit_length("The image features", image_features)
    require_unit_length("The text features", text_features)
    pairs = [
        ("text_of_caption", text_of_caption, len(text_features)),
        ("image_of_caption", image_of_caption, len(image_features)),
    ]
    for name, indices, count in pairs:
        if indices.shape != text_of_caption.shape or indices.ndim != 1 or not len(indices):
            raise InputError(
                f"{name} must hold one index a caption, and at least one caption. "
                f"Got {list(indices.shape)}, text_of_caption has {list(text_of_caption.shape)}."
            )
        if indices.min() < 0 or indices.max() >= count:
            raise InputError(
                f"{name} must be from 0 to {count - 1}. "
                f"Got values from {indices.min()} to {indices.max()}."
            )
    without = len(image_features) - len(np.unique(image_of_caption))
    if without:
        raise InputError(
            f"Each image of a retrieval task must have a caption. {without} of "
            f"{len(image_features)} have none: remove these images."
        )


def _expected_hits(
    image_features: Tensor,
    text_features: Tensor,
    text_of_caption: np.ndarray,
    image_of_caption: np.ndarray,
    ks: Sequence[int],
    chunk: int,
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Compute the probability of a hit by k: of captions, float64 [T], and of images, [I]."""
    device = image_features.device
    text_of = torch.tensor(text_of_caption, device=device)
    image_of = torch.tensor(image_of_caption, device=device)
    captions, images = len(text_of), len(image_features)
    of_pairs = torch.cat(
        [
            (fixed_point(text_features[t]) * fixed_point(image_features[i])).sum(dim=1)
            for t, i in zip(torch.split(text_of, chunk), torch.split(image_of, chunk), strict=True)
        ]
    )
    best = of_pairs.new_full((images,), -torch.inf).scatter_reduce_(0, image_of, of_pairs, "amax")
    # rows: candidates strictly above the best positive, and at least as high
    of_captions = torch.zeros(2, captions, dtype=torch.int64, device=device)
    of_images = torch.zeros(2, images, dtype=torch.int64, device=device)
    for c in torch.split(torch.arange(captions, device=device), chunk):
        texts = fixed_point(text_features[text_of[c]])
        for i in torch.split(torch.arange(images, device=device), chunk):
            scores = texts @ fixed_point(image_features[i]).T
            of_captions[0, c] += (scores > of_pairs[c, None]).sum(dim=1)
            of_captions[1, c] += (scores >= of_pairs[c, None]).sum(dim=1)
            of_images[0, i] += (scores > best[i]).sum(dim=0)
            of_images[1, i] += (scores >= best[i]).sum(dim=0)
    tied_positives = torch.bincount(image_of[of_pairs == best[image_of]], minlength=images)
    above_c, reach_c = of_captions.cpu().numpy()
    above_i, reach_i = of_images.cpu().numpy()
    positives = tied_positives.cpu().numpy()
    return (
        {k: hit_probability(k, above_c, reach_c - above_c, np.ones_like(above_c)) for k in ks},
        {k: hit_probability(k, above_i, reach_i - above_i, positives) for k in ks},
    )


def hit_probability(
    k: int, above: np.ndarray, tied: np.ndarray, positives: np.ndarray
) -> np.ndarray:
    """Compute the probability that k candidates hold a positive, if ties come in random order.

    Of the r = k - above places that are left for the tied candidates, none goes to a positive
    with the hypergeometric probability C(tied - positives, r) / C(tied, r).

    Args:
        k: how many candidates are retrieved, at least 1.
        above: int64 [n], candidates above the best positive.
        tied: int64 [n], candidates level with it, itself included.
        positives: int64 [n], the positives among these, from 1 to tied.

    Returns:
        float64 [n].
    """
    missed = np.ones(len(above))
    negatives = tied - positives
    for place in range(k):
        drawn = place - above  # of the tied ones, before this place
        share = (negatives - drawn) / np.maximum(tied - drawn, 1)
        missed *= np.where(drawn >= 0, share, 1.0)  # once no negative is left, it stays 0
    return 1.0 - missed
