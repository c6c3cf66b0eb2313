"""InfoBatch (Qin et al., ICLR 2024, arXiv 2303.04947): prune what is learned, without a bias."""

from __future__ import annotations

import numpy as np

from siftclip.errors import ParameterError, require_fraction, require_int
from siftclip.selectors.core.base import Choice, Requirements, Selector, Source
from siftclip.selectors.core.noise import noise, noise_state
from siftclip.selectors.core.source import TRAINING_LOSS

# Other noise than that of a rule which draws with the same seed: what has survived one draw must
# not know how another will end.
_DRAW = 0x496E666F


def prune_learned(
    losses: np.ndarray, uids: np.ndarray, *, ratio: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Drop samples with a small loss at random, and let those that stay count for them.

    A sample whose loss is below the mean is dropped with probability `ratio`; one that stays has
    the weight 1 / (1 - ratio). So the expected sum of weighted gradients is the sum over all
    samples, as long as the gradient of a sample does not depend on the others. A contrastive loss
    has other negatives in other batches: for CLIP it is a heuristic.

    What differs from the release: a loss that is not known is neither pruned nor part of the mean,
    instead of being 3; each sample is drawn by itself, instead of exactly int((1 - ratio) * m) of
    m samples, which is a little biased; and no global random state is set. Ids are never packed
    with losses into floats.

    Args:
        losses: float64 [n], those seen last; not finite: not known.
        uids: uint64 [n, 2].
        ratio: in [0, 1).
        seed: any integer of at least 0.

    Returns:
        Multiplicities, int64 [n] of 0 and 1, and weights, float32 [n], 1 for what is dropped.
    """
    known = np.isfinite(losses)
    learned = np.zeros(len(losses), dtype=bool)
    if known.any():
        # the mean of equal numbers may be rounded up, and must not be above all of them
        mean = min(losses[known].mean(), losses[known].max())
        learned = known & (losses < mean)
    dropped = learned & (noise(noise_state(uids, seed), _DRAW) < ratio)
    weights = np.where(learned & ~dropped, 1 / (1 - ratio), 1.0)
    return (~dropped).astype(np.int64), weights.astype(np.float32)


class InfoBatch(Selector):
    """Train on a random part of the samples that are learned best, and weigh it up.

    Meant for online.cadence=every_epoch and several epochs: the losses are those of the last visit
    to each sample, and in the first epoch all are kept. A source whose uids are mixed with the
    epoch gets a new random part each time. In the paper the last eighth of the epochs is not
    pruned; that is for the schedule which asks the selector.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> losses = np.array([0.1, 0.2, 0.3, 4.0, np.nan])  # the last one is not known yet
        >>> selector = siftclip.selectors.InfoBatch(seed=3, ratio=0.5)
        >>> selection = siftclip.select(column=losses, selector=selector)
        >>> selection.rows
        array([2, 3, 4])
        >>> selection.weights
        array([2., 1., 1.], dtype=float32)
    """

    weighs = True

    def __init__(self, *, seed: int, ratio: float = 0.5) -> None:
        """Set the random part.

        Args:
            seed: of the draws.
            ratio: the probability that a sample with a loss below the mean is dropped, in (0, 1).
        """
        self.seed = require_int("seed", seed, minimum=0, owner=self)
        self.ratio = require_fraction("ratio", ratio, owner=self)
        if self.ratio == 1:
            rule = "must be below 1: no weight makes up for samples that are always dropped"
            raise ParameterError(rule, owner=self, parameter="ratio", value=ratio)

    @property
    def requires(self) -> Requirements:
        return Requirements(column=TRAINING_LOSS)

    def select(self, source: Source) -> Choice:
        """Prune all samples of the source; their scores are the losses."""
        losses = source.take(source.rows, self.requires).column
        if losses is None:
            raise ValueError("the source lacks the column that InfoBatch.requires names")
        kept, weights = prune_learned(losses, source.uids, ratio=self.ratio, seed=self.seed)
        return Choice(multiplicities=kept, scores=losses.astype(np.float32), weights=weights)
