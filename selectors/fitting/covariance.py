"""Second moments of features, uncentred, and the quadratic forms that they define.

Sums are exact: features are rounded to multiples of `UNIT`, and their products are added as whole
numbers. So a sum depends neither on the order of the samples, nor on chunks, nor on ranks, and
taking samples away again leaves no trace of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.source import Cache, FeatureFile, Requirements, Source
from siftclip.selectors.kernels.blocks import usable_rows
from siftclip.selectors.kernels.hardware import int8_is_fast

UNIT = 2.0**-18  # fp16 values of at least 2^-8 are multiples of it; smaller ones move by <= 2^-19
LARGEST_SUM = 2.0**62  # of whole numbers in int64, with room for the sum over ranks
_PIECE_SAMPLES = 4096  # float64 holds the sum of so many products exactly, for norms of up to 5
_CACHED_SAMPLES = 256  # a core's cache holds what is worked out for so many
_LARGEST_DIGITS = 3.9  # a component whose digits are int8, sums of two digits included


def second_moment(left: Tensor, right: Tensor | None = None) -> Tensor:
    """Sum x y^T over samples, in units of UNIT^2: int64 [d, e]; x x^T without `right`.

    Samples with a vector that is zero or not finite are left out.

    Args:
        left: float [n, d], the x.
        right: float [n, e], the y.
    """
    usable = usable_rows(left) if right is None else usable_rows(left) & usable_rows(right)
    if not usable.all():
        left, right = left[usable], None if right is None else right[usable]
    columns = left.shape[1] if right is None else right.shape[1]
    total = torch.zeros(left.shape[1], columns, dtype=torch.int64, device=left.device)
    digits = right is None and left.device.type == "cpu" and int8_is_fast()
    for start in range(0, len(left), _PIECE_SAMPLES):
        x = left[start : start + _PIECE_SAMPLES]
        if right is not None:
            y = _whole_numbers(right[start : start + _PIECE_SAMPLES])
            total += (_whole_numbers(x).T @ y).to(torch.int64)
        elif digits and _largest_component(x) <= _LARGEST_DIGITS:
            _add_square(total, _digits(x), _product_of_digits)
        else:
            _add_square(total, (_whole_numbers(x),), lambda x, y: x.T @ y)
    return total


def _largest_component(features: Tensor) -> float:
    """Return the largest |x| of all vectors, float [n, d] with n at least 1."""
    wide = torch.promote_types(features.dtype, torch.float32)  # half is slow on a CPU
    return max(float(x.to(wide).abs().amax()) for x in torch.split(features, _CACHED_SAMPLES))


def _whole_numbers(features: Tensor) -> Tensor:
    return features.double().mul_(1.0 / UNIT).round_()


def _digits(features: Tensor) -> tuple[Tensor, ...]:
    """Split components of at most _LARGEST_DIGITS into digits: whole numbers 2^14 a + 2^7 b + c.

    Returns:
        a, b, c, all in [-64, 64], and a + b, a + c, b + c: int8 [n, d] each. No sum is 128: a is
        at most 62, and c is not above 0 where b is 64.
    """
    a, b, c = (torch.empty(features.shape, dtype=torch.int8) for _ in range(3))
    for start in range(0, len(features), _CACHED_SAMPLES):
        piece = slice(start, start + _CACHED_SAMPLES)
        left = features[piece].to(torch.promote_types(features.dtype, torch.float32))
        left = (left * (1.0 / UNIT)).round_().float()  # below 2^20, so exact in float32
        for digits, unit in ((a, 2.0**14), (b, 2.0**7)):
            high = (left * (1.0 / unit)).round_()
            digits[piece] = high
            left.sub_(high, alpha=unit)
        c[piece] = left
    return a, b, c, a + b, a + c, b + c


def _product_of_digits(*pairs: Tensor) -> Tensor:
    """Multiply x^T y in digits: int8 [n, d] six times, then [n, e] six times -> float64 [d, e].

    The mixed products a^T b + b^T a are (a + b)^T (a + b) - a^T a - b^T b, for which six int8
    products do. On a CPU they are faster than a single one in float64.
    """
    half = len(pairs) // 2
    aa, bb, cc, ab, ac, bc = map(torch._int_mm, (x.T for x in pairs[:half]), pairs[half:])
    total = aa.double()  # exact, as sums of _PIECE_SAMPLES whole numbers below 2^20 squared are
    for digits in (ab - aa - bb, ac - aa - cc + bb, bc - bb - cc, cc):
        total.mul_(2.0**7).add_(digits.double())
    return total


def _add_square(
    total: Tensor, x: tuple[Tensor, ...], product: Callable[..., Tensor], width: int = 128
) -> None:
    """Add x^T x, of which only the blocks below and on the diagonal are multiplied.

    `product` takes columns of all tensors in x, and then other columns of them, and multiplies.
    """
    for start in range(0, len(total), width):
        rows, columns = slice(start, start + width), slice(start + width)
        pairs = (*(part[:, rows] for part in x), *(part[:, columns] for part in x))
        block = product(*pairs).to(torch.int64)
        total[rows, columns] += block
        total[:start, rows] += block[:, :start].T


def mean_moment(sums: Tensor, samples: int) -> Tensor:
    """Compute the mean from exact sums: int64 [d, e] -> float64 [d, e]. That of none is zero."""
    return sums.double() * (UNIT * UNIT / max(1, samples))


def quadratic_form(features: Tensor, matrix: Tensor) -> Tensor:
    """Compute x^T S x of each sample: float32 [n].

    Args:
        features: float [n, d].
        matrix: float [d, d], the S; only its symmetric part matters.

    The products above the diagonal are taken twice instead of those below it, which saves nearly
    half of the multiplications: on a CPU 2.2 times as fast as (X S * X).sum(1), at d = 512.
    """
    matrix = matrix.float()
    dim = len(matrix)
    on_cpu = features.device.type == "cpu"
    # pieces whose products stay in the cache of a core; a GPU wants few large products
    width, samples = (64, 512) if on_cpu else (max(256, dim // 4), 1 << 16)
    blocks = []
    for start in range(0, dim, width):
        stop = start + width
        block = matrix[:stop, start:stop] + matrix[start:stop, :stop].T
        # on the diagonal it is multiplied whole: what is below the diagonal is zero
        block[start:].triu_().diagonal().mul_(0.5)
        blocks.append((start, block))
    scores = torch.empty(len(features), dtype=torch.float32, device=features.device)
    for first in range(0, len(features), samples):
        x = features[first : first + samples].float()
        scores[first : first + samples] = sum(
            torch.linalg.vecdot(x[:, : len(block)] @ block, x[:, start : start + width])
            for start, block in blocks
        )
    return scores


def low_rank_form(features: Tensor, basis: Tensor, values: Tensor) -> Tensor:
    """Compute the sum over k of v_k <x, b_k>^2: float32 [n].

    Args:
        features: float [n, d].
        basis: float32 [d, r], the b_k.
        values: float32 [r].
    """
    samples = 512 if features.device.type == "cpu" else 1 << 16
    pieces = [(x.float() @ basis).square_() @ values for x in torch.split(features, samples)]
    return torch.cat(pieces) if pieces else features.new_zeros(0)


def bilinear_form(left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
    """Compute x^T S y of each sample: float32 [n]; x is float [n, d], y float [n, e], S [d, e]."""
    matrix = matrix.float()
    samples = 512 if left.device.type == "cpu" else 1 << 16
    pieces = zip(torch.split(left, samples), torch.split(right, samples), strict=True)
    return torch.cat([torch.linalg.vecdot(x.float() @ matrix, y.float()) for x, y in pieces])


def large_part(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor, float]:
    """Approximate a symmetric matrix by a sum of v_k b_k b_k^T, its largest eigenvectors.

    Args:
        matrix: float64 [d, d].
        start: float32 [d, r], guessed vectors, linearly independent; the last basis does well.

    Returns:
        The orthonormal b_k, float32 [d, r], the v_k, float32 [r], and a bound of the absolute
        eigenvalues of what is left of the matrix. The bound is valid however good the basis is.

    For the rest R it is the fourth root of the sum of the fourth powers of all eigenvalues, the
    Frobenius norm of R^2: for noise under three times the largest, at a third of the cost.
    """
    scale = float(torch.linalg.matrix_norm(matrix))
    if scale == 0.0:
        return start, start.new_zeros(start.shape[1]), 0.0
    scaled = (matrix / scale).float()
    basis = torch.linalg.qr(scaled @ (scaled @ start))[0]
    values, turn = torch.linalg.eigh(basis.T @ scaled @ basis)
    basis = basis @ turn
    rest = scaled - (basis * values) @ basis.T
    # float32 may be off by d * 2^-24 of a Frobenius norm, and by 1e-5 in the rest itself
    fourth = float(torch.linalg.matrix_norm(rest @ rest))
    fourth += len(matrix) * 2.0**-24 * float(torch.linalg.matrix_norm(rest)) ** 2
    return basis, values * scale, (fourth**0.5 + 1e-5) * scale


def check_sums(owner: str, sums: Tensor) -> Tensor:
    """Return exact sums if they cannot have overflowed.

    Raises:
        InputError: `owner`'s features are far from unit norm.
    """
    if sums.numel() and sums.double().abs().max() > LARGEST_SUM:
        raise InputError(
            f"{owner}: the features are too large to add exactly. Their norms must be about 1, as "
            "CLIP's are when normalised."
        )
    return sums


def rows_of(source: Source, requires: Requirements) -> np.ndarray:
    """Return the rows that have what is required, int64 [n], in the order of their storage."""
    parts = [part.rows for part in source.parts(requires)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def share(rows: np.ndarray, ranks: Ranks) -> np.ndarray:
    """Return this rank's part of an array, of about equal size."""
    return np.array_split(rows, ranks.size)[ranks.rank]


