"""The loader processes of a run: how many, how they start, and what their failures mean."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import DataLoader, Sampler

from siftclip.datamodules.streaming.loader_process import first_item, leave_process_group
from siftclip.errors import InputError, ParameterError, require_int

if TYPE_CHECKING:
    from siftclip.datamodules.streaming.batches import Request, SampleDataset

SIGNAL_SECONDS = 1.0  # in which the system tells of a process that has ended
StartMethod = Literal["fork", "spawn", "forkserver"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How batches get from the tars to the trainer; none of it changes what they hold."""

    num_workers: int  # loader processes a rank; 0 loads in the training process
    start_method: StartMethod | None = None  # of these processes; None is the platform's default
    prefetch_batches: int = 2  # that each of them works ahead
    timeout_seconds: float = 600.0  # without a batch, before the run stops; 0 waits for ever

    def __post_init__(self) -> None:
        require_int("num_workers", self.num_workers, minimum=0, owner=self)
        require_int("prefetch_batches", self.prefetch_batches, minimum=1, owner=self)
        if not 0 <= self.timeout_seconds < float("inf"):
            raise ParameterError(
                "must be 0 or more",
                owner=self,
                parameter="timeout_seconds",
                value=self.timeout_seconds,
            )
        methods = multiprocessing.get_all_start_methods()
        if self.start_method is not None and self.start_method not in methods:
            raise ParameterError(
                f"must be null or one of {methods}",
                owner=self,
                parameter="start_method",
                value=self.start_method,
            )


class StreamLoader(DataLoader[Any]):
    """A loader whose failures say what to do, in place of a worker's traceback."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator is all it needs
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                # A worker that dies while it hands over a batch leaves a broken connection.
                if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
                    raise
                if not isinstance(error, RuntimeError):
                    _take_signal()
                raise InputError(
                    f"The loader gives no more samples: {error!r}. Memory may be short "
                    "(lower num_workers or prefetch_batches), or the storage does not answer "
                    f"within timeout_seconds={self.timeout:g}."
                ) from error
            if batch.failure:
                raise InputError(batch.failure)
            yield batch


def _take_signal() -> None:
    """Wait for the signal of a worker that has broken its connection.

    torch raises an error for it wherever Python is then, which would take the place of ours.
    """
    with suppress(RuntimeError):
        time.sleep(SIGNAL_SECONDS)


def make_loader(
    dataset: SampleDataset,
    sampler: Sampler[list[Request]],
    options: LoaderOptions,
    *,
    pin_memory: bool,
) -> StreamLoader:
    """Build a loader whose workers read, decode and tokenise whole batches."""
    parallel = options.num_workers > 0
    return StreamLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=first_item,
        num_workers=options.num_workers,
        multiprocessing_context=options.start_method if parallel else None,
        prefetch_factor=options.prefetch_batches if parallel else None,
        timeout=options.timeout_seconds if parallel else 0,
        worker_init_fn=leave_process_group if parallel else None,
        pin_memory=pin_memory,
    )
