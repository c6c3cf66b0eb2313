"""What a device does beside computing: copies of the next batch, and work of the loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Sendable(Protocol):
    """A batch of tensors, in page-locked memory where a CUDA device is to have it."""

    def to(self: Sent, device: torch.device, non_blocking: bool = False) -> Sent:
        """Return the batch on a device."""

    def tensors(self) -> Iterable[Tensor]:
        """Return what lies on the device."""


Sent = TypeVar("Sent", bound=Sendable)


def on_device(batches: Iterable[Sent], device: torch.device) -> Iterator[Sent]:
    """Yield batches on a device, the same objects where it is the CPU.

    On CUDA a stream of its own copies each batch while the device still computes with the one
    before: that one is given only when the copy of the next has begun, so that the loader is asked
    for one batch more than has been given.
    """
    if device.type == "cpu":
        yield from batches
    elif device.type == "cuda":
        yield from _one_ahead(batches, device)
    else:
        for batch in batches:
            yield batch.to(device)


@contextmanager
def on_own_stream(device: torch.device) -> Iterator[None]:
    """Compute on a stream of its own on CUDA: who asks for a result waits for this work alone."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield


def _one_ahead(batches: Iterable[Sent], device: torch.device) -> Iterator[Sent]:
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch ships it without types
    under_way: tuple[Sent, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            sent = batch.to(device, non_blocking=True)
            done = copying.record_event()
        if under_way is not None:
            yield _received(*under_way, device)
        under_way = sent, done
    if under_way is not None:
        yield _received(*under_way, device)


def _received(batch: Sent, done: torch.cuda.Event, device: torch.device) -> Sent:
    """Let what the device computes from now on wait for a copy; the host waits for nothing."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(done)
    for tensor in batch.tensors():
        # allocated for the copying stream, whose next copy must not take memory that is in use
        tensor.record_stream(computing)
    return batch
