"""From gradients to new weights: norm, clipping, and skipping what is not finite.

On a device nothing waits for the host: whether a step is skipped is decided where the gradients
are, by the mechanism that torch's gradient scaler uses with fused optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


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
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    for group in (whole, [gradient.to_local() for gradient in sharded]):
        if group:
            torch._foreach_mul_(group, coefficient)


def step_if_finite(
    optimizer: torch.optim.Optimizer,
    finite: Tensor,
    step: Callable[[], object],
    *,
    on_device: bool,
) -> None:
    """Take the optimiser's step, or leave weights and moments as they are.

    Args:
        optimizer: the bare one.
        finite: bool scalar.
        step: takes the step of `optimizer`; it is called in any case, so that steps are counted.
        on_device: the optimiser is fused and its kernel looks at `found_inf`, as torch's gradient
            scaler has it do; else the host waits for `finite`.
    """
    if on_device:
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return
    if not finite:
        optimizer.zero_grad(set_to_none=True)
    step()


def restore_unless(finite: Tensor, buffers: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Put back what buffers held before a step that is left out, on their device, as the step is.

    Args:
        finite: bool, a scalar, as of `step_if_finite`.
        buffers: such as `running_statistics`, which the forward has moved.
        before: copies of them.
    """
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(finite, buffer, value))
