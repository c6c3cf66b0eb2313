"""Rules that draw samples at random, with probabilities that their scores give.

All noise is a pure function of (seed, draw, uid), so that an answer depends neither on the order of
the samples nor on a global random state. A score of NaN or -inf is never drawn, and +inf before all
that are finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np

from siftclip.errors import (
    ParameterError,
    require_choice,
    require_finite,
    require_fraction,
    require_int,
    require_int_or_auto,
    require_positive,
)
from siftclip.selectors.core.noise import bounded_logits, gumbel, hashes, noise, noise_state
from siftclip.selectors.core.rules import OFS, Of, can_be_kept, counted, keep_top

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

_BLOCK = 1 << 15  # samples at a time: their numbers stay in the processor's cache
_FEWEST_BATCHES = 10  # of Soft Cap Sampling: with fewer, its scores hardly matter
_DRAWS_PER_BATCH = 1280  # of Soft Cap Sampling as published: 128 M draws in batches of 100,000


def draw_without_replacement(
    logits: np.ndarray, uids: np.ndarray, count: int, *, seed: int
) -> np.ndarray:
    """Draw `count` distinct samples, one after the other, by softmax: int64 [n] of 0 and 1.

    The samples with the largest logit + Gumbel noise are distributed exactly as if drawn from
    softmax(logits) without replacement (Gumbel top-k, arXiv 1903.06059).

    Args:
        logits: float [n]; NaN and -inf: never drawn; +inf: drawn first.
        uids: uint64 [n, 2].
        count: how many; all that can be drawn where these are fewer.
        seed: any integer of at least 0.
    """
    able = np.flatnonzero(can_be_kept(logits))
    keys = np.full(len(logits), np.nan)
    keys[able] = bounded_logits(logits[able]) + gumbel(noise_state(uids[able], seed), 0)
    return keep_top(keys, uids, count)


def soft_cap(
    logits: np.ndarray,
    uids: np.ndarray,
    total: int,
    *,
    penalty: float,
    batch_samples: int,
    seed: int,
) -> np.ndarray:
    """Draw by Soft Cap Sampling (arXiv 2503.08805): multiplicities int64 [n] that sum to `total`.

    Until there are `total`: draw a batch from softmax(logits) without replacement, and lower the
    logits of what was drawn by `penalty`. The paper has no temperature: what enters the softmax is
    the score itself, from which its code takes the penalty. It draws with `numpy.random.choice`;
    here a batch has the largest logit + Gumbel noise, which is the same distribution.

    Most samples cannot be in a batch, whatever their logit: their uniform number is compared with
    a bound that changes only when the sample is drawn, and only what passes gets a Gumbel number.
    The answer is that of the full computation, at one multiplicative hash a sample and batch.

    Args:
        logits: float [n]; NaN and -inf: never drawn; +inf: in every batch that has room.
        uids: uint64 [n, 2].
        total: sum of the multiplicities; 0 where no sample can be drawn.
        penalty: at least 0, taken from what enters the softmax.
        batch_samples: distinct samples of a draw; all that can be drawn where these are fewer.
        seed: any integer of at least 0.
    """
    able = np.flatnonzero(can_be_kept(logits))
    drawn = np.zeros(len(logits), dtype=np.int64)
    if not len(able):
        return drawn
    batch_samples = min(batch_samples, len(able))
    most_draws = -(-total // batch_samples)  # of one sample
    start = bounded_logits(logits[able], penalties=penalty * most_draws)
    able_uids = uids[able]
    state, counts = noise_state(able_uids, seed), np.zeros(len(able), dtype=np.int64)
    everyone = np.arange(len(able))
    cut, bounds = np.inf, _bounds(start, np.inf)  # of the keys that a batch may have
    left, draw = total, 0
    while left > 0:
        batch = min(batch_samples, left)
        near = _passing(state, draw, bounds)
        keys = start[near] - penalty * counts[near] + gumbel(state[near], draw)
        if np.count_nonzero(keys >= cut) < batch:
            # The penalties have lowered the keys below the cut: look at all, and set it anew,
            # somewhat lower than this batch needs, so that it serves many batches to come.
            near = everyone
            keys = start - penalty * counts + gumbel(state, draw)
            wide = min(len(able), batch_samples + batch_samples // 4 + 64)
            cut = float(np.partition(keys, len(keys) - wide)[len(keys) - wide])
            bounds = _bounds(start - penalty * counts, cut)
        best = near[keep_top(keys, able_uids[near], batch) > 0]
        counts[best] += 1
        bounds[best] = _bounds(start[best] - penalty * counts[best], cut)
        left, draw = left - batch, draw + 1
    drawn[able] = counts
    return drawn


def _bounds(logits: np.ndarray, cut: float) -> np.ndarray:
    """Bound the hashes whose key is below `cut`: uint64 [n], with room for rounding."""
    with np.errstate(over="ignore"):
        below = np.exp(-np.exp(logits - cut)) - 1e-12
    return (np.maximum(below, 0.0) * 2.0**64).astype(np.uint64)


def _passing(state: np.ndarray, draw: int, bounds: np.ndarray) -> np.ndarray:
    """Find where the hashes of a draw reach the bounds: int64 [m]."""
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(state), _BLOCK)]
    return np.concatenate(
        [
            block.start + np.flatnonzero(hashes(state[block], draw) >= bounds[block])
            for block in blocks
        ]
    )


def hard_cap(
    logits: np.ndarray, uids: np.ndarray, total: int, *, cap: int, seed: int
) -> np.ndarray:
    """Draw by softmax with replacement, each sample at most `cap` times: int64 [n], sum `total`.

    This is the hard cap that Soft Cap Sampling is compared with (arXiv 2503.08805): what has been
    drawn `cap` times cannot be drawn any more. The released code draws in batches and discards what
    is too much. Here each sample has arrivals at random times, its first `cap` ones of a Poisson
    process of rate exp(logit), and the first `total` arrivals of all are the draws: the next
    arrival belongs to each sample below the cap with its share of their rates, as it must.

    Args:
        logits: float [n]; NaN and -inf: never drawn; +inf: `cap` times, before all others.
        uids: uint64 [n, 2].
        total: sum of the multiplicities; `cap` times what can be drawn where that is less.
        cap: at least 1.
        seed: any integer of at least 0.
    """
    able = np.flatnonzero(can_be_kept(logits))
    drawn = np.zeros(len(logits), dtype=np.int64)
    if total >= cap * len(able):
        drawn[able] = cap
        return drawn
    rates, able_uids = bounded_logits(logits[able]), uids[able]
    state = noise_state(able_uids, seed)
    until, step = _expected_end(rates, total, cap), 0.25
    while True:
        owners, times = _arrivals(rates, state, cap, until)
        if len(times) >= total:
            break
        until, step = until + step, 2 * step  # far, where few scores are far from all others
    first = keep_top(-times, able_uids[owners], total) > 0
    np.add.at(drawn, able[owners[first]], 1)
    return drawn


def _expected_end(logits: np.ndarray, total: int, cap: int) -> float:
    """Find the log of a time until which about, and rather less than, `total` arrivals come."""
    samples, edges = np.histogram(logits, bins=256)
    middles = (edges[1:] + edges[:-1]) / 2
    low: float
    low, high = -middles.max() - 50.0, -middles.min() + 50.0
    for _ in range(60):
        middle = (low + high) / 2
        arrivals = samples @ np.exp(np.minimum(middles + middle, np.log(cap)))
        low, high = (middle, high) if arrivals < total else (low, middle)
    return low


def _arrivals(
    logits: np.ndarray, state: np.ndarray, cap: int, until: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the first `cap` arrivals of each sample, up to a time: owners int64, times float64 [m].

    Times are logarithms, because rates may differ by more than floats can hold.
    """
    active, elapsed = np.arange(len(logits)), np.zeros(len(logits))
    owners, times = [], []
    for number in range(cap):
        elapsed = elapsed - np.log(noise(state[active], number))
        clock = np.log(elapsed) - logits[active]
        arrived = clock <= until
        active, elapsed = active[arrived], elapsed[arrived]
        owners.append(active)
        times.append(clock[arrived])
    return np.concatenate(owners), np.concatenate(times)


