"""Requests that a server leaves without an answer are made again beside the first, up to a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

MOVING_BYTES = 4096  # an answer that brings so many while it is watched is left alone


@dataclass(slots=True)
class Progress:
    """How many bytes of an answer have come."""

    size_bytes: int = 0


Ask = Callable[[Progress], Awaitable[T]]


async def answers_within(
    asks: Sequence[Ask[T]],
    *,
    at_once: int,
    seconds: float,
    patience_seconds: float,
    is_final: Callable[[BaseException], bool],
) -> tuple[list[T | BaseException], int]:
    """Ask for all of them, and again where nothing comes.

    Args:
        asks: make a request, and note its progress.
        at_once: how many are asked for at the same time.
        seconds: for all of them together. What has no answer then gets a TimeoutError.
        patience_seconds: with an answer that does not move, before it is asked for again; twice as
            long each time.
        is_final: whether an error says that another request would get it, too.

    Returns:
        The answers or errors, in order, and how many requests were made again.
    """
    repeated, gate = 0, asyncio.Semaphore(at_once)

    def again() -> None:
        nonlocal repeated
        repeated += 1

    async def answer(ask: Ask[T]) -> T:
        async with gate:
            return await _answer(ask, patience_seconds, is_final, again)

    tasks = [asyncio.ensure_future(answer(ask)) for ask in asks]
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    outcomes = [TimeoutError() if t.cancelled() else t.exception() or t.result() for t in tasks]
    return outcomes, repeated


async def _answer(
    ask: Ask[T],
    patience_seconds: float,
    is_final: Callable[[BaseException], bool],
    again: Callable[[], None],
) -> T:
    """Return the first answer of one or two requests at a time, or the last one's error."""
    running: dict[asyncio.Future[T], Progress] = {}

    def start() -> None:
        progress = Progress()
        running[asyncio.ensure_future(ask(progress))] = progress

    start()
    try:
        while True:
            before = {task: progress.size_bytes for task, progress in running.items()}
            done, _ = await asyncio.wait(
                running, timeout=patience_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                del running[task]
                error = task.exception()
                if error is None or not running or is_final(error):
                    return task.result()
            moving = any(p.size_bytes - before[t] >= MOVING_BYTES for t, p in running.items())
            if not done and not moving:
                if len(running) > 1:
                    oldest = next(iter(running))
                    oldest.cancel()  # its connection is for the next one
                    del running[oldest]
                again()
                start()
                patience_seconds *= 2
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
