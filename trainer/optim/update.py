"""From gradients to new weights: norm, clipping, and skipping what is not finite.

On a device nothing waits for the host: whether a step is skipped is decided where the gradients
are, by the mechanism that torch's gradient scaler uses with fused optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's part of each sharded tensor, and whole ones as they are; no copies.

    Operations on many tensors at once do not take both kinds together.
    """
    return [each.to_local() if isinstance(each, DTensor) else each for each in tensors]


def average_over_ranks(gradients: Sequence[Tensor]) -> None:
    """Average gradients over all ranks in place, in one exchange. All ranks must call it.

    Args:
        gradients: of one type, equal shapes on all ranks; none at all is nothing to do.
    """
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Compute the 2-norm of all gradients, a scalar on their device; of sharded ones, of all.

    The parameters of one model, whether sharded (DTensor) or not; those without gradient are left
    out. Infinite or NaN as soon as one value is.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [
        torch.nn.utils.get_total_norm(group, foreach=True) for group in (whole, sharded) if group
    ]
    if not norms:
        return torch.zeros(())
    full = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return full[0] if len(full) == 1 else torch.linalg.vector_norm(torch.stack(full))


def clip_gradients(parameters: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm if the norm is larger, as torch's `clip_grad_norm_`.

    Args:
        parameters: those of `gradient_norm`.
        norm: what it gave.
        max_norm: above 0.
    """
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(local_parts(gradients), coefficient)


def step_if_finite(
    optimizer: torch.optim.Optimizer, finite: Tensor, step: Callable[[], object]
) -> None:
    """Take the optimiser's step, or leave weights and moments as they are.

    Args:
        optimizer: the bare one. If it is fused, its kernel looks at `found_inf`, as torch's
            gradient scaler has it do; else the host waits for `finite`. Parameters of a fused one
            may be sharded, with whole ones among them.
        finite: bool scalar, equal on all ranks.
        step: takes the step of `optimizer`; it is called in any case, so that steps are counted.
    """
    if not optimizer.defaults.get("fused"):
        if not finite:
            optimizer.zero_grad(set_to_none=True)
        step()
        return
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    step()
    del optimizer.found_inf  # type: ignore[attr-defined]


def restore_unless(finite: Tensor, buffers: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Put back what buffers held before a step that is left out, on their device, as the step is.

    Args:
        finite: bool, a scalar, as of `step_if_finite`.
        buffers: such as `running_statistics`, which the forward has moved.
        before: copies of them.
    """
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(finite, buffer, value))
