"""VAS with a running covariance of the learner's own features. Experimental: nothing is published.

The variance alignment score (arXiv 2402.02055) asks how far a sample points where a target varies.
Here the target is what was trained on lately, seen by the learner. This may reward what the learner
represents already, and so confirm it in its faults: put a filter of quality before it.

NormSim_2 with the same target is sqrt(m f^T S f) for m samples: the same ranking. One class does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError, ParameterError, require_fraction
from siftclip.selectors.core.base import (
    Choice,
    Chunk,
    Requirements,
    RuleOptions,
    ScoreSelector,
    Source,
    SubBatch,
)
from siftclip.selectors.fitting.covariance import (
    check_sums,
    mean_moment,
    pool_moment,
    rows_of,
    second_moment,
)
from siftclip.selectors.kernels.blocks import usable_rows
from siftclip.selectors.methods.vas import vas

if TYPE_CHECKING:
    from typing_extensions import Unpack


def updated_moment(moment: Tensor | None, features: Tensor, decay: float) -> Tensor | None:
    """Compute decay * S + (1 - decay) * the mean of f f^T: float64 [d, d]; without S the mean.

    The sum is exact, see `covariance`, so that the order of the samples does not change it. Samples
    that are zero or not finite are left out; of no others, the answer is S.

    Args:
        moment: float64 [d, d], the S so far, or None.
        features: float [n, d], norms of about 1.
        decay: in (0, 1).
    """
    samples = int(usable_rows(features).sum())
    if samples == 0:
        return moment
    mean = mean_moment(check_sums("RunningVas", second_moment(features)), samples)
    return mean if moment is None else torch.lerp(mean, moment, decay)


class RunningVas(ScoreSelector):
    """Keep samples that lie where the samples chosen lately vary, in the learner's features.

    At every step: score the super-batch by f^T S f, choose, and move S towards the mean of f f^T
    over the chosen samples. At the first step, S is that of the super-batch itself. All ranks hold
    all features, and each works out the same S. `select` knows no steps: it takes the S of its
    source, as `Vas` does with the target "pool", and changes nothing.
    """

    def __init__(
        self, *, key: str = "learner_img", decay: float = 0.99, **rule: Unpack[RuleOptions]
    ) -> None:
        """Choose the features and how fast the covariance moves.

        Args:
            key: of the features, such as `learner_img` or `learner_txt`.
            decay: what a step leaves of the covariance before it, in (0, 1).
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.key = key
        self.decay = require_fraction("decay", decay, owner=self)
        if self.decay == 1:
            must = "must be below 1, or nothing moves"
            raise ParameterError(must, owner=self, parameter="decay", value=decay)
        self._running: Tensor | None = None

    @property
    def requires(self) -> Requirements:
        return Requirements(features=(self.key,))

    def fit(self, source: Source) -> None:
        if self._running is not None:
            self._matrix = self._running.to(source.device)
            return
        rows = rows_of(source, self.requires)
        self._matrix = mean_moment(*pool_moment("RunningVas", source, rows, self.requires))

    def score(self, chunk: Chunk) -> Tensor:
        features = chunk.features[self.key]
        if features.shape[1] != len(self._matrix):
            raise InputError(
                f"RunningVas: {self.key} has {features.shape[1]} components, the covariance so far "
                f"{len(self._matrix)}: it belongs to another model."
            )
        return vas(features, self._matrix)

    def select(self, source: Source) -> Choice:
        """Score the samples by their own covariance and apply the rule."""
        running, self._running = self._running, None
        try:
            return super().select(source)
        finally:
            self._running = running

    @torch.no_grad()
    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        """Choose a sub-batch, and learn from it."""
        choice = super().draw(source, sub_batch)
        rows = source.rows[np.flatnonzero(choice.multiplicities)]
        chosen = source.take(rows, self.requires).features[self.key]
        running = None if self._running is None else self._running.to(source.device)
        self._running = updated_moment(running, chosen, self.decay)
        return choice

    def state_dict(self) -> dict[str, Any]:
        return {} if self._running is None else {"covariance": self._running.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._running = state.get("covariance")
