"""Which of the processes that a launcher started says what one alone shall say.

Only what Python itself starts with is imported here, see `siftclip.interrupts`.
"""

from __future__ import annotations

# What launchers tell each process: all of them whole numbers
_NUMBERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS"),
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def fault_of_launch(environment: Mapping[str, str]) -> str | None:
    """Say which variable of a launcher is no number, which libraries read; None if all are."""
    for name in _NUMBERS:
        value = environment.get(name, "0")
        if not value.isdecimal():
            return (
                f"the environment variable {name}, which torchrun, srun or Lightning sets, must be "
                f"a whole number. Got {value[:80]!r}. Unset it unless one of them starts this."
            )
    return None


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Return whether this process speaks for all that torchrun, srun or Lightning started with it.

    Lightning knows as well, but its import takes seconds.
    """
    if "RANK" in environment:
        return environment["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(environment.get(name, "0") == "0" for name in names)