class DrawOptions(TypedDict, total=False):
    """The parameters of every rule that draws, which `SoftmaxSampling` has alone."""

    seed: Required[int]
    fraction: float | None
    count: int | None
    temperature: float
    of: Of


class _Draws:
    """What the sampling rules have in common: how many samples, temperature and seed."""

    def __init__(
        self,
        *,
        seed: int,
        fraction: float | None = None,
        count: int | None = None,
        temperature: float = 1.0,
        of: Of = "pool",
    ) -> None:
        """Set what is drawn.

        Args:
            seed: any integer of at least 0.
            fraction: draw int(n * fraction).
            count: draw so many. Exactly one of the two must be given.
            temperature: the logits are scores / temperature.
            of: what n counts: the samples of the whole "pool", or those that earlier stages have
                "left".
        """
        if (fraction is None) == (count is None):
            raise ParameterError(
                "needs exactly one of fraction and count",
                owner=self,
                value={"fraction": fraction, "count": count},
                got=f"fraction={fraction!r} and count={count!r}",
            )
        self.seed = require_int("seed", seed, minimum=0, owner=self)
        self.fraction = None if fraction is None else self.checked_fraction(fraction)
        self.count = None if count is None else require_int("count", count, minimum=0, owner=self)
        self.temperature = require_positive("temperature", temperature, owner=self)
        self.of = require_choice("of", of, OFS, owner=self)

    def checked_fraction(self, fraction: object) -> float:
        """Check the fraction; above 1, multiplicities sum to more than the pool."""
        return require_positive("fraction", fraction, owner=self)

    def asked_samples(self, left_samples: int, pool_samples: int) -> int:
        """Return how many samples are drawn from those that are left of a pool."""
        if self.count is not None:
            return self.count
        return int(counted(self.of, left_samples, pool_samples) * (self.fraction or 0.0))

    def logits(self, scores: np.ndarray) -> np.ndarray:
        return scores.astype(np.float64) / self.temperature


