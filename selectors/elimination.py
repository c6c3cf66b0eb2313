"""What methods share that remove samples step by step: access to those left, and the lowest scores.

Every rank holds numbers for each sample, and the features of its own share, or reads them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from siftclip.selectors.covariance import (
    check_sums,
    eigenvalue_range,
    quadratic_form,
    rows_of,
    second_moment,
)
from siftclip.selectors.ranks import sum_arrays
from siftclip.selectors.rules import keep_top
from siftclip.selectors.source import Requirements, Source

MEMORY_BYTES = 8 << 30  # of features that a rank keeps; a larger share is read whenever needed
_FLOAT32_ERROR = 2.0**-24


def remaining_samples(samples: int, target: int, steps: int) -> list[int]:
    """How many samples are left after each step, the last number being `target`.

    Each step removes ceil((samples - target) / steps), and the last the rest. The released code
    asks for more samples than there are if (steps - 1) such removals are too many; here the last
    steps then remove none.
    """
    removed = math.ceil(max(0, samples - target) / steps)
    sizes = [max(samples - removed * (step + 1), target) for step in range(steps)]
    return [min(size, samples) for size in sizes]


class Samples:
    """The samples of a source that have features, at positions 0 to n - 1 as they are stored."""

    def __init__(self, owner: str, source: Source, requires: Requirements) -> None:
        """Look at all features once; `requires` has one feature key."""
        self._owner, self._source, self._requires = owner, source, requires
        self.rows = rows_of(source, requires)
        self.uids = source.uids[source.index_of(self.rows)]
        bounds = np.linspace(0, len(self.rows), source.ranks.size + 1).astype(np.int64)
        self._first, self._last = bounds[source.ranks.rank : source.ranks.rank + 2]
        self._kept: Tensor | None = None
        norms, kept, kept_bytes = np.zeros(len(self.rows), dtype=np.float32), [], 0
        with source.bar(int(self._last - self._first), f"{owner}: norms") as bar:
            at = self._first
            for chunk in source.chunks(self.rows[self._first : self._last], requires):
                features = chunk.features[requires.features[0]]
                squares = torch.linalg.vecdot(features.float(), features.float())
                norms[at : at + len(chunk)] = torch.where(chunk.usable(), squares, 0).cpu().numpy()
                at += len(chunk)
                kept_bytes += features.nbytes
                if kept_bytes <= MEMORY_BYTES:
                    kept.append(features)
                else:
                    kept.clear()
                bar.update(len(chunk))
        if kept:
            self._kept = torch.cat(kept)
        self.squared_norms = sum_arrays(source.ranks, norms)  # float32 [n]; 0: not usable

    def usable(self) -> np.ndarray:
        """The positions of the usable samples: int64, ascending."""
        return np.flatnonzero(self.squared_norms > 0)

    def moment(self, positions: np.ndarray) -> Tensor:
        """The exact sum of x x^T over usable samples: int64 [d, d], see `covariance`."""
        total: Tensor | None = None
        for _, features in self._pieces(positions):
            moment = second_moment(features)
            total = moment if total is None else total.add_(moment)
        dim = self._dim()
        if total is None:
            total = torch.zeros(dim, dim, dtype=torch.int64, device=self._source.device)
        return check_sums(self._owner, self._source.ranks.sum(total))

    def map(self, positions: np.ndarray, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """A number for each sample, float64 [m]: `function` takes float [k, d] and gives [k]."""
        values = np.zeros(len(positions), dtype=np.float64)
        for at, features in self._pieces(positions):
            values[at] = function(features).double().cpu().numpy()
        return sum_arrays(self._source.ranks, values)

    def of_first_rank(self, numbers: list[float]) -> list[float]:
        """The numbers of rank 0, on every rank."""
        mine = np.asarray(numbers, dtype=np.float64) * (self._source.ranks.rank == 0)
        return [float(number) for number in sum_arrays(self._source.ranks, mine)]

    def _dim(self) -> int:
        if self._kept is not None:
            return self._kept.shape[1]
        chunk = self._source.take(self.rows[:1], self._requires)
        return chunk.features[self._requires.features[0]].shape[1]

    def _pieces(self, positions: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """This rank's among `positions`, ascending: where they stand there, and their features."""
        start, stop = np.searchsorted(positions, [self._first, self._last])
        size = self._source.chunk_samples
        for first in range(start, stop, size):
            at = slice(first, min(first + size, stop))
            if self._kept is not None:
                index = torch.from_numpy(positions[at] - self._first)
                yield at, self._kept[index.to(self._kept.device)]
            else:
                chunk = self._source.take(self.rows[positions[at]], self._requires)
                yield at, chunk.features[self._requires.features[0]]


