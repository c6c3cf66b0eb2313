"""Log-sum-exps of the rows and columns of a similarity matrix that is never stored.

`pair_log_sums` is exact to float32 rounding. `screened_log_sums` multiplies 8-bit integers, which a
CPU does about five times as fast, and bounds its own error for every row and column. Both compute
one product tile by tile for the two directions: O((m + n) d) memory for m x n pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)
# Rows and columns of a tile. On one thread of a Zen 5 at d = 512, `screened_log_sums` takes 4.4 ns
# a pair with 1024 and 5.0 with 512; float32 is fastest at 512. A GPU needs more to be filled.
CPU_TILE, INTEGER_TILE, GPU_TILE = 512, 1024, 4096
TOP = 100.0  # log2 of the largest term: 2^27 of them can be added in float32
FLOOR = 2.0**-60  # a smaller sum may have lost terms that count; float32 ends at 2^-126


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSums:
    """What `screened_log_sums` answers, all float32, in units of the natural logarithm."""

    row: Tensor  # [m]
    column: Tensor  # [n]
    row_error: Tensor  # [m], at least 0
    column_error: Tensor  # [n]


def pair_log_sums(image: Tensor, text: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute log sum_j exp(<v_i, t_j> / temperature) of every image i, and the same of every text.

    Products and sums are float32; of float16 or bfloat16 features a GPU multiplies the stored
    values and accumulates in float32, which are the same inputs. All exponents get one shift, from
    the norms. The released code (`vas2.cs_new_helper`) has none and overflows where a similarity
    exceeds 88.7 times the temperature; rows and columns that the shift does not suit, which unit
    vectors of ordinary models never have, are done again in float64 with their own maximum.

    Args:
        image: float [m, d], finite; need not be of unit norm. m and n may differ.
        text: float [n, d], finite.
        temperature: above 0.

    Returns:
        float32 [m] and float32 [n]; -inf where the other side is empty.
    """
    scale = LOG2_E / temperature
    row, column = (image.new_zeros(len(x), dtype=torch.float64) for x in (image, text))
    if len(image) and len(text):
        a, b = _operands(image, text)
        limit = _largest_norm(a) * _largest_norm(b) * scale
        shift = max(0.0, limit - TOP)
        offset = torch.tensor(-shift, dtype=torch.float32, device=image.device)
        for i, j in _tiles(a, b, GPU_TILE if a.is_cuda else CPU_TILE):
            terms = _product(a[i], b[j])
            torch.add(offset, terms, alpha=scale, out=terms)
            terms.exp2_()
            row[i] += terms.sum(1)
            column[j] += terms.sum(0)
        lost_row, lost_column = (~((x >= FLOOR) & x.isfinite()) for x in (row, column))
        row, column = ((x.log2() + shift) / LOG2_E for x in (row, column))
        if lost_row.any():
            row[lost_row] = _safe_log_sums(image[lost_row], text, temperature)
        if lost_column.any():
            column[lost_column] = _safe_log_sums(text[lost_column], image, temperature)
        return row.float(), column.float()
    return row.log().float(), column.log().float()


def screened_log_sums(image: Tensor, text: Tensor, temperature: float) -> LogSums:
    """Compute `pair_log_sums` of quantised features, and bound the error of each row and column.

    Features lose their mean, whose products are added exactly, and the rest r is rounded to
    8-bit integers times a step of each row: r = q + e. By Cauchy-Schwarz a product is wrong by at
    most |e_i| |r_j| + |q_i| |e_j|. The part of this bound that depends on j is added to the
    exponents in a second sum with other weights, which gives a log-sum-exp from above; by Jensen's
    inequality it bounds the error downwards, too. Products of integers are exact, and float32
    rounding elsewhere is in the bound. Only for the CPU: a GPU's 16-bit products are fast and
    lose nothing.

    Args:
        image: float [m, d], finite.
        text: float [n, d], finite, n and m at least 1.
        temperature: above 0.

    Returns:
        Values and errors; of a row with an error e the true value is within e of the answer. The
        errors are inf where float32 cannot hold the norms.
    """
    scale = LOG2_E / temperature
    v, t = image.float(), text.float()
    mean_v, mean_t = v.mean(0), t.mean(0)
    left, right = _quantise(v, mean_v), _quantise(t, mean_t)
    # s = <r_i, mean_t> + <mean_v, t_j> + <r_i, r_j>: the first two become weights of the sums
    of_row, of_column = (v @ mean_t - mean_v @ mean_t) * scale, t @ mean_v * scale
    top_row, top_column = of_row.max(), of_column.max()
    base_row, spread_column = _error_terms(left, right)
    base_column, spread_row = _error_terms(right, left)
    row_weights = _weights(of_row - top_row, spread_row * scale)
    column_weights = _weights(of_column - top_column, spread_column * scale)
    row_sums, column_sums = (v.new_zeros((2, len(x)), dtype=torch.float64) for x in (v, t))
    shift = max(0.0, float(left.norm.max() * right.norm.max()) * scale - TOP)
    left_step, right_step = (left.step * scale)[:, None], right.step[None]
    for i, j in _tiles(v, t, INTEGER_TILE):
        terms = torch._int_mm(left.whole[i], right.whole[j].T).float()
        terms.mul_(left_step[i]).mul_(right_step[:, j])
        if shift:
            terms.sub_(shift)
        terms.exp2_()
        for k in (0, 1):  # a product with two columns at once takes ten times as long
            row_sums[k, i] += terms @ column_weights[k, j]
            column_sums[k, j] += row_weights[k, i] @ terms
    rounding = 2.0**-18 * _largest_norm(v) * _largest_norm(t) / temperature + 2.0**-14
    row, column = (
        _bounded(
            rows, columns, sums, (ours + theirs + shift) / LOG2_E, bound, rounding, temperature
        )
        for rows, columns, sums, ours, theirs, bound in (
            (v, t, row_sums, of_row, top_column, base_row / temperature),
            (t, v, column_sums, of_column, top_row, base_column / temperature),
        )
    )
    return LogSums(row=row[0], column=column[0], row_error=row[1], column_error=column[1])


