"""How many cores there are for this process."""

from __future__ import annotations

import os


def cores_of_rank() -> int:
    """Count the cores that this process may use, shared between the ranks of this machine."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def suggested_workers() -> int:
    """Suggest loader processes per rank: a core is left to training, and four are enough."""
    return max(1, min(4, cores_of_rank() - 1))
