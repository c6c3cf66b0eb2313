"""The loop of the methods that remove samples in steps, and what a killed run continues from."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import numpy as np
import torch

from siftclip.errors import require_fraction, require_int
from siftclip.selectors.core.base import Choice, Requirements, Selector, Source
from siftclip.selectors.core.source import IMAGE, Cache, ReadsFeatures
from siftclip.selectors.fitting.covariance import all_ranks
from siftclip.selectors.methods.removal.elimination import Samples, remaining_samples

CHECKPOINTS = 10  # so often a run keeps what was removed, from which all else follows
MOST_STEPS = 1_000_000  # far more than pay off; each is a pass over what is left


class Criterion(Protocol):
    """Says which samples go. It lives as long as a run, which may begin at any step."""

    def lowest(self, step: int, left: np.ndarray, removed: np.ndarray, count: int) -> np.ndarray:
        """Choose the `count` samples that a step removes: bool [m].

        Args:
            step: from 0.
            left: int64 [m], positions in `Samples`, ascending.
            removed: int64, those that the step before has removed.
            count: at least 1.
        """


class StepwiseRemoval(ReadsFeatures, Selector):
    """Remove samples in steps of equal size, each time those that matter least for the rest."""

    def __init__(self, *, features: str | None = None, fraction: float, steps: int) -> None:
        """Choose features and schedule.

        Args:
            features: name of a feature set, of which the image features are used: `l14_img`;
                None: the one that it is used with.
            fraction: keep int(n * fraction) of the n samples of the whole pool, in (0, 1].
            steps: the number of removals; each is of ceil((left - kept) / steps), the last ones
                of what is missing.
        """
        self.features = features
        self.fraction = require_fraction("fraction", fraction, owner=self)
        self.steps = require_int("steps", steps, minimum=1, maximum=MOST_STEPS, owner=self)

    @property
    def requires(self) -> Requirements:
        return Requirements(features=self.feature_keys(IMAGE))

    @property
    def keeps_all(self) -> bool:
        return self.fraction == 1

    def asked_samples(self, left_samples: int, pool_samples: int) -> int:
        return int(self.fraction * pool_samples)

    @abstractmethod
    def criterion(self, source: Source, samples: Samples) -> Criterion:
        """Build what decides in a run."""

    @torch.no_grad()
    def select(self, source: Source) -> Choice:
        """Remove step by step.

        Returns:
            A choice whose scores are the step, from 0, at which a sample was removed, the number
            of steps for what is kept, and NaN for what has no score.
        """
        cache = source.cache(self)
        samples = Samples(type(self).__name__, source, self.requires)
        removal = np.where(samples.squared_norms > 0, self.steps, -1).astype(np.int32)
        left = np.flatnonzero(removal == self.steps)
        sizes = remaining_samples(
            len(left), self.asked_samples(len(source), len(source.whole)), self.steps
        )
        criterion = self.criterion(source, samples)
        every = max(1, self.steps // CHECKPOINTS)
        start, kept = last_checkpoint(source, cache, range(every, self.steps, every))
        if kept is not None:
            removal = kept
            left = np.flatnonzero(removal == self.steps)
        with source.bar(len(left) - sizes[-1], type(self).__name__) as bar:
            for step in range(start, self.steps):
                if len(left) == sizes[-1]:
                    break
                removed = np.flatnonzero(removal == step - 1) if step else left[:0]
                lowest = criterion.lowest(step, left, removed, len(left) - sizes[step])
                removal[left[lowest]] = step
                left = left[~lowest]
                bar.update(int(lowest.sum()))
                if (step + 1) % every == 0 and source.ranks.rank == 0:
                    cache.put(f"step-{step + 1}", removal=removal.copy())
        return self._choice(source, samples, removal)

    def _choice(self, source: Source, samples: Samples, removal: np.ndarray) -> Choice:
        scores = np.full(len(source), np.nan, dtype=np.float32)
        scores[source.index_of(samples.rows)] = np.where(removal < 0, np.nan, removal)
        return Choice(multiplicities=(scores == self.steps).astype(np.int64), scores=scores)


def last_checkpoint(source: Source, cache: Cache, steps: range) -> tuple[int, np.ndarray | None]:
    """Find the last of `steps` that all ranks have, and its removals; (0, None) for none."""
    for step in reversed(steps):
        kept = cache.get(f"step-{step}")
        if all_ranks(source.ranks, kept is not None) and kept is not None:
            return step, kept["removal"].copy()
    return 0, None