@dataclass(frozen=True, slots=True)
class _Quantised:
    """Vectors r = q + e, q = step * whole."""

    whole: Tensor  # int8 [n, d]
    step: Tensor  # float32 [n]
    norm: Tensor  # float32 [n], of r
    rounded_norm: Tensor  # float32 [n], of q
    error_norm: Tensor  # float32 [n], of e


def _quantise(values: Tensor, mean: Tensor) -> _Quantised:
    """Round float32 [n, d] less its mean, each row with the step that its largest entry allows."""
    pieces = []
    for piece in torch.split(values, CPU_TILE):  # which the cache holds
        piece = piece - mean
        step = (piece.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        whole = (piece / step).round_()
        rounded = whole * step
        norms = (x.norm(dim=1) for x in (piece, rounded, piece - rounded))
        pieces.append((whole.to(torch.int8), step[:, 0], *norms))
    return _Quantised(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def _error_terms(left: _Quantised, right: _Quantised) -> tuple[Tensor, Tensor]:
    """Bound the error of a product of own i and other j by x_i + y_j: return x and y.

    A bound a_i b_j is split at the median of b: a_i b_median + a_largest (b_j - b_median)+.
    """
    norm, error = right.norm.median(), right.error_norm.median()
    of_left = left.error_norm * norm + left.rounded_norm * error
    of_right = left.error_norm.max() * (right.norm - norm).clamp_min(0)
    of_right += left.rounded_norm.max() * (right.error_norm - error).clamp_min(0)
    return of_left, of_right


def _weights(exponent: Tensor, spread: Tensor) -> Tensor:
    """Return weights of the sums, and of the sums from above: float32 [2, n]."""
    return torch.stack([exponent.exp2(), (exponent + spread).exp2()])


def _bounded(
    left: Tensor,
    right: Tensor,
    sums: Tensor,
    offset: Tensor,
    bound: Tensor,
    rounding: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Take logarithms of sums, float64 [2, n], plus an offset, and their errors: float32 [n].

    The second row of the sums is the one from above. What is too small to be trusted is done again
    by `pair_log_sums`.
    """
    logs = sums.log()
    values, error = (logs[0] + offset).float(), (bound + logs[1] - logs[0] + rounding).float()
    lost = ~((sums[0] >= FLOOR) & values.isfinite() & error.isfinite())
    if lost.any():
        values[lost], _ = pair_log_sums(left[lost], right, temperature)
        error[lost] = rounding
    return values, error


def _operands(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as stored if they have 16 bits, for the matrix units of a GPU; else float32."""
    if image.is_cuda and image.dtype == text.dtype and image.dtype in (torch.half, torch.bfloat16):
        return image, text
    return image.float(), text.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b.T in float32."""
    if a.dtype == torch.float32:
        return a @ b.T
    return torch.mm(a, b.T, out_dtype=torch.float32)


def _largest_norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dim=1, dtype=torch.float32).max())


def _tiles(a: Tensor, b: Tensor, tile: int) -> Iterator[tuple[slice, slice]]:
    """Yield pieces of the rows of both; wider where one of them has few."""
    rows = max(tile, tile * tile // len(b))
    columns = max(tile, tile * tile // len(a))
    for i in range(0, len(a), rows):
        for j in range(0, len(b), columns):
            yield slice(i, i + rows), slice(j, j + columns)


def _safe_log_sums(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Compute the log-sum-exps of <query, key> / temperature, whatever their range: float64 [q]."""
    query, keys = query.double() / temperature, keys.double()
    tile = GPU_TILE if keys.is_cuda else CPU_TILE
    return torch.cat(
        [
            torch.stack([(q @ k.T).logsumexp(1) for k in torch.split(keys, tile)]).logsumexp(0)
            for q in torch.split(query, tile)
        ]
    )
