"""CoCa's loss (arXiv 2205.01917): the softmax loss, to which that of the captions is added."""

from __future__ import annotations

from torch import Tensor

from siftclip.errors import require_positive
from siftclip.trainer.losses.inputs import LossInputs
from siftclip.trainer.losses.softmax import SoftmaxLoss


class CocaLoss(SoftmaxLoss):
    """The softmax loss of a model that also writes captions, and how much either loss counts.

    Args:
        contrastive_weight: factor of the softmax loss, above 0.
        caption_weight: factor of the caption loss, above 0.

    Raises:
        InputError: a number is not above 0.
    """

    needs_captions = True

    def __init__(self, *, contrastive_weight: float = 1.0, caption_weight: float = 2.0) -> None:
        super().__init__()
        self.contrastive_weight = require_positive(
            "contrastive_weight", contrastive_weight, owner=self
        )
        self.caption_weight = require_positive("caption_weight", caption_weight, owner=self)

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute `contrastive_loss`, times its weight."""
        terms = super().terms(inputs)
        return {name: self.contrastive_weight * value for name, value in terms.items()}
