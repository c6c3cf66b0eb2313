"""The cores of this process: how they are shared between loader processes and torch."""

from __future__ import annotations

import os

import torch

from siftclip.cores import cores_of_rank, suggested_workers
from siftclip.errors import InputError, require_int


def worker_count(value: int | str, ranks: int = 1) -> int:
    """Return loader processes per rank: the number given, or for `auto` what the cores suggest.

    Args:
        value: of `data.num_workers`.
        ranks: of this machine, where no launcher tells.

    Raises:
        InputError: the value is neither.
    """
    if value == "auto":
        return suggested_workers(ranks)
    if isinstance(value, str):
        raise InputError(f"data.num_workers must be an integer or 'auto'. Got {value!r}.")
    return require_int("data.num_workers", value, minimum=0)


def share_cores(num_workers: int, ranks: int = 1) -> None:
    """Leave a core to each loader process, unless OMP_NUM_THREADS says how many threads to use.

    torch's threads wait for each other by spinning. With as many of them as cores, and loader
    processes beside them, a training step took 2 to 10 times as long (2 cores).
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores_of_rank(ranks) - num_workers))
