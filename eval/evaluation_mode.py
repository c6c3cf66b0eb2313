"""A model as evaluation needs it, whatever is going on around it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from siftclip.datamodules.models.load import ClipModel
from siftclip.eval.probes.logistic_fit import full_precision
from siftclip.ranks import Ranks


@contextmanager
def evaluation_mode(clip: ClipModel, device: torch.device) -> Iterator[ClipModel]:
    """Yield the model on `device` in fp32 and eval mode, without gradients, autocast and TF32."""
    model = clip.model
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).float()  # there and back in place would round master weights
    home = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}  # parts may be frozen
    with ExitStack() as stack:
        stack.enter_context(full_precision(device))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(_exact_convolutions())
        try:
            yield replace(clip, model=model.to(device).eval())
        finally:
            model.to(home)
            for module, training in modes.items():
                module.training = training


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Compute without TF32, which cuDNN takes by default, inside the block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def buffers_of_first_rank(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Give all ranks the buffers of the first, whose model is the one that is saved.

    In a training on several ranks each has its own statistics of batch normalisation.
    """
    kept = []
    if ranks.size > 1:
        kept = [
            (statistic, statistic.clone())
            for statistic in model.buffers()
            if statistic.is_floating_point()
        ]
    try:
        for buffer, before in kept:
            buffer.copy_(ranks.sum(before if ranks.rank == 0 else torch.zeros_like(before)))
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
