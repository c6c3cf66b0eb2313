"""A moving average of the weights, which often evaluates better than the last weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from siftclip.errors import InputError
from siftclip.trainer.optim.optimizer import clamp_logit_scale
from siftclip.trainer.optim.update import local_parts


def ema_decay_at(decay: float, step: int) -> float:
    """Return the share of the old average that stays at optimiser step `step` (1, 2, ...).

    min(decay, (1 + step) / (10 + step)): the average covers about the last ninth of the run so far
    until it covers 1 / (1 - decay) steps. Without this a run of 3,000 steps with decay 0.9999
    would end with three quarters of its random initial weights.

    Source: TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    """
    return min(decay, (1 + step) / (10 + step))


class ModelEma(nn.Module):
    """The exponential moving average of an open_clip model's weights.

    `averaged` is a model of its own, always in evaluation mode and without gradients: evaluate it,
    or write it as a model folder. All that a continued run needs is in the state dict and the step.

    Args:
        model: the bare open_clip model, before it is compiled or wrapped; it is copied.
        decay: in (0, 1), per optimiser step; see `ema_decay_at`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        # Averages of clamped values stay between them, so once is enough.
        clamp_logit_scale(self.averaged)
        self.eval()

    def train(self, mode: bool = True) -> ModelEma:
        """Stay in evaluation mode, also when the module that holds this one trains."""
        return super().train(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step` (1, 2, ...), and copy the buffers.

        Batch norm's statistics are moving averages already. Nothing waits for the device.

        Args:
            model: the trained model; same parameters and devices as the copy.
            step: how many optimiser steps are done, this one included.

        Raises:
            InputError: the weights have 16 bits, too coarse for such small steps.
        """
        averaged, current = list(self.averaged.parameters()), list(model.parameters())
        if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in averaged):
            raise InputError(
                f"optim.ema_decay={self.decay} needs weights in fp32. Set "
                "trainer.precision=bf16-mixed or 16-mixed, or optim.ema_decay=null."
            )
        if len(averaged) != len(current):
            raise ValueError(f"the model has {len(current)} parameters, not {len(averaged)}")
        average = get_ema_multi_avg_fn(ema_decay_at(self.decay, step))  # type: ignore[no-untyped-call]  # torch ships it without types
        average(local_parts(averaged), local_parts(current), step)
        for ours, theirs in zip(self.averaged.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
