"""Ranks that each do something for themselves, and go on only if all of them could."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from siftclip.selectors.errors import InputError
from siftclip.selectors.ranks import Ranks, sum_arrays

T = TypeVar("T")
_MESSAGE_BYTES = 400


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives on this rank. If it fails on any of them it fails on all.

    Otherwise the others would wait for the one that failed until the process group gives up.

    Args:
        ranks: all of them make this call.
        work: what each does, without calls that ranks take part in. The first rank may do more
            than the others, such as writing a file.

    Raises:
        InputError: `work` raised it, or an error of the operating system, on some rank.
    """
    message = ""
    value: T | None = None
    try:
        value = work()
    except (InputError, OSError, MemoryError) as error:
        message = str(error) or type(error).__name__
    if ranks.size > 1:
        board = np.zeros((ranks.size, _MESSAGE_BYTES), dtype=np.int64)
        own = message.encode()[:_MESSAGE_BYTES]
        board[ranks.rank, : len(own)] = np.frombuffer(own, dtype=np.uint8)
        board = sum_arrays(ranks, board).astype(np.uint8)
        said = [line.tobytes().rstrip(b"\0").decode("utf-8", "ignore") for line in board]
        message = next((text for text in said if text), "")
    if message:
        raise InputError(message)
    return value  # type: ignore[return-value]  # there is one where nothing failed