def pool_moment(
    owner: str, source: Source, rows: np.ndarray, requires: Requirements
) -> tuple[Tensor, int]:
    """Sum exactly over some samples of a source, on all ranks, and count the usable ones.

    Args:
        owner: the class that asks, for errors.
        source: the samples.
        rows: int64 [n]; those that are not usable are left out.
        requires: with one feature key for x x^T, with two for x y^T.
    """
    mine = share(rows, source.ranks)
    with source.bar(len(mine), f"{owner}: covariance") as bar:

        def features() -> Iterator[tuple[Tensor, ...]]:
            for chunk in source.chunks(mine, requires):
                yield tuple(chunk.features[key] for key in requires.features)
                bar.update(len(chunk))

        return _sum_pieces(owner, source, features())


def file_moment(owner: str, source: Source, files: tuple[FeatureFile, ...]) -> tuple[Tensor, int]:
    """Sum exactly over the rows of feature files, and count the usable ones; see `pool_moment`.

    Raises:
        InputError: two files have different numbers of rows.
    """

    def pieces() -> Iterator[tuple[Tensor, ...]]:
        readers = zip_longest(*(source.file(file) for file in files))
        for number, piece in enumerate(readers):
            if any(part is None or len(part) != len(piece[0]) for part in piece):
                names = " and ".join(f"{file.path} ({file.key})" for file in files)
                raise InputError(f"{owner}: the target's {names} must have as many rows each.")
            if number % source.ranks.size == source.ranks.rank:
                yield piece
            else:
                yield tuple(part[:0] for part in piece)

    return _sum_pieces(owner, source, pieces())


