"""VAS-D and NormSim-D: what is left of a pool becomes its own target, step by step.

Beside Vas and NormSim, for which a target must be given, these need nothing but the pool: from the
samples that an earlier stage has left, the lowest scores are removed in many steps, and the
covariance of the rest is taken again after each (arXiv 2402.02055 and 2405.19547).

The answer is that of scoring every sample at every step; `elimination.LazyForms` says why few have
to be scored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from siftclip.errors import require_choice, require_fraction, require_int
from siftclip.hashing import uniform_score
from siftclip.purposes import HashPurpose
from siftclip.selectors.core.base import Source
from siftclip.selectors.core.rules import OFS, Of, keep_top
from siftclip.selectors.fitting.covariance import mean_moment, pool_moment, rows_of
from siftclip.selectors.methods.removal.elimination import LazyForms, Samples
from siftclip.selectors.methods.removal.stepwise import Criterion, StepwiseRemoval

# Which of the samples with these rows, int64 [n], and uids, uint64 [n, 2], the covariance of a step
# is taken from: bool [n].
Draw = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


class OwnCovariance:
    """Scores x^T S x, with the covariance S of the samples that are left, or of some of them."""

    def __init__(
        self, samples: Samples, pool: Callable[[], tuple[Tensor, int]] | None, draw: Draw | None
    ) -> None:
        """Start with the covariance of the pool, or without `pool` of what is left.

        Args:
            samples: those to score.
            pool: gives the exact sum, and the number of samples that it is of, that makes up the
                first covariance: with a `draw` alone, else together with what is left.
            draw: which samples a covariance is of; None: of all.
        """
        self._samples, self._pool, self._draw = samples, pool, draw
        self._sums: Tensor | None = None  # exact, of what was left at the last step
        self.forms = LazyForms(samples)

    def lowest(self, step: int, left: np.ndarray, removed: np.ndarray, count: int) -> np.ndarray:
        self.forms.move(self._covariance(step, left, removed))
        return self.forms.lowest(left, count)

    def _covariance(self, step: int, left: np.ndarray, removed: np.ndarray) -> Tensor:
        pool = self._pool if step == 0 else None
        if self._draw is not None:
            if pool is not None:
                return mean_moment(*pool())
            rows, uids = self._samples.rows[left], self._samples.uids[left]
            drawn = left[self._draw(rows, uids, step)]
            return mean_moment(self._samples.moment(drawn), len(drawn))
        if self._sums is None:
            self._sums = self._samples.moment(left)
        else:
            self._sums = self._sums - self._samples.moment(removed)
        if pool is not None:
            sums, others = pool()
            if others:
                return mean_moment(self._sums + sums, len(left) + others)
        return mean_moment(self._sums, len(left))


class VasD(StepwiseRemoval):
    """Remove the samples that lie least in the directions in which the rest varies.

    Example:
        >>> import torch
        >>> import siftclip
        >>> images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.0, 1.0]])
        >>> selector = siftclip.selectors.VasD(fraction=0.5, steps=2)
        >>> siftclip.select(features=images, selector=selector).rows
        array([0, 1])
    """

    def __init__(
        self, *, features: str | None = None, fraction: float, steps: int, initial: Of = "pool"
    ) -> None:
        """Choose features and schedule.

        Args:
            features: as for `StepwiseRemoval`.
            fraction: as for `StepwiseRemoval`.
            steps: as for `StepwiseRemoval`.
            initial: the covariance of the first step: of the whole `pool`, as in the released
                code, or of what earlier stages have `left`.
        """
        super().__init__(features=features, fraction=fraction, steps=steps)
        self.initial = require_choice("initial", initial, OFS, owner=self)

    def criterion(self, source: Source, samples: Samples) -> Criterion:
        return self._criterion(source, samples, draw=None)

    def _criterion(self, source: Source, samples: Samples, draw: Draw | None) -> OwnCovariance:
        def pool_sums() -> tuple[Tensor, int]:
            pool = source.whole
            rows = rows_of(pool, self.requires)
            if draw is None:  # the others than `samples`
                others = np.ones(len(pool), dtype=bool)
                others[pool.index_of(samples.rows)] = False
                rows = rows[others[pool.index_of(rows)]]
            else:
                rows = rows[draw(rows, pool.uids[pool.index_of(rows)], 0)]
            return pool_moment(type(self).__name__, pool, rows, self.requires)

        return OwnCovariance(samples, pool_sums if self.initial == "pool" else None, draw)


class NormSimD(VasD):
    """VAS-D with each covariance from a random part of the samples, as released with NormSim."""

    def __init__(
        self,
        *,
        features: str | None = None,
        fraction: float,
        steps: int,
        seed: int,
        initial: Of = "pool",
        sample_fraction: float = 0.1,
    ) -> None:
        """Choose features, schedule and samples.

        Args:
            features: as for `StepwiseRemoval`.
            fraction: as for `StepwiseRemoval`.
            steps: as for `StepwiseRemoval`.
            seed: decides which samples each covariance is taken from; the released code has none.
            initial: as for `VasD`.
            sample_fraction: the part of the samples that a covariance is taken from, in (0, 1].
        """
        super().__init__(features=features, fraction=fraction, steps=steps, initial=initial)
        self.seed = require_int("seed", seed, minimum=0, owner=self)
        self.sample_fraction = require_fraction("sample_fraction", sample_fraction, owner=self)

    def criterion(self, source: Source, samples: Samples) -> Criterion:
        return self._criterion(source, samples, draw=self.drawn)

    def drawn(self, rows: np.ndarray, uids: np.ndarray, step: int) -> np.ndarray:
        """Choose the samples that the covariance of a step is taken from: bool [n], at least one.

        Args:
            rows: int64 [n].
            uids: uint64 [n, 2]. Whether a sample is drawn follows from them, seed and step.
            step: from 0.
        """
        count = max(1, int(self.sample_fraction * len(rows)))
        draws = uniform_score(uids, self.seed + HashPurpose.NORMSIM_D + (step << 48))
        return keep_top(draws, uids, count).astype(bool)