def exact_quadratic_form(features: Tensor, matrix: Tensor) -> Tensor:
    """x^T S x in float64, rounded to float32: equal for equal samples, wherever they are computed.

    Args:
        features: float [n, d].
        matrix: float64 [d, d].
    """
    x = features.double()
    return torch.linalg.vecdot(x @ matrix, x).float()


class LazyForms:
    """x^T S x of samples for a matrix S that changes: only what decides is computed.

    A score of step s moves until step t by x^T (S_t - S_s) x. With the eigenvalues of S_t - S_s in
    [m - h, m + h], that is m |x|^2, up to h |x|^2. Both add up over the steps.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.scores = np.zeros(len(samples.rows), dtype=np.float32)  # when last computed
        self.steps = np.full(len(samples.rows), -1, dtype=np.int32)  # and when that was; -1: never
        self.centres = np.zeros(0)  # m of all steps so far, summed up, one entry a step
        self.reaches = np.zeros(0)  # the same of h
        self.scored = 0  # how often a sample was scored
        self.matrix: Tensor | None = None
        self._rounding = 0.0  # of a score of now, in float32, for a sample of unit norm

    def move(self, matrix: Tensor) -> None:
        """Go to the next step, with the matrix S, float64 [d, d]."""
        change = torch.zeros_like(matrix) if self.matrix is None else matrix - self.matrix
        norm = float(torch.linalg.matrix_norm(matrix))
        # all ranks must go on with the very same bounds
        low, high, norm = self._samples.of_first_rank([*eigenvalue_range(change), norm])
        centre, reach = (low + high) / 2, (high - low) / 2
        if len(self.centres):
            centre, reach = centre + self.centres[-1], reach + self.reaches[-1]
        # two sums of d products each, and the float32 matrix; see Higham, Accuracy, section 3.1
        self._rounding = 3 * (len(matrix) + 2) * _FLOAT32_ERROR * norm
        self.matrix = matrix
        self.centres = np.append(self.centres, centre)
        self.reaches = np.append(self.reaches, reach)

    def lowest(self, positions: np.ndarray, count: int) -> np.ndarray:
        """The `count` lowest scores among samples: bool [m]. Of equal ones the larger uids.

        Scores are x^T S x in float64, rounded to float32.
        """
        if count == 0:
            return np.zeros(len(positions), dtype=bool)
        never = self.steps[positions] < 0
        self._score(positions[never])
        # First those that are probably lowest, which brings the cut down to about its place.
        middle, reach = self._bounds(positions)
        probable = np.argpartition(middle, count - 1)[:count]
        self._score(positions[np.sort(probable)])
        middle, reach = self._bounds(positions)
        cut = np.partition(middle + reach, count - 1)[count - 1]  # `count` samples are not above
        self._score(positions[middle - reach <= cut])
        middle, reach = self._bounds(positions)
        low, high = middle - reach, middle + reach
        cut = np.partition(high, count - 1)[count - 1]
        lowest = np.zeros(len(positions), dtype=bool)
        if count < len(positions):
            # only `count` samples can be below the next bound: what is surely there is among them
            lowest = high < np.partition(low, count)[count]
        doubtful = np.flatnonzero(~lowest & (low <= cut))
        scores = self._samples.map(
            positions[doubtful], lambda x: exact_quadratic_form(x, self._current())
        )
        keep = len(doubtful) - (count - int(lowest.sum()))
        kept = keep_top(scores.astype(np.float32), self._samples.uids[positions[doubtful]], keep)
        lowest[doubtful[kept == 0]] = True
        return lowest

    def _current(self) -> Tensor:
        if self.matrix is None:
            raise RuntimeError("move must be called before lowest")
        return self.matrix

    def _score(self, positions: np.ndarray) -> None:
        """Compute the scores of those samples that have none of this step."""
        now = len(self.centres) - 1
        positions = positions[self.steps[positions] != now]
        matrix = self._current().float()
        self.scores[positions] = self._samples.map(positions, lambda x: quadratic_form(x, matrix))
        self.steps[positions] = now
        self.scored += len(positions)

    def _bounds(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the scores of this step lie: float64 [m], and how far they may be off there."""
        squared_norms = self._samples.squared_norms[positions].astype(np.float64)
        steps = self.steps[positions]
        middle = self.scores[positions] + (self.centres[-1] - self.centres[steps]) * squared_norms
        return middle, (self.reaches[-1] - self.reaches[steps] + self._rounding) * squared_norms
