"""Checkpoints that are written while training continues: copied first, then written by a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siftclip.datamodules.models.sharded_checkpoint import map_tensors
from siftclip.trainer.loop.atomic_checkpoints import AtomicCheckpointIO


def snapshot(value: Any) -> Any:
    """Copy a checkpoint to memory that training does not change.

    Tensors of a GPU go into page-locked memory, whose blocks torch uses again, and are waited for
    once.

    Args:
        value: tensors and plain values, in mappings, lists and tuples.
    """
    devices: set[torch.device] = set()
    copied = map_tensors(value, lambda _, tensor: _copied(tensor, devices))
    for device in devices:
        torch.get_device_module(device).synchronize(device)
    return copied


def _copied(value: Tensor, devices: set[torch.device]) -> Tensor:
    if value.is_cpu:
        return value.detach().clone()
    devices.add(value.device)
    there = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return there.copy_(value.detach(), non_blocking=True)


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Writes one checkpoint at a time, in a thread: the next one waits for it.

    So that memory is bounded by one copy, and what could not be written is told at the next save.
    """

    def __init__(self, written: Callable[[], None]) -> None:
        """Set what to call in the thread when a checkpoint has its name."""
        super().__init__()
        self._written = written
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Copy the checkpoint, and write it while training continues.

        Raises:
            InputError: there was no room, or no permission, for the one before.
        """
        self.wait()
        copied = snapshot(checkpoint)
        # not a daemon: a process that ends otherwise must not lose what it has begun to write
        self._thread = threading.Thread(target=self._write, args=(copied, Path(path)))
        self._thread.start()

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            InputError: it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def teardown(self) -> None:
        self.wait()

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            super().save_checkpoint(checkpoint, path)
            self._written()
        except BaseException as error:  # raised where somebody waits for it
            self._fault = error
