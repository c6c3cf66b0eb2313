"""The order of training samples: a pure function of (seed, selection, step), whatever the ranks.

The selection's rows are shuffled anew for every pass, the passes are laid end to end, and global
batch s is the samples [s * b, (s + 1) * b) of that endless sequence. So every batch is full, no
sample of a pass is dropped, and the position in the data follows from the step alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from siftclip.selectors.errors import InputError, require_int

# How often a pass goes through the tars, at most, to keep repetitions of a sample apart.
MAX_ROUNDS = 8
_PURPOSE_ORDER = 1
_PURPOSE_SUBSTITUTE = 2


def derive_generator(*words: int) -> np.random.Generator:
    """A generator that is a pure function of its words, such as (seed, epoch, purpose)."""
    entropy = np.asarray(words, dtype=np.uint64).view(np.uint32)  # fixed width: no two lists alike
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def derive_seeds(positions: np.ndarray, *words: int) -> np.ndarray:
    """A seed for each position, uint64 [n], that is a pure function of it and the words.

    The positions, int64 [n], are the counter of SplitMix64 (Steele, Lea, Flood 2014), whose start
    comes from the words: a generator of its own for every sample would cost more than its read.
    """
    start = derive_generator(*words).integers(2**63, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        state = start + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def shuffle(
    rows: np.ndarray,
    generator: np.random.Generator,
    *,
    shard_of_row: np.ndarray | None = None,
    window_shards: int | None = None,
) -> np.ndarray:
    """One pass over a selection: its rows in random order.

    Repetitions of a row are spread over the pass: of m, each lands in another m-th part of it.
    Without `window_shards` this is a uniform permutation but for that. With it, the tars are
    shuffled, and the samples of so many consecutive tars are shuffled among each other: what is
    read for some time comes from these tars alone. A pass over a selection with repetitions then
    goes through the tars several times, at most `MAX_ROUNDS`.

    Args:
        rows: int64 [n], sorted, repetitions repeated.
        generator: of the random numbers.
        shard_of_row: int32, the tar of every row of the pool; needed with `window_shards`.
        window_shards: at least 1.
    """
    count = len(rows)
    first = np.flatnonzero(np.diff(rows, prepend=rows[0] - 1))
    if window_shards is None and len(first) == count:
        return generator.permutation(rows)
    multiplicities = np.diff(first, append=count)
    copy = np.arange(count) - np.repeat(first, multiplicities)
    place = (copy + generator.random(count)) / np.repeat(multiplicities, multiplicities)
    rounds = int(min(MAX_ROUNDS, multiplicities.max()))
    if window_shards is not None and shard_of_row is not None:
        round_of = np.minimum((place * rounds).astype(np.int64), rounds - 1)
        shards, shard = np.unique(shard_of_row[rows], return_inverse=True)
        turns = np.stack([generator.permutation(len(shards)) for _ in range(rounds)])
        windows = -(-len(shards) // window_shards)
        window = round_of * windows + turns[round_of, shard] // window_shards
        place = window + (place * rounds - round_of)
    return rows[np.argsort(place, kind="stable")]


@dataclass(slots=True, kw_only=True)
class SampleOrder:
    """Global batches of rows."""

    rows: np.ndarray  # int64 [n], repetitions repeated, sorted
    seed: int
    global_batch: int  # samples that a step draws
    selection_version: int = 0  # selections of one run that follow each other have other numbers
    first_position: int = 0  # in the sequence of all samples of the run, where these rows begin
    shard_of_row: np.ndarray | None = None  # int32, for all rows of the pool
    window_shards: int | None = None  # see `shuffle`
    _pass: int = field(default=-1, init=False, repr=False)  # the pass whose order is kept
    _order: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.int64), init=False, repr=False
    )

    def _rows_of_pass(self, number: int) -> np.ndarray:
        if number != self._pass:
            generator = derive_generator(self.seed, number, self.selection_version, _PURPOSE_ORDER)
            self._order, self._pass = (
                shuffle(
                    self.rows,
                    generator,
                    shard_of_row=self.shard_of_row,
                    window_shards=self.window_shards,
                ),
                number,
            )
        return self._order

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the sequence and rows of global batch `step`, both int64 [global_batch]."""
        return self.span(step * self.global_batch, self.global_batch)

    def span(self, start: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and rows of so many samples of the sequence, both int64 [samples]."""
        positions = np.arange(start, start + samples, dtype=np.int64)
        numbers, offsets = np.divmod(positions - self.first_position, len(self.rows))
        rows = np.empty(samples, dtype=np.int64)
        for number in range(numbers[0], numbers[-1] + 1):
            here = numbers == number
            rows[here] = self._rows_of_pass(number)[offsets[here]]
        return positions, rows


class FirstStage(Protocol):
    """Chooses the samples of a step before any of their bytes are read.

    Every rank calls it with the same arguments and must get the same answer: it may look at ids,
    cached features and scores, and draw random numbers from (seed, step) alone.
    """

    def __call__(self, step: int, rows: np.ndarray, wanted: int) -> np.ndarray:
        """Indices into `rows`, int64 [wanted], of the chosen samples, in their order."""


def check_chosen(chosen: np.ndarray, *, drawn: int, wanted: int, owner: str) -> np.ndarray:
    """The answer of a first stage, if it is one: `wanted` different indices below `drawn`.

    Raises:
        InputError: it is not.
    """
    chosen = np.asarray(chosen)
    if (
        chosen.shape != (wanted,)
        or chosen.dtype.kind not in "iu"
        or len(np.unique(chosen)) != wanted
        or chosen.min() < 0
        or chosen.max() >= drawn
    ):
        raise InputError(
            f"{owner} must choose {wanted} different indices from 0 to {drawn - 1}, all of an "
            f"integer type. Got {chosen.dtype} {chosen.shape}: {chosen.ravel()[:8].tolist()}..."
        )
    return chosen.astype(np.int64)


def rows_digest(*arrays: np.ndarray | None) -> int:
    """A number that stands for arrays, such as rows and their weights: int64, for ranks to compare.

    Some 0.8 ms for each MB; 0.2 ms for a batch of 32,768 rows.
    """
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def rank_slice(global_batch: int, *, rank: int, world_size: int) -> slice:
    """The part of a global batch that belongs to a rank: consecutive, all equally long.

    Raises:
        InputError: the global batch cannot be split evenly.
    """
    if global_batch % world_size:
        raise InputError(
            f"scale.global_batch_size must be a multiple of the {world_size} devices, so that all "
            f"get equally many samples. Got {global_batch}."
        )
    local = global_batch // world_size
    return slice(rank * local, (rank + 1) * local)


def require_window(window_shards: object) -> int | None:
    """`data.shuffle_window_shards`, checked."""
    if window_shards is None:
        return None
    return require_int("data.shuffle_window_shards", window_shards, minimum=1)


def substitute(rows: np.ndarray, *, seed: int, position: int, attempt: int) -> int:
    """The row that replaces a bad sample at `position`, on the given attempt (0, 1, ...)."""
    generator = derive_generator(seed, position, attempt, _PURPOSE_SUBSTITUTE)
    return int(rows[generator.integers(len(rows))])
