"""Ranks that are threads of one process, so that a test needs no launcher."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from siftclip.ranks import Ranks

T = TypeVar("T")

_PATIENCE_SECONDS = 120  # for the slowest of the ranks


class OutOfStepError(AssertionError):
    """Ranks did not ask each other for the same things in the same order."""


@dataclass(slots=True)
class _Meeting:
    """Where the ranks meet: each brings what it is there for, and sees what the others are for."""

    size: int
    barrier: threading.Barrier = field(init=False)
    brought: list[tuple[str, Tensor | None]] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)
        self.brought = [("", None)] * self.size

    def meet(self, rank: int, purpose: str, values: Tensor | None = None) -> list[Tensor | None]:
        self.brought[rank] = (purpose, values)
        try:
            self.barrier.wait(_PATIENCE_SECONDS)
            there = [*self.brought]
            self.barrier.wait(_PATIENCE_SECONDS)  # nobody brings anything else before all have seen
        except threading.BrokenBarrierError:
            raise OutOfStepError(f"rank {rank} waits for the others in vain ({purpose})") from None
        purposes = [each for each, _ in there]
        if len(set(purposes)) > 1:
            self.barrier.abort()
            raise OutOfStepError(f"ranks do not wait for the same thing: {', '.join(purposes)}")
        return [values for _, values in there]


class SimulatedRanks:
    """One of several ranks, each of which is a thread."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        """Take a place at a meeting."""
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def sum(self, values: Tensor) -> Tensor:
        shape = "x".join(map(str, values.shape)) or "one number"
        brought = self._meeting.meet(self.rank, f"a sum of {shape}", values.clone())
        first, *others = (each for each in brought if each is not None)
        total = first.clone()
        for other in others:
            total += other
        return total

    def barrier(self) -> None:
        self._meeting.meet(self.rank, "a barrier")


def on_simulated_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Do the same work on several ranks at once; the answers, by rank.

    Raises:
        OutOfStepError: one of them asked for a sum or a barrier that another did not ask for.
    """
    meeting = _Meeting(size)

    def on_rank(rank: int) -> T:
        try:
            answer = work(SimulatedRanks(rank, meeting))
            meeting.meet(rank, "its end")
        except BaseException:
            meeting.barrier.abort()
            raise
        return answer

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(on_rank, rank) for rank in range(size)]
    errors = [future.exception() for future in futures]
    # the fault itself, and not that the others waited in vain for who met it
    faults = [error for error in errors if error is not None]
    own = [error for error in faults if not isinstance(error, OutOfStepError)]
    told = [error for error in faults if "in vain" not in str(error)]
    for error in (*own, *told, *faults):
        raise error
    return [future.result() for future in futures]
