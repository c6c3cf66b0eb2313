"""Which of the processes that a launcher started says what one alone shall say.

Only what Python itself starts with is imported here, see `siftclip.interrupts`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Return whether this process speaks for all that torchrun, srun or Lightning started with it.

    Lightning knows as well, but its import takes seconds.
    """
    if "RANK" in environment:
        return environment["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(environment.get(name, "0") == "0" for name in names)
