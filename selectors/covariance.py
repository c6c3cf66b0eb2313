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

from siftclip.selectors.errors import InputError
from siftclip.selectors.ranks import Ranks
from siftclip.selectors.source import FeatureFile, Memo, Requirements, Source

UNIT = 2.0**-18  # fp16 values of at least 2^-8 are multiples of it; smaller ones move by <= 2^-19
LARGEST_SUM = 2.0**62  # of whole numbers in int64, with room for the sum over ranks
_PIECE_SAMPLES = 4096  # float64 holds the sum of so many products exactly, for norms of up to 5


def second_moment(left: Tensor, right: Tensor | None = None) -> Tensor:
    """The sum of x y^T over samples, in units of UNIT^2: int64 [d, e]; x x^T without `right`.

    Samples with a vector that is zero or not finite are left out.

    Args:
        left: float [n, d], the x.
        right: float [n, e], the y.
    """
    usable = usable_rows(left) if right is None else usable_rows(left) & usable_rows(right)
    columns = left.shape[1] if right is None else right.shape[1]
    total = torch.zeros(left.shape[1], columns, dtype=torch.int64, device=left.device)
    for start in range(0, len(left), _PIECE_SAMPLES):
        piece = slice(start, start + _PIECE_SAMPLES)
        keep = usable[piece]
        x = _whole_numbers(left[piece][keep])
        if right is None:
            _add_symmetric(total, x)
        else:
            total += (x.T @ _whole_numbers(right[piece][keep])).to(torch.int64)
    return total


def usable_rows(features: Tensor) -> Tensor:
    """Which vectors are finite and not zero: float [n, d] -> bool [n]."""
    return features.isfinite().all(1) & (features != 0).any(1)


def _whole_numbers(features: Tensor) -> Tensor:
    return features.double().mul_(1.0 / UNIT).round_()


def _add_symmetric(total: Tensor, x: Tensor, width: int = 128) -> None:
    """Add x^T x, of which only the blocks below and on the diagonal are multiplied."""
    for start in range(0, x.shape[1], width):
        rows = slice(start, start + width)
        block = (x[:, rows].T @ x[:, : start + width]).to(torch.int64)
        total[rows, : start + width] += block
        total[:start, rows] += block[:, :start].T


def mean_moment(sums: Tensor, samples: int) -> Tensor:
    """The mean from exact sums: int64 [d, e] -> float64 [d, e]. Of no samples it is zero."""
    return sums.double() * (UNIT * UNIT / max(1, samples))


def quadratic_form(features: Tensor, matrix: Tensor) -> Tensor:
    """x^T S x of each sample: float32 [n].

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
    folded = torch.triu(matrix + matrix.T, 1) + torch.diag(matrix.diagonal())
    # blocks on the diagonal are multiplied whole: what is below their diagonal is zero
    blocks = [
        (start, folded[: start + width, start : start + width].contiguous())
        for start in range(0, dim, width)
    ]
    scores = torch.empty(len(features), dtype=torch.float32, device=features.device)
    for first in range(0, len(features), samples):
        x = features[first : first + samples].float()
        scores[first : first + samples] = sum(
            torch.linalg.vecdot(x[:, : len(block)] @ block, x[:, start : start + width])
            for start, block in blocks
        )
    return scores


def bilinear_form(left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
    """x^T S y of each sample: float32 [n], for float [n, d], float [n, e] and S float [d, e]."""
    matrix = matrix.float()
    samples = 512 if left.device.type == "cpu" else 1 << 16
    pieces = zip(left.split(samples), right.split(samples), strict=True)
    return torch.cat([torch.linalg.vecdot(x.float() @ matrix, y.float()) for x, y in pieces])


def eigenvalue_range(matrix: Tensor) -> tuple[float, float]:
    """Bounds of all eigenvalues of a symmetric matrix, float [d, d]: (lowest, highest).

    They are computed in float32 and widened by more than the rounding.
    """
    scale = float(torch.linalg.matrix_norm(matrix))
    if scale == 0.0:
        return 0.0, 0.0
    values = torch.linalg.eigvalsh((matrix / scale).float())
    slack = 1e-4  # of the Frobenius norm; the rounding of LAPACK is about d * 6e-8 at most
    return (float(values[0]) - slack) * scale, (float(values[-1]) + slack) * scale


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
    """The rows that have what is required, int64 [n], in the order in which they are stored."""
    parts = [part.rows for part in source.parts(requires)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def share(rows: np.ndarray, ranks: Ranks) -> np.ndarray:
    """The part of an array that is this rank's, of about equal size."""
    return np.array_split(rows, ranks.size)[ranks.rank]


def pool_moment(
    owner: str, source: Source, rows: np.ndarray, requires: Requirements
) -> tuple[Tensor, int]:
    """The exact sum over some samples of a source, on all ranks, and the number of usable ones.

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
    """The exact sum over the rows of feature files, and their usable number; see `pool_moment`.

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
    source: Source, memo: Memo, name: str, compute: Callable[[], tuple[Tensor, int]]
) -> tuple[Tensor, int]:
    """The sum that was kept under `name`, or else that of `compute`, which is then kept."""
    kept = memo.get(name)
    if all_ranks(source.ranks, kept is not None) and kept is not None:
        return torch.from_numpy(kept["sums"]).to(source.device), int(kept["samples"])
    sums, samples = compute()
    if source.ranks.rank == 0:
        memo.put(name, sums=sums.cpu().numpy(), samples=np.asarray(samples))
    return sums, samples


def all_ranks(ranks: Ranks, flag: bool) -> bool:
    """Whether `flag` is true on every rank, so that all of them take the same way."""
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
