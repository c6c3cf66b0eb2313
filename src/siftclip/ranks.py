"""The processes that share the work of a selector. Nothing else here asks torch.distributed."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

SCALE = 2.0**32  # numbers of about 1 are added as whole multiples of 1 / SCALE, hence exactly


class Ranks(Protocol):
    """Processes that all run the same selector on the same samples, in lockstep."""

    rank: int  # in [0, size)
    size: int

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, same shape and dtype. Exact for whole numbers."""

    def barrier(self) -> None:
        """Wait for the other ranks."""


class OneRank:
    """A single process."""

    rank = 0
    size = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        return None


class ProcessGroup:
    """The ranks of torch's default process group, which must exist."""

    def __init__(self, device: torch.device) -> None:
        """Set the device on which the backend of the group communicates."""
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, values: Tensor) -> Tensor:
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def barrier(self) -> None:
        dist.barrier()


def of_first_rank(ranks: Ranks, value: bool) -> bool:
    """Return the first rank's value on all of them: files may change between two looks."""
    return bool(int(ranks.sum(torch.tensor(int(value and ranks.rank == 0)))))


def sum_arrays(ranks: Ranks, values: np.ndarray) -> np.ndarray:
    """Sum an array over all ranks."""
    return values if ranks.size == 1 else ranks.sum(torch.from_numpy(values)).numpy()
