"""CLIP's softmax contrastive loss (arXiv 2103.00020, figure 3), right on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _GatherWithGradient(torch.autograd.Function):
    """Concatenates equally shaped tensors of all ranks; the backward sums over ranks.

    Written with public collectives that every backend has: torch's own versions are private or
    deprecated in one of the releases that we support.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.local_samples = local.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.local_samples
        return gradient[start : start + ctx.local_samples]


def gather_features(local: Tensor, *, world_size: int) -> Tensor:
    """The features of all ranks, [world_size * b, d], through which gradients flow back.

    Args:
        local: float [b, d]; b must be the same on every rank.
        world_size: number of ranks; with 1 the input is returned.
    """
    if world_size == 1:
        return local
    return _GatherWithGradient.apply(local)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """The mean symmetric cross entropy of this rank's samples against those of all ranks.

    Averaged over ranks, as DDP averages gradients, value and gradients are those of one process
    with the whole batch: the gather's backward multiplies by the number of ranks what DDP divides
    by it. Similarities and log-sum-exp are taken in float32. This is what open_clip computes with
    `--local-loss --gather-with-grad`; its other combinations give wrong gradients and do not exist
    here.

    Args:
        image_features: float [b, d], unit norm, of this rank.
        text_features: float [b, d], unit norm, of this rank.
        logit_scale: scalar, already exponentiated.
        rank: of this process.
        world_size: number of ranks.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text, scale = image_features.float(), text_features.float(), logit_scale.float()
        all_image = gather_features(image, world_size=world_size)
        all_text = gather_features(text, world_size=world_size)
        labels = torch.arange(len(image), device=image.device) + rank * len(image)
        image_loss = F.cross_entropy(scale * image @ all_text.T, labels)
        text_loss = F.cross_entropy(scale * text @ all_image.T, labels)
        return (image_loss + text_loss) / 2
