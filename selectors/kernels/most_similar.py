"""The vector with the largest inner product, exactly, without the matrix of all inner products.

Float32 products decide wherever their rounding error cannot change the answer; the rest is decided
in float64. So the answer depends neither on the sizes of the pieces in which vectors are given nor
on the device. Products in bfloat16 first, as a coarser sieve, were no faster (768 dimensions, an
AVX-512 CPU with bfloat16): their error leaves several candidates a vector open.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_CPU, _TILE_GPU = 1024, 8192  # vectors on each side of the products that exist at one time
# Of an inner product, in parts of the two norms, where torch may round the factors of a float32
# product: to TensorFloat-32 or two bfloat16 numbers ("high"), or to one ("medium").
_FACTOR_ERROR = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


def most_similar(
    features: Tensor, others: Tensor, *, bias: Tensor | None = None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the one of `others` with the largest inner product, and the product, for each vector.

    Equal products go to the smaller index.

    Args:
        features: float [n, d].
        others: float [k, d].
        bias: float [k], added to the products with each of `others`.
        before: int64 [n]; compare vector i with the first `before[i]` of `others` alone.

    Returns:
        indices int64 [n] and products float32 [n], rounded from float64; -1 and -inf for a vector
        that has nothing to be compared with, or a component that is not finite.
    """
    tile = _TILE_CPU if features.device.type == "cpu" else _TILE_GPU
    largest = others.float().norm(dim=1).max() if len(others) else others.new_zeros(())
    offset = torch.zeros(()) if bias is None else bias.abs().max()
    answers = [
        _most_similar_rows(
            rows,
            others,
            bias,
            before[start : start + tile] if before is not None else None,
            tile,
            float(largest),
            float(offset),
        )
        for start, rows in zip(
            range(0, len(features), tile), torch.split(features, tile), strict=False
        )
    ]
    if not answers:
        return features.new_empty(0, dtype=torch.int64), features.new_empty(0, dtype=torch.float32)
    indices, products = zip(*answers, strict=True)
    return torch.cat(indices), torch.cat(products).float()


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Multiply each pair of rows, float [n, d] both: inner products float64 [n]."""
    return (left.double() * right.double()).sum(1)


def rounding_bound(dim: int) -> float:
    """Bound the error of a float32 inner product, in parts of the product of the two norms."""
    return (dim + 4) * 2.0**-24 + _FACTOR_ERROR[torch.get_float32_matmul_precision()]


def _most_similar_rows(
    features: Tensor,
    others: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    tile: int,
    largest: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Apply `most_similar` to one tile of vectors, whose products are float64."""
    values = features.float()
    scale = values.norm(dim=1).double() * largest + offset
    undecided = 2 * rounding_bound(values.shape[1]) * scale  # two products, each with its error
    equal = 2 * values.shape[1] * 2.0**-53 * scale  # two float64 products of equal vectors
    best = torch.full_like(scale, -torch.inf)
    index = torch.full_like(scale, -1, dtype=torch.int64)
    for start in range(0, len(others), tile):
        columns = others[start : start + tile].float()
        shift = None if bias is None else bias[start : start + tile]
        products = values @ columns.T if shift is None else values @ columns.T + shift.float()
        if before is not None:
            _hide(products, before - start)
        top = products.amax(1).double()
        open_rows = torch.nonzero((top > -torch.inf) & (top >= best - undecided))[:, 0]
        if not len(open_rows):
            continue
        near = products[open_rows] >= (top - undecided)[open_rows, None].float().nextafter(
            torch.tensor(-torch.inf, device=values.device)
        )
        nearest = near.to(torch.uint8).argmax(1)
        exact = inner_products(values[open_rows], columns[nearest])
        if shift is not None:
            exact = exact + shift.double()[nearest]
        several = torch.nonzero(near.sum(1) > 1)[:, 0]
        if len(several):
            rows = open_rows[several]
            wide = values[rows].double() @ columns.double().T
            wide = wide if shift is None else wide + shift.double()
            if before is not None:
                _hide(wide, before[rows] - start)
            first = (wide >= (wide.amax(1) - equal[rows])[:, None]).to(torch.uint8).argmax(1)
            nearest[several] = first
            exact[several] = inner_products(values[rows], columns[first])
            if shift is not None:
                exact[several] += shift.double()[first]
        better = exact > best[open_rows] + equal[open_rows]
        rows = open_rows[better]
        best[rows], index[rows] = exact[better], nearest[better] + start
    return index, best


def _hide(products: Tensor, before: Tensor) -> None:
    """Set the products of row i from column `before[i]` on to -inf, in place."""
    columns = torch.arange(products.shape[1], device=products.device)
    products.masked_fill_(columns[None, :] >= before[:, None], -torch.inf)
