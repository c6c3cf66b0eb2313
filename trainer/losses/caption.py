"""The captioning loss of CoCa (arXiv 2205.01917), as sums that can be put together."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

PAD_TOKEN = 0  # of open_clip's own tokenizer


def caption_loss_sum(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, pad_token: int = PAD_TOKEN
) -> Tensor:
    """Sum the cross entropies of all tokens that are not padding, to a float32 scalar.

    Divided by `caption_tokens` and multiplied by the number of ranks (DDP averages), sums of
    micro-batches and ranks add up to what one process with the whole batch computes: the mean over
    all its tokens. open_clip's CoCaLoss differs: it takes the mean of each rank and micro-batch by
    itself, which gives the tokens of a rank with short captions more weight.

    Args:
        logits: float [m, L, V].
        labels: int64 [m, L].
        weights: float [m], what the tokens of each sample count; None: 1.
        pad_token: what stands for padding in `labels`. open_clip takes 0 for it whatever the
            tokenizer says, and so trains the decoder of `coca_roberta` to write padding.
    """
    with torch.autocast(logits.device.type, enabled=False):
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            exact.flatten(0, 1),
            labels.flatten(),
            ignore_index=pad_token,
            reduction="sum" if weights is None else "none",
        )
        if weights is None:
            return losses
        return (losses.view_as(labels).sum(1) * weights.to(losses.dtype)).sum()


@torch.no_grad()
def caption_tokens(
    labels: Tensor,
    *,
    world_size: int,
    weights: Tensor | None = None,
    pad_token: int = PAD_TOKEN,
) -> Tensor:
    """Count the tokens that are not padding on all ranks, a scalar above 0.

    Args:
        labels: int64 [m, L], of all micro-batches of this rank.
        world_size: number of ranks; all of them must call it.
        weights: float [m], as in `caption_loss_sum`; a token then counts so much.
        pad_token: as of `caption_loss_sum`.
    """
    tokens = (labels != pad_token).sum(1)
    total = tokens.sum() if weights is None else (tokens * weights).sum()
    if world_size > 1:
        dist.all_reduce(total)
    return total.where(total > 0, torch.ones_like(total))  # a sum of nothing is 0: 0 / 1 is no NaN
