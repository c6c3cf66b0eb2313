"""The order of training samples: a pure function of (seed, selection, step), whatever the ranks.

The selection's rows are shuffled anew for every pass, the passes are laid end to end, and global
batch s is the samples [s * b, (s + 1) * b) of that endless sequence. So every batch is full, no
sample of a pass is dropped, and the position in the data follows from the step alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from siftclip.selectors.errors import InputError

_PURPOSE_ORDER = 1
_PURPOSE_SUBSTITUTE = 2


def derive_generator(*words: int) -> np.random.Generator:
    """A generator that is a pure function of its words, such as (seed, epoch, purpose)."""
    entropy = np.asarray(words, dtype=np.uint64).view(np.uint32)  # fixed width: no two lists alike
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


@dataclass(slots=True, kw_only=True)
class SampleOrder:
    """Global batches of rows."""

    rows: np.ndarray  # int64 [n], repetitions repeated, sorted
    seed: int
    global_batch: int
    _pass: int = field(default=-1, repr=False)  # the pass whose permutation is kept
    _permutation: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    def _rows_of_pass(self, number: int) -> np.ndarray:
        if number != self._pass:
            generator = derive_generator(self.seed, number, _PURPOSE_ORDER)
            self._permutation, self._pass = generator.permutation(self.rows), number
        return self._permutation

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the sequence and rows of global batch `step`, both int64 [global_batch]."""
        start = step * self.global_batch
        positions = np.arange(start, start + self.global_batch, dtype=np.int64)
        numbers, offsets = np.divmod(positions, len(self.rows))
        rows = np.empty(self.global_batch, dtype=np.int64)
        for number in range(numbers[0], numbers[-1] + 1):
            here = numbers == number
            rows[here] = self._rows_of_pass(number)[offsets[here]]
        return positions, rows

    def rank_batch(self, step: int, *, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of global batch `step` that belongs to a rank: consecutive and equally long."""
        local = rank_batch_size(self.global_batch, world_size)
        positions, rows = self.batch(step)
        at = slice(rank * local, (rank + 1) * local)
        return positions[at], rows[at]


def rank_batch_size(global_batch: int, world_size: int) -> int:
    """How many samples of a global batch each rank gets.

    Raises:
        InputError: the global batch cannot be split evenly.
    """
    if global_batch % world_size:
        raise InputError(
            f"scale.global_batch_size must be a multiple of the {world_size} devices, so that all "
            f"get equally many samples. Got {global_batch}."
        )
    return global_batch // world_size


def substitute(rows: np.ndarray, *, seed: int, position: int, attempt: int) -> int:
    """The row that replaces a bad sample at `position`, on the given attempt (0, 1, ...)."""
    generator = derive_generator(seed, position, attempt, _PURPOSE_SUBSTITUTE)
    return int(rows[generator.integers(len(rows))])
