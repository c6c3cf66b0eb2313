"""The progress of training: a bar at a terminal, else plain lines."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from lightning.pytorch.callbacks import ProgressBar

from siftclip.progress import LINE_SECONDS, Progress, draws_bars, pace, show_progress
from siftclip.redaction import printable

log = logging.getLogger(__name__)

_RATE = "train/samples_per_second"


class TrainingProgress(ProgressBar):
    """Shows a bar on standard error that counts samples, or logs a line every 30 seconds.

    It also replaces Lightning's own bar. The first line comes after the first step, and says that
    training has begun.
    """

    def __init__(self, *, bar: bool = True) -> None:
        """Choose between a `bar`, where a terminal can show one, and lines."""
        super().__init__()
        self._wants_bar = bar
        self._enabled = True
        self._bar: Progress | None = None
        self._logs_lines = False
        self._last_line: tuple[int, float] | None = None  # its step, and when it was logged

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._enabled:
            return
        self._logs_lines = not (self._wants_bar and draws_bars())
        self._last_line = None
        if not self._logs_lines:
            self._bar = show_progress(
                total=pl_module.total_steps * pl_module.global_batch_size,
                initial=trainer.global_step * pl_module.global_batch_size,
                label="train",
                unit="sample",
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self._bar is not None:
            numbers = numbers_of(pl_module)
            if _RATE in pl_module.latest:  # last, as a narrow terminal cuts it off
                rate = pl_module.latest[_RATE] / trainer.world_size
                numbers.append(rate_of_device(rate, pl_module.device))
            self._bar.set_postfix_str(", ".join(numbers), refresh=False)
            self._bar.update(pl_module.global_batch_size)
        elif self._logs_lines:
            self._log_line(trainer, pl_module)

    def on_train_end(self, *args: Any) -> None:
        self._close()

    def on_exception(self, *args: Any) -> None:
        self._close()

    def _log_line(self, trainer: Any, module: Any) -> None:
        now, step = time.monotonic(), trainer.global_step
        parts = [f"step {step:,} of {module.total_steps:,}", *numbers_of(module)]
        if self._last_line is not None:  # the first step also waits for the first samples
            last_step, last_seconds = self._last_line
            if now - last_seconds < LINE_SECONDS:
                return
            size = module.global_batch_size
            rate = (step - last_step) * size / (now - last_seconds)
            parts.append(rate_of_device(rate / trainer.world_size, module.device))
            parts.append(pace(rate, (module.total_steps - step) * size, "sample"))
        log.info("train: %s", ", ".join(parts))
        self._last_line = step, now

    def _close(self) -> None:
        self._logs_lines = False
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def numbers_of(module: Any) -> list[str]:
    """Return what was logged last, in words: loss, learning rate, data wait, an evaluation."""
    latest, evaluated = module.latest, module.evaluated
    numbers = []
    if "train/loss" in latest:
        numbers += [f"loss {latest['train/loss']:.3f}", f"lr {latest['train/lr']:.2g}"]
        numbers += [f"waiting for data {latest['train/data_wait_fraction']:.0%}"]
    names = sorted(evaluated, key=lambda name: "/average/" not in name)  # stable
    if names:  # the first average, or the first task
        numbers += [f"{printable(names[0].rpartition('/')[2])} {evaluated[names[0]]:.3f}"]
    return numbers


def rate_of_device(rate: float, device: torch.device) -> str:
    """Say how many samples a second each device does, on average."""
    kind = "process" if device.type == "cpu" else "GPU"
    return f"{pace(rate, None, 'sample')} per {kind}"
