"""Sums and gathers over ranks through which gradients flow.

Every loss is averaged over ranks by DDP, and so is linear in what its ranks return; the gradient of
a value that several ranks use is the sum of their gradients. Written with the collectives that all
backends have: torch's own with gradients are private or deprecated in one of the releases that we
support. All tensors have the same shape on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.rank, ctx.world_size = rank, world_size
        return _all_gather(local, world_size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradients[0], ctx.rank, ctx.world_size), None, None


class _SumToOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return _reduce_scatter(total, rank, world_size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradients[0], ctx.world_size), None, None


def gather_features(local: Tensor, *, rank: int, world_size: int) -> Tensor:
    """Gather the rows of all ranks in the order of ranks; the backward sums gradients over ranks.

    Args:
        local: [b, ...]; b must be the same on every rank.
        rank: of this process.
        world_size: number of ranks; with 1 the input is returned.

    Returns:
        [world_size * b, ...].
    """
    return local if world_size == 1 else _Gather.apply(local, rank, world_size)


def sum_to_owner(partial: Tensor, *, rank: int, world_size: int) -> Tensor:
    """Sum over ranks the part that is this rank's: [world_size * b] -> [b]."""
    return partial if world_size == 1 else _SumToOwner.apply(partial, rank, world_size)


def log_sum_exp_to_owner(partial: Tensor, *, rank: int, world_size: int) -> Tensor:
    """Compute the log-sum-exp over ranks of this rank's part: [world_size * b] -> [b].

    Shifted by the maximum over ranks, so it neither overflows nor loses small terms. Its gradient
    for the partial result of a rank is the gradient of the owner times exp(partial - total).
    """
    if world_size == 1:
        return partial
    top = _max_over_ranks(partial)
    top_of_rank = top.view(world_size, -1)[rank]
    return sum_to_owner((partial - top).exp(), rank=rank, world_size=world_size).log() + top_of_rank


@torch.no_grad()
def log_sum_exp_over_ranks(partial: Tensor, *, world_size: int) -> Tensor:
    """Compute the log-sum-exp over ranks, [n] -> [n], the same on every rank; without gradient."""
    if world_size == 1:
        return partial
    top = _max_over_ranks(partial)
    total = (partial - top).exp_()
    dist.all_reduce(total)
    return total.log_().add_(top)


def _max_over_ranks(values: Tensor) -> Tensor:
    top = values.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top


def _all_gather(local: Tensor, world_size: int) -> Tensor:
    local = local.contiguous()
    gathered = local.new_empty((world_size * len(local), *local.shape[1:]))
    if _on_nccl(local):
        dist.all_gather_into_tensor(gathered, local)
    else:
        dist.all_gather(list(gathered.chunk(world_size)), local)
    return gathered


def _reduce_scatter(total: Tensor, rank: int, world_size: int) -> Tensor:
    samples = len(total) // world_size
    if _on_nccl(total):
        part = total.new_empty((samples, *total.shape[1:]))
        dist.reduce_scatter_tensor(part, total.contiguous())
        return part
    # A copy, since a gradient that autograd hands over may be needed elsewhere.
    total = total.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total[rank * samples : (rank + 1) * samples].clone()


def _on_nccl(tensor: Tensor) -> bool:
    return tensor.is_cuda and "nccl" in dist.get_backend()
