"""Tasks of small instances: which caption belongs to which image, which images go with a cue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Metrics, Outcomes, mean_metrics
from siftclip.eval.metrics.retrieval_metrics import fixed_point, require_unit_length

# WinoGAViL's metrics by the number of candidate images: name -> (fewest, most)
_CANDIDATES: dict[str, tuple[float, float]] = {
    "avg_jaccard_score": (0, np.inf),
    "jaccard_score_5": (5, 5),
    "jaccard_score_6": (6, 6),
    "jaccard_score_10": (10, 10),
    "jaccard_score_12": (12, 12),
    "jaccard_score_5-6": (0, 6),
    "jaccard_score_10-12": (10, np.inf),
}


def caption_selection_metrics(
    image_features: Tensor, text_features: Tensor
) -> tuple[Metrics, dict[str, Outcomes]]:
    """Compute image_acc, text_acc and acc, as clip_benchmark's `image_caption_selection`.

    In each instance the i-th caption belongs to the i-th image. text_acc is the share of instances
    in which every image finds its caption among the captions, image_acc that in which every
    caption finds its image, acc that with both. Images or captions beyond the shorter of the two
    lists are distractors. Of equal scores the lower index counts as found, as in clip_benchmark.

    Args:
        image_features: float32 [n, images, d], of length 1, on any device.
        text_features: float32 [n, captions, d], of length 1, on the same device.

    Raises:
        InputError: there is no instance, or features are not of length 1.
    """
    if not len(image_features):
        raise InputError("A caption selection task must have at least one instance. It has none.")
    require_unit_length("The image features", image_features)
    require_unit_length("The text features", text_features)
    scores = fixed_point(image_features) @ fixed_point(text_features).mT
    table = scores.cpu().numpy()  # whose argmax is the first of equals, which torch's need not be
    matching = np.arange(min(table.shape[1:]))
    text = (table.argmax(axis=2)[:, : len(matching)] == matching).all(axis=1)
    image = (table.argmax(axis=1)[:, : len(matching)] == matching).all(axis=1)
    right = {"image_acc": image, "text_acc": text, "acc": image & text}
    return mean_metrics({name: values.astype(np.float32) for name, values in right.items()})


def association_metrics(
    scores: Sequence[np.ndarray], associated: Sequence[np.ndarray]
) -> tuple[Metrics, dict[str, Outcomes]]:
    """Compute DataComp's Jaccard indices of WinoGAViL: which candidate images go with a cue.

    As many images as there are associations are predicted, the most similar ones; of equal ones
    the lower index, where DataComp leaves it to an unstable sort. An instance's value is the
    Jaccard index of the predicted and the associated images.

    Bitton et al., "WinoGAViL: Gamified association benchmark", 2022.

    Args:
        scores: of each instance, float [candidates], the cosines of the cue with the images.
        associated: of each instance, bool [candidates].

    Returns:
        avg_jaccard_score, jaccard_score_5, _6, _10 and _12 (instances of so many candidates),
        jaccard_score_5-6 (at most 6) and jaccard_score_10-12 (at least 10), NaN without such an
        instance. The Outcomes hold all instances, NaN where an instance does not count.

    Raises:
        InputError: an instance has no association, scores that are not finite, or not one mark a
            candidate; or there is no instance.
    """
    if not len(scores) or len(scores) != len(associated):
        raise InputError(
            "A WinoGAViL task must have at least one instance, each with scores and associations. "
            f"Got {len(scores)} and {len(associated)}."
        )
    values = np.array(
        [_jaccard(i, *pair) for i, pair in enumerate(zip(scores, associated, strict=True))]
    )
    candidates = np.array([len(each) for each in scores])
    return mean_metrics(
        {
            name: np.where((candidates >= fewest) & (candidates <= most), values, np.nan)
            for name, (fewest, most) in _CANDIDATES.items()
        }
    )


def _jaccard(instance: int, scores: np.ndarray, associated: np.ndarray) -> float:
    if scores.ndim != 1 or associated.shape != scores.shape or associated.dtype != np.bool_:
        raise InputError(
            f"WinoGAViL instance {instance} must mark each of its candidates as associated or "
            f"not, bool {list(scores.shape)}. Got {associated.dtype} {list(associated.shape)}."
        )
    count = int(associated.sum())
    if not count:
        raise InputError(
            f"WinoGAViL instance {instance} must have an association among its {len(scores)} "
            "candidates. It has none."
        )
    if not np.isfinite(scores).all():
        raise InputError(
            f"The scores of WinoGAViL instance {instance} must be finite. Got {scores.tolist()}: "
            "the model gives NaN or infinite features."
        )
    shared = int(associated[np.argsort(-scores, kind="stable")[:count]].sum())
    return shared / (2 * count - shared)


def association_prompt(cue: str) -> str:
    """Return DataComp's prompt of a WinoGAViL cue: "A dog", "An owl", the cue in lower case.

    Raises:
        InputError: the cue is empty.
    """
    if not cue:
        raise InputError("The cue of a WinoGAViL instance must not be empty.")
    lowered = cue.lower()
    return f"An {lowered}" if lowered[0] in "aeiou" else f"A {lowered}"
