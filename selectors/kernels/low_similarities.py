"""Which image-text similarities do not exceed a threshold, found without keeping the matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from siftclip.selectors.kernels.hardware import has_fast_bfloat16

TILE = (1024, 4096)  # images and texts of a piece of the matrix: 8 MB in bfloat16
# Rounding both factors to bfloat16 changes an inner product by at most 2 u |v||t|, with u = 2^-8;
# rounding the result adds u |v||t|. The rest is for the sum in float32 and terms of order u^2.
BFLOAT16_ERROR = 3.25 * 2.0**-8


@dataclass(frozen=True, slots=True, kw_only=True)
class LowSimilarities:
    """What does not exceed the threshold, by image and by text."""

    image_sums: Tensor  # float64 [a], of an image's similarities that are low
    text_sums: Tensor  # float64 [b]
    image_low: Tensor  # bool [a], whether there is any
    text_low: Tensor  # bool [b]


def low_similarities(
    image_features: Tensor, text_features: Tensor, threshold: float
) -> LowSimilarities:
    """Find the inner products of images and texts that are at most `threshold`.

    The sum of the similarities that exceed a threshold is the sum of all of them, which is linear,
    less the sum of those that do not. Those are few where the threshold is 0 and the features come
    from CLIP. Where the hardware multiplies bfloat16 faster, its products are taken first: only
    the rows and columns of a tile in which the error bound leaves something open are multiplied in
    float32. So the answer has the precision of float32.

    Args:
        image_features: float [a, d], finite.
        text_features: float [b, d], finite.
        threshold: any number; 0 in ClipCov.

    Returns:
        Sums and flags on the device of the features. Memory is that of a tile.
    """
    device = image_features.device
    rows, columns = len(image_features), len(text_features)
    image_sums = torch.zeros(rows, dtype=torch.float64, device=device)
    text_sums = torch.zeros(columns, dtype=torch.float64, device=device)
    image_low = torch.zeros(rows, dtype=torch.bool, device=device)
    text_low = torch.zeros(columns, dtype=torch.bool, device=device)
    coarse = has_fast_bfloat16(device)
    for start in range(0, columns, TILE[1]):
        texts = text_features[start : start + TILE[1]]
        text_norm = torch.linalg.vector_norm(texts, dim=1, dtype=torch.float32).max()
        for begin in range(0, rows, TILE[0]):
            images = image_features[begin : begin + TILE[0]]
            at: slice | Tensor = slice(begin, begin + len(images))
            to: slice | Tensor = slice(start, start + len(texts))
            right = texts
            if coarse:
                norm = torch.linalg.vector_norm(images, dim=1, dtype=torch.float32).max()
                limit = threshold + float(norm * text_norm) * BFLOAT16_ERROR
                # By way of float32: several times faster than float16 to bfloat16 on a CPU.
                products = images.float().bfloat16() @ texts.float().bfloat16().T
                at = (products.amin(1).float() <= limit).nonzero()[:, 0]
                if len(at) == 0:
                    continue
                to = (products.amin(0).float() <= limit).nonzero()[:, 0]
                images, right = images[at], texts[to]
                at, to = at + begin, to + start
                # Where the bound decides little, it costs more than it saves.
                coarse = 2 * len(images) * len(right) < products.numel()
            exact = images.float() @ right.float().T
            low = exact <= threshold
            exact.masked_fill_(~low, 0.0)
            image_sums[at] += exact.sum(1, dtype=torch.float64)
            text_sums[to] += exact.sum(0, dtype=torch.float64)
            image_low[at] |= low.any(1)
            text_low[to] |= low.any(0)
    return LowSimilarities(
        image_sums=image_sums, text_sums=text_sums, image_low=image_low, text_low=text_low
    )
