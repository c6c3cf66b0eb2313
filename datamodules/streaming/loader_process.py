"""What a loader process is given beside the dataset. Apart from Lightning, which takes seconds.

A process that is not forked imports the modules of what it is given.
"""

from __future__ import annotations

import os

from siftclip.datamodules.streaming.batches import Batch


def first_item(batches: list[Batch]) -> Batch:
    """Collate nothing: `__getitems__` has built the batch already."""
    return batches  # type: ignore[return-value]  # the loader hands over what __getitems__ gave


def leave_process_group(worker: int) -> None:
    """Keep the group's signals from a loader process; the training process ends it.

    Ctrl-C and torchrun signal the whole group. Loader processes that die of that take the step,
    and the checkpoint that it was to end with, along.
    """
    os.setpgid(0, 0)
