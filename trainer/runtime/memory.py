"""Whether a batch fits into this machine's memory, before it is loaded."""

from __future__ import annotations

from siftclip.cores import memory_bytes
from siftclip.errors import InputError

_CHANNELS, _FLOAT_BYTES = 3, 4


def require_room_for_batch(
    global_batch_size: int, *, world_size: int, image_size: int | tuple[int, int]
) -> None:
    """Refuse batches whose images alone do not fit into memory.

    Loading one would fill it for minutes, in which the run neither says anything nor stops.

    Args:
        global_batch_size: samples of a step, over all processes.
        world_size: processes that train.
        image_size: pixels a side, or height and width.

    Raises:
        InputError: they do not fit.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    samples = -(-global_batch_size // world_size)
    needed = samples * _CHANNELS * height * width * _FLOAT_BYTES
    there = memory_bytes()
    if needed > there:
        raise InputError(
            f"scale.global_batch_size={global_batch_size}: the {samples:,} images of {height} x "
            f"{width} pixels that each device takes in a step need {needed / 1e9:,.1f} GB, and "
            f"this machine has {there / 1e9:,.1f} GB of memory. Lower it, or use more devices."
        )
