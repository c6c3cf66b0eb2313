"""What happened since the last log line: sums that stay on the device, and clocks."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from siftclip.trainer.runtime.step_clock import Mark


class WindowMeter:
    """Sums the terms of the loss over a window of steps, on the device until it ends.

    Steps whose loss is not finite are left out of the means; they are counted as skipped. A window
    of such steps alone has no means.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: tuple[str, ...] = ()
        self.skipped = torch.zeros((), device=device)  # of the whole run
        self.norm = torch.zeros((), device=device)  # of the gradients of the last step taken
        self._clear()
        self.window_start = self.step_end = time.perf_counter()

    def _clear(self) -> None:
        self._sums = torch.zeros(len(self.names) + 1, device=self.device)
        self._steps = 0
        self.data_seconds = 0.0
        self._version_seconds = (0.0, 0.0)  # of new selections: embedding, choosing
        self._choices: list[tuple[Mark, Mark, Mark]] = []

    @property
    def scoring_seconds(self) -> float:
        """Seconds of scoring in this window, once the device has done its steps."""
        own = sum(scored.seconds_since(start) for start, scored, _ in self._choices)
        return own + self._version_seconds[0]

    @property
    def selection_seconds(self) -> float:
        """Seconds of choosing in this window, once the device has done its steps."""
        own = sum(chosen.seconds_since(scored) for _, scored, chosen in self._choices)
        return own + self._version_seconds[1]

    def waited(self, *, scoring_seconds: float = 0.0, selection_seconds: float = 0.0) -> None:
        """Note that the batch has come: the time since the last step was spent waiting for data.

        Apart from the seconds in which the pool was embedded and selected from anew.
        """
        spent = scoring_seconds + selection_seconds
        self.data_seconds += time.perf_counter() - self.step_end - spent
        before = self._version_seconds
        self._version_seconds = (before[0] + scoring_seconds, before[1] + selection_seconds)

    def chose(self, start: Mark, scored: Mark, chosen: Mark) -> None:
        """Note when a super-batch was begun with, scored, and chosen from."""
        self._choices.append((start, scored, chosen))

    def pause(self, seconds: float) -> None:
        """Leave out so many seconds up to now, which were no training."""
        self.window_start += seconds
        self.step_end += seconds

    def add(self, terms: Mapping[str, Tensor], norm: Tensor, finite: Tensor) -> None:
        """Take a step's terms (scalars), the norm of its gradients, and whether it was taken."""
        if self.names != tuple(terms):
            self.names = tuple(terms)
            self._clear()
        count = torch.ones((), device=self.device)
        values = torch.stack([*(value.float() for value in terms.values()), count])
        self._sums += torch.where(torch.isfinite(values).all(), values, 0.0)
        self.skipped += ~finite
        self.norm = torch.where(finite, norm, self.norm)
        self._steps += 1

    def stepped(self) -> None:
        """Note that the step has been handed to the device."""
        self.step_end = time.perf_counter()

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Average the window over its steps and all ranks; a new window begins.

        Args:
            reduce: the mean over ranks of a tensor. Every rank takes part.
        """
        *sums, counted, norm, skipped = reduce(
            torch.cat([self._sums, torch.stack([self.norm.float(), self.skipped])])
        ).tolist()
        # The device has worked until now: a clock that is read earlier would flatter a GPU.
        now = time.perf_counter()
        seconds = max(now - self.window_start, 1e-9)
        means = {
            **(
                {name: value / counted for name, value in zip(self.names, sums, strict=True)}
                if counted
                else {}
            ),
            "grad_norm": norm,
            "skipped_steps": skipped,
            "data_time": self.data_seconds / self._steps,
            "scoring_time": self.scoring_seconds / self._steps,
            "selection_time": self.selection_seconds / self._steps,
            "batch_time": seconds / self._steps,
            "data_wait_fraction": min(1.0, self.data_seconds / seconds),
        }
        self._clear()
        self.window_start = self.step_end = now
        return means


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far, in 1e9 bytes: allocated on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