def kept_moment(
    source: Source, cache: Cache, name: str, compute: Callable[[], tuple[Tensor, int]]
) -> tuple[Tensor, int]:
    """Return the sum that was kept under `name`, or that of `compute`, which is then kept."""
    kept = cache.get(name)
    if all_ranks(source.ranks, kept is not None) and kept is not None:
        return torch.from_numpy(kept["sums"]).to(source.device), int(kept["samples"])
    sums, samples = compute()
    if source.ranks.rank == 0:
        cache.put(name, sums=sums.cpu().numpy(), samples=np.asarray(samples))
    return sums, samples


def all_ranks(ranks: Ranks, flag: bool) -> bool:
    """Return whether `flag` is true on every rank, so that all of them take the same way."""
    return int(ranks.sum(torch.tensor(int(flag)))) == ranks.size


def _sum_pieces(
    owner: str, source: Source, pieces: Iterator[tuple[Tensor, ...]]
) -> tuple[Tensor, int]:
    total: Tensor | None = None
    samples = 0
    for piece in pieces:
        moment = second_moment(*piece)
        total = moment if total is None else total.add_(moment)
        samples += int(torch.stack([usable_rows(part) for part in piece]).all(0).sum())
    # A rank without samples does not know the shape, which the others tell it.
    shape = torch.tensor([0, 0] if total is None else total.shape)
    having = int(source.ranks.sum(torch.tensor(int(total is not None))))
    shape = source.ranks.sum(shape) // max(1, having)
    if total is None:
        total = torch.zeros(*shape.tolist(), dtype=torch.int64, device=source.device)
    samples = int(source.ranks.sum(torch.tensor(samples)))
    return check_sums(owner, source.ranks.sum(total)), samples
