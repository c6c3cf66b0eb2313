"""SigLIP's sigmoid loss (arXiv 2303.15343), open_clip's code."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

from torch import Tensor

from siftclip.errors import InputError
from siftclip.trainer.losses.base import ContrastiveLoss
from siftclip.trainer.losses.collectives import gather_features
from siftclip.trainer.losses.copies import Copies, copies_softplus
from siftclip.trainer.losses.inputs import LossInputs

DistImpl = Literal["bidir", "shift", "reduce", "gather"]


class SigLipLoss(ContrastiveLoss):
    """The sigmoid loss of all pairs but those of copies, divided by the number of images.

    Args:
        dist_impl: how texts reach the other ranks. "bidir" passes them on to both neighbours,
            "shift" to one, "reduce" sums each rank's into all, "gather" collects all at once (and
            holds them all in memory).

    Raises:
        InputError: dist_impl is none of these.
    """

    takes_weights = False
    needs_logit_bias = True

    def __init__(self, dist_impl: DistImpl = "bidir") -> None:
        from open_clip.loss import SigLipLoss as OpenClipSigLipLoss

        super().__init__()
        if dist_impl not in get_args(DistImpl):
            raise InputError(
                f"SigLipLoss: dist_impl must be one of {', '.join(get_args(DistImpl))}. "
                f"Got {dist_impl!r}."
            )
        # open_clip calls torch.distributed.nn, and torch 2.15 tells users to tell open_clip. For
        # good rather than around each step: changed filters make Python repeat other warnings.
        warnings.filterwarnings(
            "ignore", r"torch\.distributed\.nn\.functional\.", FutureWarning, r"open_clip\.loss"
        )
        self.loss = OpenClipSigLipLoss(dist_impl=dist_impl)

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute `contrastive_loss`."""
        assert inputs.logit_bias is not None  # it is declared
        self.loss.rank, self.loss.world_size = inputs.rank, inputs.world_size
        loss = self.loss(
            inputs.image_features, inputs.text_features, inputs.logit_scale, inputs.logit_bias
        )
        copies = Copies.of(inputs)
        if copies is not None:  # their terms, as open_clip adds them up, are taken out again
            all_text = gather_features(
                inputs.text_features, rank=inputs.rank, world_size=inputs.world_size
            )
            scaled = inputs.image_features * inputs.logit_scale
            terms = copies_softplus(scaled, all_text, inputs.logit_bias, copies)
            loss = loss - terms / len(scaled)
        return {"contrastive_loss": loss}
