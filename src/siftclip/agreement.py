"""What ranks tell each other: texts, and whether each of them could do its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from siftclip.errors import InputError
from siftclip.ranks import Ranks, sum_arrays

T = TypeVar("T")
_TEXT_BYTES = 400  # what is longer is cut off


def share_texts(ranks: Ranks, texts: Sequence[str]) -> list[str]:
    """Share texts that one rank each has with all of them, cut off at 400 bytes.

    Args:
        ranks: all of them make this call.
        texts: as many on each rank; empty where it has none, and not empty on one rank at most.
    """
    if ranks.size == 1:
        return list(texts)
    board = np.zeros((len(texts), _TEXT_BYTES), dtype=np.uint8)
    for line, text in zip(board, texts, strict=True):
        data = text.encode()[:_TEXT_BYTES]
        line[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    board = sum_arrays(ranks, board)
    return [line.tobytes().rstrip(b"\0").decode("utf-8", "ignore") for line in board]


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """Call `work` on this rank. If it fails on any of them it fails on all.

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
    fault: Exception | None = None
    try:
        value = work()
    except (InputError, OSError, MemoryError) as error:
        message, fault = str(error) or type(error).__name__, error
    said = share_texts(ranks, [message if rank == ranks.rank else "" for rank in range(ranks.size)])
    message = next(filter(None, said), "")
    if message:
        raise fault if isinstance(fault, InputError) else InputError(message)
    return value  # type: ignore[return-value]  # there is one where nothing failed
