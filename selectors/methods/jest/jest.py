"""JEST: a sub-batch whose samples are learnable together, drawn in chunks.

Evans et al., "Data curation via joint example selection further accelerates multimodal learning",
arXiv 2406.17711. With a reference larger than the learner it is ACID (Udandarao et al., "Active
data curation effectively distills large-scale multimodal models", arXiv 2411.18674).
"""

from __future__ import annotations

import numpy as np
import torch

from siftclip.errors import require_choice, require_int
from siftclip.selectors.core.base import Choice, Requirements, Selector, Source, SubBatch
from siftclip.selectors.core.rules import Of, top_fraction
from siftclip.selectors.methods.jest.joint_sampling import Judge, joint_sample
from siftclip.selectors.methods.jest.learnability import (
    ModelFeatures,
    required_features,
    signed_models,
)
from siftclip.selectors.methods.jest.pair_losses import LOSSES, LossName


class JEST(Selector):
    """Draw samples by their learnability among those that are drawn already.

    The features of all samples of the source are in memory at once. Scores are those of the first
    chunk, before anything is drawn.
    """

    def __init__(
        self,
        *,
        learner: ModelFeatures | None,
        reference: ModelFeatures | None,
        loss: LossName = "sigmoid",
        chunks: int = 16,
        fraction: float,
        of: Of = "pool",
        seed: int = 0,
    ) -> None:
        """Set the parameters.

        Args:
            learner: whose large losses are wanted; None: do not care (easy reference).
            reference: whose small losses are wanted; None: do not care (hard samples).
            loss: "sigmoid", for which the method is exact, or "softmax"; see `joint_sample`.
            chunks: in which a sub-batch is drawn; 16 in the paper.
            fraction: in `select` alone: draw int(n * fraction), all as one group.
            of: what n counts: the samples of the whole "pool", or those that are "left".
            seed: of the draws in `select`; a sub-batch brings its own.
        """
        signed_models(self, learner, reference)
        self.learner, self.reference = learner, reference
        self.loss = require_choice("loss", loss, tuple(LOSSES), owner=self)
        self.chunks = require_int("chunks", chunks, minimum=1, owner=self)
        self.rule = top_fraction(self, fraction, of)
        self.seed = require_int("seed", seed, minimum=0, owner=self)

    @property
    def requires(self) -> Requirements:
        models = signed_models(self, self.learner, self.reference)
        return required_features(models)

    def select(self, source: Source) -> Choice:
        """Draw the fraction, from all samples as one group."""
        if not len(source):
            return Choice(multiplicities=np.zeros(0, dtype=np.int64))
        count = min(len(source), self.rule.asked_samples(len(source), len(source.whole)))
        return self.draw(source, SubBatch(samples=count, seed=self.seed))

    @torch.no_grad()
    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        """Draw a sub-batch jointly; groups share what is drawn."""
        requires = self.requires
        parts = [part.rows for part in source.parts(requires)]
        rows = np.sort(np.concatenate([*parts, np.empty(0, dtype=np.int64)]))
        chunk = source.take(rows, requires)
        usable, features = chunk.usable(), chunk.features
        if len(rows) < len(source):  # samples without features are not usable, and stay zero
            at = torch.from_numpy(source.index_of(rows)).to(usable.device, non_blocking=True)
            usable = usable.new_zeros(len(source)).index_copy_(0, at, usable)
            features = {
                key: values.new_zeros((len(source), values.shape[1])).index_copy_(0, at, values)
                for key, values in features.items()
            }
        judges = [
            Judge(
                image=features[model.keys[0]],
                text=features[model.keys[1]],
                logits=model.logits(source, biased=self.loss == "sigmoid"),
                sign=sign,
            )
            for sign, model in signed_models(self, self.learner, self.reference)
        ]
        kept, scores = joint_sample(
            judges,
            usable,
            source.uids,
            sub_batch,
            losses=LOSSES[self.loss],
            chunks=self.chunks,
            ranks=source.ranks,
        )
        return Choice(multiplicities=kept, scores=scores)
