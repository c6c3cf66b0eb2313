"""How the gradient of each weight is distributed, for loggers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from siftclip.trainer.runtime.tracking.continued import Histogram

PARTS = 64  # of a histogram
_COMPILED = "_orig_mod."  # what torch.compile puts into names


@torch.no_grad()
def gradient_histograms(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Histogram]:
    """Count the values of gradients in equal parts of their range, on their device.

    Those of a whole step, of all its micro-batches and devices: wandb's own `watch` would see each
    backward pass alone.

    Args:
        parameters: with their names. Those without a gradient, such as locked ones, are left out.
            All ranks pass the same, since of a sharded gradient each has a part.

    Returns:
        By `gradients/NAME`.
    """
    histograms = {}
    for name, parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            histograms[f"gradients/{name.replace(_COMPILED, '')}"] = _histogram(whole)
    return histograms


def _histogram(values: Tensor) -> Histogram:
    values = values.detach().float().flatten()
    low, high = torch.stack(torch.aminmax(values)).tolist()
    high = high if high > low else low + 1e-6 * max(abs(low), 1.0)
    # not by torch.histc, which refuses to be deterministic on a GPU
    places = ((values - low) * (PARTS / (high - low))).long().clamp_(0, PARTS - 1)
    counts = torch.bincount(places, minlength=PARTS)
    return Histogram(counts=counts.tolist(), low=low, high=high)
