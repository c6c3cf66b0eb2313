"""The clock of training steps: one that waits for the device, and marks that do not."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback


def device_seconds(device: torch.device) -> float:
    """Read the clock when the device has done what it was given, in seconds from any moment."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A moment in the work of a device, which is known when the device has come to it."""

    seconds: float = 0.0  # of the CPU
    event: Any = None  # of torch.cuda

    @classmethod
    def now(cls, device: torch.device) -> Mark:
        """Mark what the device has been given so far, without waiting for it."""
        if device.type == "cpu":
            return cls(seconds=time.perf_counter())
        event = torch.get_device_module(device).Event(enable_timing=True)
        event.record()
        return cls(event=event)

    def seconds_since(self, earlier: Mark) -> float:
        """Return the seconds between two moments that the device has come to."""
        if self.event is None:
            return self.seconds - earlier.seconds
        return float(earlier.event.elapsed_time(self.event)) / 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Training steps: how long they took together, and how much of it was no training."""

    steps: int
    samples: int
    total_seconds: float
    waiting_seconds: float  # for the loader
    scoring_seconds: float
    selection_seconds: float

    @property
    def wait_fraction(self) -> float:
        return self.waiting_seconds / self.total_seconds

    @property
    def model_seconds(self) -> float:
        """Of a sample, without the waiting."""
        return (self.total_seconds - self.waiting_seconds) / self.samples

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.total_seconds


class StepClock(Callback):
    """Times some steps of `ClipTraining`.

    The device is waited for after every step, so that work which is still under way there does not
    count as waiting for the loader. Where a sub-batch is chosen, a log line that falls into these
    steps would take its seconds out of the module's meter.
    """

    def __init__(self, *, skipped_steps: int, steps: int) -> None:
        """Count nothing yet.

        Args:
            skipped_steps: at the beginning, in which kernels are chosen and processes start.
            steps: that are counted then; later ones are not.
        """
        self._skipped_steps, self._last_step = skipped_steps, skipped_steps + steps
        self._samples = self._steps = 0
        self._waiting_seconds = self._start = self._step_end = 0.0
        self._chosen_before = self._chosen = (0.0, 0.0)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._skipped_steps <= self._steps < self._last_step:
            self._waiting_seconds += time.perf_counter() - self._step_end

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps == self._last_step:
            return
        self._steps += 1
        self._step_end = device_seconds(pl_module.device)
        meter = pl_module.meter
        self._chosen = (meter.scoring_seconds, meter.selection_seconds)
        if self._steps == self._skipped_steps:
            self._start, self._chosen_before = self._step_end, self._chosen
        elif self._steps > self._skipped_steps:
            self._samples += batch.samples

    def times(self) -> StepTimes:
        """Return the times of the steps so far."""
        scoring, selection = (
            after - before for after, before in zip(self._chosen, self._chosen_before, strict=True)
        )
        return StepTimes(
            steps=self._steps - self._skipped_steps,
            samples=self._samples,
            total_seconds=self._step_end - self._start,
            waiting_seconds=self._waiting_seconds,
            scoring_seconds=scoring,
            selection_seconds=selection,
        )
