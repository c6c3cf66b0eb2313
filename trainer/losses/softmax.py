"""CLIP's softmax loss (arXiv 2103.00020, figure 3) on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from siftclip.trainer.losses.base import ContrastiveLoss, mean_over_ranks
from siftclip.trainer.losses.collectives import gather_features, log_sum_exp_to_owner
from siftclip.trainer.losses.copies import Copies
from siftclip.trainer.losses.inputs import LossInputs
from siftclip.trainer.losses.paired import paired_log_sum_exp


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTerms:
    """What the losses of this rank's samples are made of.

    A margin is the log-sum-exp of a sample's logits with all others, minus its own logit. The
    softmax loss is log(1 + exp(margin)); taken so, it is exact to a relative 1e-5 also where it is
    1e-4 and the logits are 100, which log-sum-exp minus own logit in float32 is not.

    b is the number of samples of this rank, B of all ranks. A logit is logit scale times
    similarity, without the bias, which cancels.

    Attributes:
        image: [b, d], times the logit scale.
        all_text: [B, d], of all ranks, not scaled.
        own: [b], the logit of each image with its own text.
        margins: [2, b], `margins[0]` of each image with all other texts, and `margins[1]` of each
            text with all other images, those of all ranks and without copies; about -1e30 where
            there is no other.
    """

    image: Tensor
    all_text: Tensor
    own: Tensor
    margins: Tensor

    @classmethod
    def of(cls, inputs: LossInputs) -> PairedTerms:
        """Compute those of a batch on any number of ranks, without the pairs of copies."""
        return paired_terms(
            inputs.image_features,
            inputs.text_features,
            inputs.logit_scale,
            copies=Copies.of(inputs),
            rank=inputs.rank,
            world_size=inputs.world_size,
        )

    def cross_entropies(self) -> Tensor:
        """Compute [2, b]: of each image among all texts, and of each text among all images."""
        return torch.logaddexp(self.margins, self.margins.new_zeros(()))


def paired_terms(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    copies: Copies | None = None,
    rank: int,
    world_size: int,
) -> PairedTerms:
    """Compute own logits and margins of this rank's samples against those of all ranks.

    Only the texts are gathered: a rank sees all texts for its own images, and what it sees of a
    column it shares with the owner of the text. Each rank so makes its [b, B] logits once, where
    the usual loss gathers both sides and makes them twice.

    Args:
        image: float [b, d], of this rank.
        text: float [b, d], of this rank.
        scale: of the logits.
        copies: that are left out of the margins.
        rank: of this process.
        world_size: number of ranks.
    """
    scaled = image * scale
    all_text = gather_features(text, rank=rank, world_size=world_size)
    matching = (scaled * text).sum(1)
    by_image, partial = paired_log_sum_exp(
        scaled, all_text, skip_diagonal=rank * len(image), copies=copies
    )
    by_text = log_sum_exp_to_owner(partial, rank=rank, world_size=world_size)
    return PairedTerms(
        image=scaled,
        all_text=all_text,
        own=matching,
        margins=torch.stack([by_image, by_text]) - matching,
    )


class SoftmaxLoss(ContrastiveLoss):
    """The cross entropy of each image among all texts and of each text among all images.

    Equals open_clip's ClipLoss(local_loss=True, gather_with_grad=True), whose other combinations
    give wrong gradients, without its matrices of logits. Sample weights make it a weighted mean;
    a sample of weight 0 still is a negative of the others. A sample is no negative of its copies.
    A logit bias has no effect.
    """

    gives_sample_losses = True

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute `contrastive_loss`."""
        losses = PairedTerms.of(inputs).cross_entropies().mean(0)
        self.sample_losses = losses.detach()
        loss = mean_over_ranks(losses, inputs.weights, world_size=inputs.world_size)
        return {"contrastive_loss": loss}
