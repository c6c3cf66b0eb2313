"""Checkpoints that are written while training continues: copied first, then written by a thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siftclip.trainer.loop.atomic_checkpoints import AtomicCheckpointIO


def snapshot(value: Any) -> Any:
    """Copy a checkpoint to memory that training does not change.

    Tensors of a GPU go into page-locked memory, whose blocks torch uses again, and are waited for
    once.

    Args:
        value: tensors and plain values, in mappings, lists and tuples.
    """
    devices: set[torch.device] = set()
    copied = _copied(value, devices)
    for device in devices:
        torch.get_device_module(device).synchronize(device)
    return copied


def _copied(value: Any, devices: set[torch.device]) -> Any:
    if isinstance(value, Tensor):
        if value.is_cpu:
            return value.detach().clone()
        devices.add(value.device)
        there = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return there.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        inside = {key: _copied(each, devices) for key, each in value.items()}
        return inside if type(value) is dict else _as(value, inside)
    if type(value) in (list, tuple):
        return type(value)(_copied(each, devices) for each in value)
    return copy.deepcopy(value)


def _as(value: Mapping[Any, Any], inside: dict[Any, Any]) -> Any:
    """Return a mapping of the type of another, such as OrderedDict, with these values."""
    other = copy.copy(value)
    other.update(inside)  # type: ignore[attr-defined]  # mappings of checkpoints can be written
    return other


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
