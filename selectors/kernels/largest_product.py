"""The largest |<x, g>| over many targets g, exact in float32, mostly found with int8 products.

On a CPU with int8 instructions their product is four times as fast as that of float32. It bounds
every inner product: for x = q + r, where q is x rounded to eight bits, and the like for g,

    |<x, g> - <q_x, q_g>| <= |x| |r_g| + |r_x| |q_g|.

Groups of targets whose bound is below the largest product found so far are skipped, and the others
multiplied in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # targets that are skipped or multiplied together
_TILE = 512  # targets and samples of a product, so that its answer stays in a core's cache
_BLOCK = 1 << 15  # targets between two looks at what was found, which bounds the memory
_PER_PIVOT, _PIVOTS = 64, 1024  # targets to a pivot at least, and pivots at most
_ROWS = 4096  # samples at a time
_LEVELS = 127
_DEVIATIONS = 4.0  # what is beyond so many is cut off by rounding; any value gives a right answer
_ROUNDING = 1e-5  # of float32 in all that is compared, of the product of the norms


def largest_product(features: Tensor, targets: Tensor) -> Tensor:
    """Compute the largest |<x, g>| over all targets, by plain products: float32 [n].

    Args:
        features: float [n, d].
        targets: float [m, d], m at least 1.
    """
    best = torch.zeros(len(features), device=features.device)
    if features.device.type == "cpu":
        features = features.float()
    for block in torch.split(targets, _TILE if features.device.type == "cpu" else _BLOCK):
        products = multiply(features, block)
        best = torch.maximum(best, torch.maximum(products.amax(1), -products.amin(1)))
    return best


def multiply(features: Tensor, targets: Tensor) -> Tensor:
    """Multiply all pairs, float32 [n, m]; on a GPU from half precision as stored."""
    if features.is_cuda and features.dtype == targets.dtype == torch.float16:
        # products of halves are exact in float32, in which they are added
        return torch.mm(features, targets.T, out_dtype=torch.float32)
    return features.float() @ targets.float().T


class Int8Targets:
    """Targets on a CPU, ready to be searched for the largest product."""

    def __init__(self, targets: Tensor) -> None:
        """Round targets, float [m, d], m at least 1, finite; they are kept as they are too."""
        dim = targets.shape[1]
        # A few components of CLIP features are far larger than the others. Rotated and centred
        # ones are about normally distributed, for which equal steps of rounding are right.
        generator = torch.Generator().manual_seed(0)
        self._rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
        total = sum(
            (block.float().sum(0) for block in torch.split(targets, _TILE)), torch.zeros(dim)
        )
        self._mean = total / len(targets)
        self._targets = targets = targets[_order(targets)]
        missing = -len(targets) % GROUP
        self._rounded = torch.zeros(len(targets) + missing, dim, dtype=torch.int8)
        squares = sum(
            float((block.float() - self._mean).square().sum())
            for block in torch.split(targets, _TILE)
        )
        # one step for all targets, so that their products can be compared as whole numbers
        self._step = _DEVIATIONS * (squares / targets.numel()) ** 0.5 / _LEVELS or 1.0
        residual, norm = 0.0, 0.0
        for start in range(0, len(targets), _TILE):
            block = (targets[start : start + _TILE].float() - self._mean) @ self._rotation
            rounded = _round(block, self._step)
            self._rounded[start : start + len(block)] = rounded
            kept = rounded.float() * self._step
            residual = max(residual, float((block - kept).norm(dim=1).max()))
            norm = max(norm, float(kept.norm(dim=1).max()))
        if missing:  # repeat a target, which changes no maximum
            self._rounded[len(targets) :] = self._rounded[len(targets) - 1]
        self._residual, self._norm = residual, norm

    def search(self, features: Tensor) -> Tensor:
        """Find the largest |<x, g>|: float [n, d] -> float32 [n]; anything if x is not finite."""
        usable = features.isfinite().all(1)
        scores = torch.full((len(features),), torch.nan)
        if usable.any():
            pieces = torch.split(features[usable], _ROWS)
            scores[usable] = torch.cat([self._search(piece.float()) for piece in pieces])
        return scores

    def _search(self, features: Tensor) -> Tensor:
        rotated = features @ self._rotation
        norms = features.norm(dim=1)
        steps = (_DEVIATIONS * norms / features.shape[1] ** 0.5 / _LEVELS).clamp_min(1e-30)
        rounded = _round(rotated, steps[:, None])
        residual = (rotated - rounded.float() * steps[:, None]).norm(dim=1)
        shift = features @ self._mean
        slack = norms * self._residual + residual * self._norm
        slack += _ROUNDING * norms * (self._norm + self._residual + 2 * float(self._mean.norm()))
        best = torch.full((len(features),), -1.0)
        columns = rounded.T.contiguous()
        for start in range(0, len(self._rounded), _BLOCK):
            bounds = self._bounds(columns, start, steps * self._step, shift)
            if start == 0:  # what is probably the best group gives a first value to beat
                probable = bounds.argmax(0)
                probable_groups = torch.arange(len(bounds))[:, None] == probable
                self._improve(best, features, probable_groups, start)
            self._improve(best, features, bounds >= best - slack, start)
        return best

    def _bounds(self, columns: Tensor, start: int, unit: Tensor, shift: Tensor) -> Tensor:
        """Bound the largest |product| of each group by int8 products: float32 [groups, n]."""
        tiles = torch.split(self._rounded[start : start + _BLOCK], _TILE)
        bounds = torch.empty(sum(map(len, tiles)) // GROUP, columns.shape[1])
        for first in range(0, columns.shape[1], _TILE):
            piece = slice(first, first + _TILE)
            some, row = columns[:, piece].contiguous(), 0
            for tile in tiles:
                products = torch._int_mm(tile, some).view(-1, GROUP, some.shape[1])
                high = products.amax(1).float().mul_(unit[piece]).add_(shift[piece])
                low = products.amin(1).float().mul_(unit[piece]).add_(shift[piece])
                bounds[row : row + len(high), piece] = torch.maximum(high, low.neg_())
                row += len(high)
        return bounds

    def _improve(self, best: Tensor, features: Tensor, groups: Tensor, start: int) -> None:
        """Multiply samples with groups of targets where bool [groups, n] says so."""
        for group in groups.any(1).nonzero()[:, 0].tolist():
            rows = groups[group].nonzero()[:, 0]
            first = start + group * GROUP
            targets = self._targets[first : first + GROUP].float()
            products = (features[rows] @ targets.T).abs_().amax(1)
            best[rows] = torch.maximum(best[rows], products)


def _order(targets: Tensor) -> Tensor:
    """Order targets so that similar ones follow each other, and few groups matter: int64 [m]."""
    pivots = targets[:: max(_PER_PIVOT, -(-len(targets) // _PIVOTS))]
    nearest = [multiply(block, pivots).argmax(1) for block in torch.split(targets, _TILE)]
    return torch.cat(nearest).argsort(stable=True)


def _round(values: Tensor, step: Tensor | float) -> Tensor:
    return (values / step).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)