class SoftmaxSampling(_Draws):
    """Draw distinct samples by the softmax of their scores.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import SoftmaxSampling
        >>> logits = np.array([5.0, 2.0, 0.0, -9.0], dtype=np.float32)
        >>> uids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]], dtype=np.uint64)
        >>> rule = SoftmaxSampling(seed=0, count=2)
        >>> rule(logits, uids, pool_samples=4)
        array([1, 1, 0, 0])
    """

    def checked_fraction(self, fraction: object) -> float:
        return require_fraction("fraction", fraction, owner=self)

    @property
    def keeps_all(self) -> bool:
        return self.fraction == 1

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray:
        count = self.asked_samples(len(scores), pool_samples)
        return draw_without_replacement(self.logits(scores), uids, count, seed=self.seed)


class SoftCapSampling(_Draws):
    """Soft Cap Sampling (arXiv 2503.08805), whose scores are logits: samples are repeated.

    With a temperature, the logits are scores / temperature, and the penalty is taken from these: a
    draw makes a sample exp(-penalty) times as likely, whatever the scale of the scores. The paper's
    temperature is 1, where the logit is the score.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import SoftCapSampling
        >>> logits = np.array([5.0, 2.0, 0.0, -9.0], dtype=np.float32)
        >>> uids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]], dtype=np.uint64)
        >>> rule = SoftCapSampling(seed=0, count=6, penalty=1, batch_samples=1)
        >>> rule(logits, uids, pool_samples=4)
        array([4, 2, 0, 0])
    """

    def __init__(
        self,
        *,
        penalty: float = 0.15,
        batch_samples: int | str = "auto",
        **draws: Unpack[DrawOptions],
    ) -> None:
        """Set the repetition.

        Args:
            penalty: what a draw takes from a logit; the larger, the fewer repetitions. At least 0.
            batch_samples: distinct samples that are drawn at once. "auto": as published, a 1,280th
                of the draws (100,000 of 128,000,000), at least 1.
            **draws: `seed`, `fraction` or `count`, `temperature` and `of`.
        """
        super().__init__(**draws)
        self.penalty = require_finite("penalty", penalty, owner=self)
        if self.penalty < 0:
            rule = "must be at least 0"
            raise ParameterError(rule, owner=self, parameter="penalty", value=penalty)
        self.batch_samples = require_int_or_auto("batch_samples", batch_samples, owner=self)

    def _batch_samples(self, total: int) -> int:
        if isinstance(self.batch_samples, int):
            return self.batch_samples
        return max(1, total // _DRAWS_PER_BATCH)

    def faults(self, left_samples: int, pool_samples: int) -> list[str]:
        """List what makes the rule meaningless for the samples that are left of a pool."""
        total = self.asked_samples(left_samples, pool_samples)
        batch, auto = self._batch_samples(total), max(1, total // _DRAWS_PER_BATCH)
        batches = -(-total // batch)
        if batch == auto or (batch < left_samples and batches >= _FEWEST_BATCHES):
            return []
        if batch >= min(total, left_samples):
            taken = "all draws" if batch >= total else "every sample"
            effect = f"takes {taken} at once, so that no sample is repeated more than others"
        else:
            effect = f"leaves {batches} batches, so that no sample is repeated more often"
        return [
            f"a batch of batch_samples={batch} {effect}, whatever its score. Let the rule's "
            f"batch_samples be auto ({auto} here)"
        ]

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray:
        total = self.asked_samples(len(scores), pool_samples)
        return soft_cap(
            self.logits(scores),
            uids,
            total,
            penalty=self.penalty,
            batch_samples=self._batch_samples(total),
            seed=self.seed,
        )


class HardCapSampling(_Draws):
    """Draw with replacement by the softmax of scores, each sample at most `cap` times.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import HardCapSampling
        >>> logits = np.array([5.0, 2.0, 0.0, -9.0], dtype=np.float32)
        >>> uids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]], dtype=np.uint64)
        >>> rule = HardCapSampling(seed=0, count=6, cap=3)
        >>> rule(logits, uids, pool_samples=4)
        array([3, 3, 0, 0])
    """

    def __init__(self, *, cap: int = 15, **draws: Unpack[DrawOptions]) -> None:
        """Set the cap; `draws` are `seed`, `fraction` or `count`, `temperature` and `of`."""
        super().__init__(**draws)
        self.cap = require_int("cap", cap, minimum=1, owner=self)

    def __call__(self, scores: np.ndarray, uids: np.ndarray, pool_samples: int) -> np.ndarray:
        return hard_cap(
            self.logits(scores),
            uids,
            self.asked_samples(len(scores), pool_samples),
            cap=self.cap,
            seed=self.seed,
        )
