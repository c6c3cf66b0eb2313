"""The base class of the losses, and the mean over the samples of all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siftclip.errors import InputError
from siftclip.trainer.losses.inputs import LossInputs, check_shapes, in_loss_precision


class ContrastiveLoss(nn.Module, ABC):
    """A loss of image and text features; a subclass computes its terms.

    DDP averages gradients over ranks. On every rank a term is a value whose mean over ranks is the
    loss of the whole batch, and whose averaged gradients are those of one process with the whole
    batch, those of logit scale and bias included.

    `sample_losses` is what the last call charged to each sample of this rank, float [b] without
    gradient; None for losses whose terms belong to pairs of samples.
    """

    sample_losses: Tensor | None = None
    takes_weights: ClassVar[bool] = True  # False: `LossInputs.weights` must be None

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute the terms, scalars under open_clip's names, whose sum is to be minimised.

        Computed in float32 (float64 for float64 features), whatever autocast says.

        Raises:
            InputError: a tensor is missing or has the wrong shape, or, for tensors on the CPU, a
                wrong value.
        """
        check_shapes(inputs, type(self).__name__)
        with torch.autocast(inputs.image_features.device.type, enabled=False):
            return self.terms(in_loss_precision(inputs))

    @abstractmethod
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute the terms of inputs that are checked and of one precision."""


def mean_over_ranks(values: Tensor, weights: Tensor | None, *, world_size: int) -> Tensor:
    """Return a scalar of this rank whose mean over ranks is the weighted mean over all samples.

    Args:
        values: float [b], of this rank's samples.
        weights: float [b] or None for equal ones; divided by their sum over all ranks.
        world_size: number of ranks.

    Raises:
        InputError: weights on the CPU are all zero. On another device the result is NaN then.
    """
    if weights is None:
        return values.mean()
    total = weights.detach().sum()
    if world_size > 1:
        dist.all_reduce(total)
    if total.device.type == "cpu" and total == 0:
        raise InputError(
            "The sample weights of a batch sum to 0 over all ranks, so it has no weighted mean: "
            "leave samples without weight out of the selection. Got only zeros."
        )
    return (values * weights).sum() * (world_size / total)


def keep_bias(loss: Tensor, logit_bias: Tensor | None) -> Tensor:
    """Return the loss, with the gradient zero for a bias that cancels in it.

    A softmax does not change when all logits grow by the same number. DDP still waits for a
    gradient of each parameter.
    """
    return loss if logit_bias is None else loss + 0 * logit_bias
