"""How many samples each step draws from the order, reads, and trains on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Sample counts of every step, over all ranks. Where in the order a step begins follows.

    A step draws a super-batch from the order, a first stage may drop some of it before anything is
    read, and of what is read a selector may choose the sub-batch that is trained on.
    """

    trained: int  # samples that every step trains on
    drawn: np.ndarray  # int64 [steps], taken from the order
    read: np.ndarray  # int64 [steps], read and decoded
    starts: np.ndarray = field(init=False)  # int64 [steps + 1], positions where steps begin
    selects: np.ndarray = field(init=False)  # bool [steps], more is read than is trained on

    def __post_init__(self) -> None:
        starts = np.concatenate([[0], np.cumsum(self.drawn, dtype=np.int64)])
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "selects", self.read > self.trained)
        if (self.read < self.trained).any() or (self.drawn < self.read).any():
            raise ValueError("a step draws at least what it reads, and reads what it trains on")

    @classmethod
    def plain(cls, global_batch: int, steps: int) -> StepPlan:
        """Return the plan by which every step trains on all that it draws."""
        counts = np.full(steps, global_batch, dtype=np.int64)
        return cls(trained=global_batch, drawn=counts, read=counts)

    @property
    def steps(self) -> int:
        return len(self.drawn)

    def steps_for(self, samples: int, *, first: int) -> int:
        """Return the step by which `samples` samples are drawn, counted from step `first` on."""
        wanted = self.starts[first] + samples
        return min(self.steps, int(np.searchsorted(self.starts, wanted)))


def part_sizes(samples: int, part: int) -> list[int]:
    """Split `samples` samples into parts of `part`, the last of which may be smaller."""
    whole, rest = divmod(samples, part)
    return [part] * whole + ([rest] if rest else [])
