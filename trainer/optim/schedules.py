"""The learning rate over a run, as open_clip_train's three schedules give it."""

from __future__ import annotations

import logging
import math

from siftclip.errors import InputError
from siftclip.trainer.settings.optim import OptimSettings

log = logging.getLogger(__name__)


def lr_factor(config: OptimSettings, step: int, total_steps: int) -> float:
    """Compute the factor on every group's own learning rate at optimiser step `step` (0, 1, ...).

    All schedules begin with (step + 1) / warmup_steps. Then follow
        cosine: half a cosine from 1 towards 0, which it would reach at `total_steps`;
        const: 1;
        cooldown: 1 until the last `cooldown_steps`, then down to the end rate along
            (1 - progress) ** cooldown_power.

    `cooldown_end_lr` is a learning rate, as in open_clip, so that the factor ends at
    cooldown_end_lr / lr; groups with layer decay end at their own scale of it.

    Source: `open_clip_train.scheduler`: cosine_lr, const_lr, const_lr_cooldown.

    Example:
        >>> from siftclip.trainer import OptimSettings
        >>> from siftclip.trainer.optim.schedules import lr_factor
        >>> settings = OptimSettings(warmup_steps=2)
        >>> [round(lr_factor(settings, step, total_steps=10), 3) for step in (0, 1, 6, 9)]
        [0.5, 1.0, 0.5, 0.038]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "const" or config.cooldown_steps is None:
        return 1.0
    progress = max(0.0, (step - (total_steps - config.cooldown_steps)) / config.cooldown_steps)
    end = config.cooldown_end_lr / config.lr
    return float((1 - progress) ** config.cooldown_power * (1 - end) + end)


def check_schedule(config: OptimSettings, total_steps: int) -> None:
    """Refuse a cooldown that does not fit into a run of `total_steps` optimiser steps.

    A warm-up that is longer than the run is allowed, since DataComp's scale `debug` has one, and
    warned of: the rate never gets to optim.lr.

    Raises:
        InputError: warm-up and cooldown together are longer than the run.
    """
    cooldown = config.cooldown_steps or 0
    if cooldown and config.warmup_steps + cooldown > total_steps:
        raise InputError(
            f"optim.warmup_steps + optim.cooldown_steps must be at most the {total_steps} steps of "
            "the run (scale.samples_seen over scale.global_batch_size, rounded up). Got "
            f"{config.warmup_steps} + {cooldown}. Lower them, or raise scale.samples_seen."
        )
    if config.warmup_steps > total_steps:
        log.warning(
            "optim.warmup_steps=%d: the run has %d steps, so its rate ends at %.2g of optim.lr",
            config.warmup_steps,
            total_steps,
            total_steps / config.warmup_steps,
        )
