"""What methods share that remove samples step by step: access to those left, and the lowest scores.

Every rank holds numbers for each sample, and the features of its own share, or reads them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from siftclip.ranks import sum_arrays
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import Requirements, Source
from siftclip.selectors.fitting.covariance import (
    check_sums,
    large_part,
    low_rank_form,
    quadratic_form,
    rows_of,
    second_moment,
)

MEMORY_BYTES = 8 << 30  # of features that a rank keeps; a larger share is read whenever needed
_FLOAT32_ERROR = 2.0**-24
_DIRECTIONS = 16  # of a change of the matrix
_GROWTH = 2.0  # of the rest of a change, which makes it worth to score all samples
_MANY_UNDECIDED = 2  # times the dimension: more samples are worth a split of the change


def remaining_samples(samples: int, target: int, steps: int) -> list[int]:
    """Return how many samples are left after each step, the last number being `target`.

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
        """Return the positions of the usable samples: int64, ascending."""
        return np.flatnonzero(self.squared_norms > 0)

    def moment(self, positions: np.ndarray) -> Tensor:
        """Sum x x^T over usable samples exactly: int64 [d, d], see `covariance`."""
        total: Tensor | None = None
        for _, features in self._pieces(positions):
            moment = second_moment(features)
            total = moment if total is None else total.add_(moment)
        dim = self._dim()
        if total is None:
            total = torch.zeros(dim, dim, dtype=torch.int64, device=self._source.device)
        return check_sums(self._owner, self._source.ranks.sum(total))

    def map(self, positions: np.ndarray, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Compute a number for each sample, float64 [m], by `function` from float [k, d] to [k]."""
        values = np.zeros(len(positions), dtype=np.float64)
        for at, features in self._pieces(positions):
            values[at] = function(features).double().cpu().numpy()
        return sum_arrays(self._source.ranks, values)

    def of_first_rank(self, values: Tensor) -> Tensor:
        """Return rank 0's values on every rank: all must continue with the very same bounds."""
        return self._source.ranks.sum(values * (self._source.ranks.rank == 0))

    def _dim(self) -> int:
        if self._kept is not None:
            return self._kept.shape[1]
        chunk = self._source.take(self.rows[:1], self._requires)
        return chunk.features[self._requires.features[0]].shape[1]

    def _pieces(self, positions: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """Yield where this rank's samples stand in `positions`, ascending, and their features."""
        start, stop = np.searchsorted(positions, [self._first, self._last])
        size = self._source.chunk_samples
        for first in range(start, stop, size):
            at = slice(first, min(first + size, stop))
            if self._kept is not None:
                index = torch.from_numpy(positions[at] - self._first)
                yield at, self._kept.index_select(0, index.to(self._kept.device))
            else:
                chunk = self._source.take(self.rows[positions[at]], self._requires)
                yield at, chunk.features[self._requires.features[0]]


def exact_quadratic_form(features: Tensor, matrix: Tensor) -> Tensor:
    """Compute x^T S x in float64, rounded to float32: equal for equal samples, wherever computed.

    Args:
        features: float [n, d].
        matrix: float64 [d, d].
    """
    x = features.double()
    products: Tensor = torch.linalg.vecdot(x @ matrix, x)
    return products.float()


def _upwards(bound: float) -> float:
    """Round up to the next float32, which stays equal to itself when it is kept in float32."""
    return float(np.nextafter(np.float32(bound), np.float32(np.inf)))


class LazyForms:
    """x^T S x of samples for a matrix S that changes: only what decides is computed.

    A score is known within an error at the step at which it was last looked at. From step to step
    it moves by x^T (S_t - S_s) x: with the eigenvalues of the change in [m - h, m + h] that is
    m |x|^2, up to h |x|^2, and both add up. Where that leaves many samples undecided, the change
    since a matrix R is split into a few directions b_k, which are computed, and a small rest:

        x^T S x = x^T R x + sum of v_k <x, b_k>^2, up to rest |x|^2,

    with x^T R x kept. What is undecided still is computed anew.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        count = len(samples.rows)
        self.scores = np.zeros(count, dtype=np.float32)  # when last looked at
        self.errors = np.zeros(count, dtype=np.float32)  # their bounds, for a sample of unit norm
        self.steps = np.full(count, -1, dtype=np.int32)  # and when that was; -1: never
        self.centres = np.zeros(0)  # m of all steps so far, summed up, one entry a step
        self.reaches = np.zeros(0)  # the same of h
        self.scored = 0  # how often a sample was scored
        self.matrix: Tensor | None = None
        self._rounding = 0.0  # of a score of now, in float32, for a sample of unit norm
        self._basis: Tensor | None = None  # of the last large part, of changes and since R
        self._reference: Tensor | None = None  # the R
        self._references = np.zeros(count, dtype=np.float32)  # x^T R x
        self._reference_error = 0.0
        self._rests = (0.0, 0.0)  # of the last step's change, and of that since R
        self._since = 0  # how many samples were scored since R was chosen

    def move(self, matrix: Tensor) -> None:
        """Go to the next step, with the matrix S, float64 [d, d]."""
        change = torch.zeros_like(matrix) if self.matrix is None else matrix - self.matrix
        _, values, rest = self._large_part(change)
        self._rests = rest, self._rests[1]
        low, high = min(0.0, float(values.min())) - rest, max(0.0, float(values.max())) + rest
        centre, reach = (low + high) / 2, (high - low) / 2
        if len(self.centres):
            centre, reach = centre + self.centres[-1], reach + self.reaches[-1]
        # two sums of d products each, and the float32 matrix; see Higham, Accuracy, section 3.1
        norm = float(self._samples.of_first_rank(torch.linalg.matrix_norm(matrix)))
        self._rounding = _upwards(3 * (len(matrix) + 2) * _FLOAT32_ERROR * norm)
        self.matrix = matrix
        self.centres = np.append(self.centres, centre)
        self.reaches = np.append(self.reaches, reach)

    def lowest(self, positions: np.ndarray, count: int) -> np.ndarray:
        """Find the `count` lowest scores among samples: bool [m]. Of equal ones the larger uids.

        Scores are x^T S x in float64, rounded to float32.
        """
        if count == 0:
            return np.zeros(len(positions), dtype=bool)
        self._refer(positions)
        undecided = self._undecided(positions, count)
        if len(undecided) > _MANY_UNDECIDED * len(self._current()):
            self._estimate(undecided)
            undecided = self._undecided(positions, count)
        self._score(undecided)
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

    def _large_part(self, change: Tensor) -> tuple[Tensor, Tensor, float]:
        """Compute `large_part`, the same on all ranks."""
        if self._basis is None:
            dim = len(change)
            generator = torch.Generator().manual_seed(0)
            self._basis = torch.randn(dim, min(dim, _DIRECTIONS), generator=generator)
        basis, values, rest = large_part(change, self._basis.to(change.device))
        self._basis = basis
        rest = float(self._samples.of_first_rank(change.new_tensor(rest)))
        return self._samples.of_first_rank(basis), self._samples.of_first_rank(values), rest

    def _refer(self, positions: np.ndarray) -> None:
        """Choose the current matrix as R, and score all samples, if there is none, or if it pays.

        It does if less would be left of the changes since, and it costs no more than was spent. If
        matrices are of a few samples each, they differ by noise that is the same since any step.
        """
        grown = self._rests[1] > _GROWTH * self._rests[0]
        if self._reference is None or (grown and self._since >= len(positions)):
            self._score(positions)
            self._reference = self._current()
            self._references[positions] = self.scores[positions]
            self._reference_error = self._rounding
            self._since = 0

    def _score(self, positions: np.ndarray) -> None:
        """Compute the scores that are not known as well as float32 allows."""
        now = len(self.centres) - 1
        known = (self.steps[positions] == now) & (self.errors[positions] <= self._rounding)
        positions = positions[~known]
        matrix = self._current().float()
        scores = self._samples.map(positions, lambda x: quadratic_form(x, matrix))
        self._note(positions, scores, self._rounding)
        self.scored += len(positions)
        self._since += len(positions)

    def _estimate(self, positions: np.ndarray) -> None:
        """Compute scores from those by the reference."""
        if self._reference is None:
            raise RuntimeError("a reference must be chosen before estimates")
        basis, values, rest = self._large_part(self._current() - self._reference)
        self._rests = self._rests[0], rest
        moved = self._samples.map(positions, lambda x: low_rank_form(x, basis, values))
        size = float(values.abs().sum())
        error = rest + self._reference_error + 3 * (len(basis) + 2) * _FLOAT32_ERROR * size
        self._note(positions, self._references[positions] + moved, _upwards(error))

    def _note(self, positions: np.ndarray, scores: np.ndarray, error: float) -> None:
        self.scores[positions] = scores  # which are rounded by far less than the error
        self.errors[positions] = error
        self.steps[positions] = len(self.centres) - 1

    def _undecided(self, positions: np.ndarray, count: int) -> np.ndarray:
        """Find those of the samples that may be among the `count` lowest.

        First those that probably are get scored, which brings the cut down to about its place.
        """
        middle, _ = self._bounds(positions)
        self._score(positions[np.sort(np.argpartition(middle, count - 1)[:count])])
        middle, reach = self._bounds(positions)
        cut = np.partition(middle + reach, count - 1)[count - 1]  # `count` samples are not above
        low: np.ndarray = positions[middle - reach <= cut]
        return low

    def _bounds(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the centres of this step's scores, float64 [m], and how far they may be off."""
        squared_norms = self._samples.squared_norms[positions].astype(np.float64)
        steps = self.steps[positions]
        middle = self.scores[positions] + (self.centres[-1] - self.centres[steps]) * squared_norms
        reach = self.reaches[-1] - self.reaches[steps] + self.errors[positions]
        return middle, reach * squared_norms
