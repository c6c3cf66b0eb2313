"""How many cores, and how much memory, there are for this process."""

from __future__ import annotations

import os
from pathlib import Path

# Of a loader process: its own memory, and the batches that it has ready
WORKER_BYTES = 1 << 30
# A process loads some hundred images a second, and the one thread that gathers the batches of all
# of them about 20,000: more of them would wait for it.
MOST_WORKERS = 64
_CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container or a Slurm job


def cores_of_rank(ranks: int = 1) -> int:
    """Count the cores that this process may use, shared between the ranks of this machine.

    Args:
        ranks: of this machine, where no launcher tells.
    """
    machine = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    if _of_srun() and cores < machine:  # which has given each rank cores of its own
        return cores
    return max(1, cores // ranks_here(ranks))


def ranks_here(ranks: int = 1) -> int:
    """Count the ranks of this machine as torchrun or srun tell; where neither does, `ranks`."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    tasks = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return int(tasks) if _of_srun() and tasks.isdecimal() else ranks


def _of_srun() -> bool:
    return "SLURM_STEP_ID" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ


def suggested_workers(ranks: int = 1) -> int:
    """Suggest loader processes per rank: one for each core but one, which trains.

    No more than half of the memory has room for, nor than `MOST_WORKERS`. At least one, which
    loads ahead even where it shares its core.

    Args:
        ranks: of this machine, where no launcher tells.
    """
    by_memory = memory_bytes() // (2 * WORKER_BYTES * ranks_here(ranks))
    return max(1, min(cores_of_rank(ranks) - 1, by_memory, MOST_WORKERS))


def memory_bytes() -> int:
    """Return the memory of this machine, or what a container may use of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP.read_text(encoding="ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdecimal() else physical
