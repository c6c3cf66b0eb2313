"""The selectors' formulas written down straight in torch: float32, whole matrices, no thought.

This is how one would compute them first, and, by the descriptions of their authors' releases, in
the way and the order of these: negCLIPLoss with four B x B matrices at a time, NormSim as a product
with all targets in blocks of 3,000 candidates, VAS-D and NormSim-D with everything anew at every
step, ClipCov with the similarities of all classes held and all samples sorted at every update.
Features are float16 tensors, as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 3000


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """float32 [n]."""
    return (image.float() * text.float()).sum(1)


def negcliploss(image: Tensor, text: Tensor, temperature: float, blocks: list[Tensor]) -> Tensor:
    """float32 [n], one pass over blocks of a partition."""
    image, text = image.float(), text.float()
    score = (image * text).sum(1)
    exponentials = torch.empty(0)
    for block in blocks:
        similarity = image[block] @ text[block].T
        scaled = similarity / temperature
        exponentials = torch.exp(scaled)  # beside the last block's, which is still there
        rows = temperature / 2 * exponentials.sum(1).log()
        columns = temperature / 2 * exponentials.sum(0).log()
        score[block] -= rows + columns
    del exponentials
    return score


def normsim(image: Tensor, target: Tensor, p: float) -> Tensor:
    """float32 [n]."""
    target = target.float()
    parts = []
    for block in image.split(CANDIDATES):
        similarity = (block.float() @ target.T).abs()
        if np.isinf(p):
            parts.append(similarity.amax(1))
        else:
            parts.append(similarity.pow(p).sum(1).pow(1 / p))
    return torch.cat(parts)


def vas(image: Tensor, covariance: Tensor) -> Tensor:
    """float32 [n]."""
    image = image.float()
    return ((image @ covariance) * image).sum(1)


def dynamic(
    image: Tensor,
    start: np.ndarray,
    final: int,
    steps: int,
    sample: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """VAS-D from the rows `start` down to `final` of them; NormSim-D with a `sample` of each step.

    Args:
        image: float16 [N, d].
        start: int64, rows that are left after the quality cut.
        final: how many to keep.
        steps: T.
        sample: (step, rows) -> those of them that the covariance is of.
    """

    def covariance(step: int, rows: Tensor) -> Tensor:
        if sample is not None:
            rows = torch.from_numpy(sample(step, np.sort(rows.numpy())))
        chosen = image[rows].float()
        return chosen.T @ chosen / len(chosen)

    left = torch.from_numpy(start)
    chunk = -(-(len(left) - final) // steps)
    sigma = covariance(0, torch.arange(len(image)))
    for step in range(steps):
        features = image[left].float()
        score = ((features @ sigma) * features).sum(1)
        keep = max(final, len(left) - chunk) if step < steps - 1 else final
        left = left[score.topk(keep).indices]
        sigma = covariance(step + 1, left)
    return np.sort(left.numpy())


def clipcov(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    classes: np.ndarray,
    between: np.ndarray,
    budget: int,
    interval: int = 200,
) -> list[int]:
    """The picks in their order.

    Args:
        image: float16 [n, d].
        text: float16 [n, d].
        labels: float [C, d], of class names.
        classes: int64 [n].
        between: float32 [n], the similarity to other classes' centres, both directions.
        budget: how many to pick.
        interval: picks in a class between updates of its scores.
    """
    image, text = image.float(), text.float()
    members = [np.flatnonzero(classes == c) for c in range(len(labels))]
    place = np.zeros(len(classes), dtype=np.int64)
    similarities = []
    score = np.zeros(len(classes), dtype=np.float32)
    cross = np.zeros(len(classes), dtype=np.float32)
    relevance = (text @ labels.float().T).numpy()[np.arange(len(classes)), classes]
    for rows in members:
        place[rows] = np.arange(len(rows))
        matrix = (image[rows] @ text[rows].T).numpy()
        easiness = matrix.diagonal().copy()
        matrix[matrix <= 0] = 0
        similarities.append(matrix)
        if len(rows):
            cross[rows] = (matrix.sum(0) + matrix.sum(1)) / len(rows)
            score[rows] = cross[rows] + 2 * easiness + 0.5 * relevance[rows] - between[rows]
    picked: list[int] = []
    picks: list[list[int]] = [[] for _ in members]
    since: list[list[int]] = [[] for _ in members]
    order, at = np.argsort(-score), 0
    while len(picked) < budget:
        row = int(order[at])
        at += 1
        c = int(classes[row])
        picked.append(row)
        picks[c].append(row)
        since[c].append(row)
        score[row] = -np.inf
        if (len(picks[c]) + 1) % interval == 0:
            rows, new = members[c], place[since[c]]
            matrix = similarities[c]
            score[rows] -= (matrix[:, new].sum(1) + matrix[new].sum(0)) / len(rows)
            score[rows] -= cross[picks[c]].sum() / len(rows)
            score[rows] -= 0.5 * relevance[since[c]].sum() / len(rows)
            since[c] = []
            order, at = np.argsort(-score), 0
    return picked
