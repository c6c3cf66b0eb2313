"""The order of training samples: a pure function of (seed, selection, step), whatever the ranks.

The selection's rows are shuffled anew for every pass, the passes are laid end to end, and global
batch s is the samples [s * b, (s + 1) * b) of that endless sequence. So every batch is full, no
sample of a pass is dropped, and the position in the data follows from the step alone.

What a step draws holds no sample twice, where a selection and the size of a draw allow it: see
`siftclip.datamodules.streaming.copies`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from siftclip.datamodules.streaming.copies import CutPass, count_copies
from siftclip.errors import InputError, ParameterError, require_int
from siftclip.hashing import mix64

# How often a pass goes through the tars, at most, to keep repetitions of a sample apart.
MAX_ROUNDS = 8
_PURPOSE_ORDER = 1
_PURPOSE_SUBSTITUTE = 2
_INCREMENT = 0x9E3779B97F4A7C15  # of the state of SplitMix64
_NONE = np.empty(0, dtype=np.int64)


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
    return mix64(start + positions.astype(np.uint64) * np.uint64(_INCREMENT))


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
    starts: np.ndarray | None = None  # int64, where draws begin; None: at each global batch
    _pass: int = field(default=-1, init=False, repr=False)  # the pass whose order is kept
    _order: np.ndarray = field(default_factory=lambda: _NONE, init=False, repr=False)
    distinct: np.ndarray = field(init=False, repr=False)  # int64, each row once, sorted
    most_copies: int = field(init=False)  # of a row, at most
    largest_draw: int = field(init=False)
    _smallest_draw: int = field(init=False)

    def __post_init__(self) -> None:
        first = np.flatnonzero(np.diff(self.rows, prepend=self.rows[0] - 1))
        self.distinct = self.rows[first] if len(first) < len(self.rows) else self.rows
        self.most_copies = int(np.diff(first, append=len(self.rows)).max())
        sizes = self._draw_sizes()
        self.largest_draw, self._smallest_draw = int(sizes.max()), int(sizes.min())

    @property
    def has_room(self) -> bool:
        """Whether a pass is long enough to keep the copies of each sample in different draws.

        If so no draw holds a sample twice, provided that all draws are equally large; of unequal
        ones a few may.
        """
        return self.most_copies * self.largest_draw <= len(self.rows)

    @property
    def is_distinct(self) -> bool:
        """Whether it is certain that no draw holds a sample twice."""
        return self.has_room and self.largest_draw == self._smallest_draw

    def moves_samples(self, stop: int) -> bool:
        """Whether samples up to a position may stand elsewhere than in the plain shuffles."""
        passes = range(1, -(-(stop - self.first_position) // len(self.rows)))
        return self.most_copies > 1 or any(self._begun(number) for number in passes)

    def copies_fraction(self, first_step: int, steps: int, *, most_samples: int) -> float:
        """The share of the draws of some steps that hold a sample twice.

        Known exactly where none or each does; otherwise counted, on the first draws.

        Args:
            first_step: to look at.
            steps: how many there are.
            most_samples: to look at, about; one draw at least.
        """
        if self.is_distinct:
            return 0.0
        if self._smallest_draw > len(self.distinct):
            return 1.0
        with_copies = looked_at = position = 0
        while looked_at < steps and position < most_samples:
            start, size = self._draw(first_step + looked_at)
            with_copies += count_copies(self.span(start, size)[1]) > 0
            looked_at, position = looked_at + 1, position + size
        return with_copies / looked_at

    def _draw(self, step: int) -> tuple[int, int]:
        """Where the draw of a step begins, and how many samples it has."""
        if self.starts is None:
            return step * self.global_batch, self.global_batch
        return int(self.starts[step]), int(self.starts[step + 1] - self.starts[step])

    def _draw_sizes(self) -> np.ndarray:
        if self.starts is None:
            return np.array([self.global_batch])
        return np.diff(self.starts[np.searchsorted(self.starts, self.first_position) :])

    def _first(self, number: int) -> int:
        """Where a pass begins."""
        return self.first_position + number * len(self.rows)

    def _cuts(self, number: int) -> np.ndarray:
        """Where draws begin inside a pass, counted from its own beginning, int64."""
        first, stop = self._first(number), self._first(number + 1)
        if self.starts is None:
            size = self.global_batch
            return np.arange((first // size + 1) * size, stop, size) - first
        at, end = np.searchsorted(self.starts, [first + 1, stop])
        # What nobody draws any more is cut as the rest: it shall be able to take as many copies.
        behind = np.arange(self.starts[-1] + self.largest_draw, stop, self.largest_draw)
        return np.concatenate([self.starts[at:end], behind[behind > first]]) - first

    def _begun(self, number: int) -> int:
        """How many samples of the pass before are in the draw in which a pass begins.

        0 if that draw is too large to hold all samples once.
        """
        first = self._first(number)
        if self.starts is None:
            start, size = first - first % self.global_batch, self.global_batch
        else:
            at = int(np.searchsorted(self.starts, first, side="right")) - 1
            if at == len(self.starts) - 1:
                return 0  # behind the last draw
            start, size = self._draw(at)
        return 0 if size > len(self.distinct) else first - start

    def _whole_draws(self, number: int) -> int:
        """How many draws lie in a pass as a whole, its first draw not counted."""
        return len(self._cuts(number)) - (self._begun(number + 1) > 0)

    def _end_moves(self, number: int) -> bool:
        """Whether the last draw of a pass takes part in exchanges for the sake of the first one.

        Else what the next pass begins with does not depend on the passes before this one.
        """
        return self._begun(number) > 0 and self._whole_draws(number) < self.most_copies

    def _rows_of_pass(self, number: int) -> np.ndarray:
        if number != self._pass:
            at = number
            while (
                self._begun(at) and at - 1 != self._pass and (at == number or self._end_moves(at))
            ):
                at -= 1
            order = self._order if at - 1 == self._pass else _NONE
            while at <= number:
                begun = self._begun(at) if len(order) else 0
                order = self._make(at, order[len(order) - begun :])
                at += 1
            self._order, self._pass = order, number
        return self._order

    def _make(self, number: int, before: np.ndarray) -> np.ndarray:
        """The rows of a pass in order, when a draw has begun with those before it."""
        generator = derive_generator(self.seed, number, self.selection_version, _PURPOSE_ORDER)
        rows = shuffle(
            self.rows,
            generator,
            shard_of_row=self.shard_of_row,
            window_shards=self.window_shards,
        )
        if self._smallest_draw > len(self.distinct):
            return rows  # there is no way
        cuts, repeats = self._cuts(number), self.most_copies > 1
        if self._end_moves(number) or not len(before):
            whole = CutPass(rows, cuts, before=before)
            whole.separate(repeats=repeats, partners=range(whole.draws), chains=self.has_room)
            return rows
        if repeats:
            alone = CutPass(rows, cuts, before=_NONE)
            alone.separate(repeats=True, partners=range(alone.draws), chains=self.has_room)
        partners = range(1, 1 + self._whole_draws(number))
        border = CutPass(rows, cuts, before=before)
        border.separate(repeats=False, partners=partners, chains=self.has_room)
        return rows

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
        raise ParameterError(
            f"must be a multiple of the {world_size} devices, so that all get equally many samples",
            parameter="global_batch",
            value=global_batch,
        )
    local = global_batch // world_size
    return slice(rank * local, (rank + 1) * local)


def require_window(window_shards: object) -> int | None:
    """Return how many shards are shuffled together, checked; None: all."""
    if window_shards is None:
        return None
    return require_int("window_shards", window_shards, minimum=1)


class DrawnRequests(list[tuple[int, int]]):
    """Some of the (position, row) that a step reads, and what each of its readers must know."""

    def __init__(
        self, requests: Iterable[tuple[int, int]], *, start: int, drawn: np.ndarray, copies: bool
    ) -> None:
        """Take requests.

        Args:
            requests: of one reader.
            start: position at which the draw begins.
            drawn: int64, the rows of all of it.
            copies: whether what the step trains on may hold a sample twice.
        """
        super().__init__(requests)
        self.start, self.drawn, self.copies = start, drawn, copies


class Substitutes:
    """What replaces the bad samples of a draw: samples that it does not hold, each another one.

    That is so for the first attempt in a selection of at least two draws, for the second in one of
    three, and so on. Later attempts take any sample, as do those in smaller selections.
    """

    def __init__(self, distinct: np.ndarray, drawn: np.ndarray, *, seed: int, start: int) -> None:
        """Take a draw.

        Args:
            distinct: int64 [n], the rows of the selection, each once, sorted.
            drawn: int64 [d], the rows of the draw.
            seed: of the run.
            start: position at which the draw begins.
        """
        self.start, held = start, np.unique(drawn)
        places = np.searchsorted(distinct, held)
        places = places[distinct[np.minimum(places, len(distinct) - 1)] == held]
        self._left_before = places - np.arange(len(places))  # of the others, by drawn row
        self._others = len(distinct) - len(places)
        self._distinct, self._size, self._seed = distinct, len(drawn), seed
        generator = derive_generator(seed, start, _PURPOSE_SUBSTITUTE)
        self._shift = int(generator.integers(max(1, self._others)))

    def row(self, place: int, attempt: int) -> int:
        """The row that replaces the sample at a place of the draw, on an attempt (0, 1, ...)."""
        if self._others < (attempt + 1) * self._size:
            words = (self._seed, self.start + place, attempt, _PURPOSE_SUBSTITUTE)
            number = int(derive_generator(*words).integers(len(self._distinct)))
        else:
            number = (self._shift + place + attempt * self._size) % self._others
            number += int(np.searchsorted(self._left_before, number, side="right"))
        return int(self._distinct[number])
