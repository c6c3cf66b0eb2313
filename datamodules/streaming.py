"""Streams selected samples into training: requests by step, loader processes, the datamodule."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from siftclip.datamodules.batches import Batch, Request, SampleDataset, StepBatch
from siftclip.datamodules.clip_models import Tokenizer, Transform
from siftclip.datamodules.faults import FaultLog
from siftclip.datamodules.image_transform import ResizeBackend
from siftclip.datamodules.order import (
    FirstStage,
    SampleOrder,
    check_chosen,
    rank_slice,
    require_window,
)
from siftclip.datamodules.pool import Pool
from siftclip.datamodules.reader import SampleReader
from siftclip.datamodules.row_features import RowFeatures
from siftclip.selectors.errors import InputError, require_int

log = logging.getLogger(__name__)

FIRST_SAMPLES = 1000  # judged together: few samples say little of a rate

StartMethod = Literal["fork", "spawn", "forkserver"]


def first_item(batches: list[Batch]) -> Batch:
    """Collate nothing: `__getitems__` has built the batch already."""
    return batches  # type: ignore[return-value]  # the loader hands over what __getitems__ gave


@dataclass(slots=True, kw_only=True)
class OrderSampler(Sampler[list[Request]]):
    """The requests of one rank from step `start_step` to `total_steps`.

    With `micro_batch` the requests of a step come in parts of that size, so that loader processes
    share the work of a step. Its length is that of the whole run, also when it starts in the
    middle: Lightning counts the batches of an interrupted run as fetched.
    """

    order: SampleOrder
    global_batch: int
    start_step: int
    total_steps: int
    rank: int
    world_size: int
    first_stage: FirstStage | None = None
    micro_batch: int | None = None
    mine: slice = field(init=False)

    def __post_init__(self) -> None:
        self.mine = rank_slice(self.global_batch, rank=self.rank, world_size=self.world_size)

    @property
    def micro_batches(self) -> int:
        """Parts of a step."""
        return count_micro_batches(self.mine.stop - self.mine.start, self.micro_batch)

    def __len__(self) -> int:
        return self.total_steps * self.micro_batches

    def __iter__(self) -> Iterator[list[Request]]:
        for step in range(self.start_step, self.total_steps):
            positions, rows = self.order.batch(step)
            if self.first_stage is not None:
                chosen = check_chosen(
                    self.first_stage(step, rows),
                    drawn=len(rows),
                    wanted=self.global_batch,
                    owner=f"The first stage {type(self.first_stage).__name__}",
                )
                positions, rows = positions[chosen], rows[chosen]
            requests = list(
                zip(positions[self.mine].tolist(), rows[self.mine].tolist(), strict=True)
            )
            size = len(requests) // self.micro_batches
            for start in range(0, len(requests), size):
                yield requests[start : start + size]


def count_micro_batches(rank_batch: int, micro_batch: int | None) -> int:
    """Into how many micro-batches the batch of a rank is split.

    Raises:
        InputError: it cannot be split into equal ones.
    """
    if micro_batch is None:
        return 1
    require_int("trainer.micro_batch_size", micro_batch, minimum=1)
    if rank_batch % micro_batch:
        raise InputError(
            f"trainer.micro_batch_size must divide the {rank_batch} samples that each device gets "
            f"of scale.global_batch_size. Got {micro_batch}."
        )
    return rank_batch // micro_batch


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
                raise InputError(
                    f"The loader gives no more samples: {error!r}. Memory may be short "
                    "(data.num_workers, data.prefetch_batches), or the storage does not answer "
                    f"within data.timeout_seconds={self.timeout:g}."
                ) from error
            if batch.failure:
                raise InputError(batch.failure)
            yield batch


class StepLoader:
    """The batches of a `StreamLoader`, so many micro-batches of it a step."""

    def __init__(self, loader: StreamLoader, micro_batches: int) -> None:
        self.loader = loader
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.loader) // self.micro_batches

    def __iter__(self) -> Iterator[StepBatch]:
        batches = iter(self.loader)
        while step := list(islice(batches, self.micro_batches)):
            yield StepBatch(step)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How batches get from the tars to the trainer; none of it changes what they hold."""

    num_workers: int  # loader processes a rank; 0 loads in the training process
    start_method: StartMethod | None = None  # of these processes; None is the platform's default
    prefetch_batches: int = 2  # that each of them works ahead
    timeout_seconds: float = 600.0  # without a batch, before the run stops; 0 waits for ever

    def __post_init__(self) -> None:
        require_int("data.num_workers", self.num_workers, minimum=0)
        require_int("data.prefetch_batches", self.prefetch_batches, minimum=1)
        if not 0 <= self.timeout_seconds < float("inf"):
            raise InputError(
                f"data.timeout_seconds must be 0 or more. Got {self.timeout_seconds!r}."
            )
        methods = multiprocessing.get_all_start_methods()
        if self.start_method is not None and self.start_method not in methods:
            raise InputError(
                f"data.start_method must be null or one of {methods}. Got {self.start_method!r}."
            )


def leave_process_group(worker: int) -> None:
    """Keep the group's signals from a loader process; the training process ends it.

    Ctrl-C and torchrun signal the whole group. Loader processes that die of that take the step,
    and the checkpoint that it was to end with, along.
    """
    os.setpgid(0, 0)


def make_loader(
    dataset: SampleDataset,
    sampler: Sampler[list[Request]],
    options: LoaderOptions,
    *,
    pin_memory: bool,
) -> StreamLoader:
    """A loader whose workers read, decode and tokenise whole batches."""
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


def warn_of_small_cache(pool: Pool, rows: np.ndarray, window_shards: int | None) -> None:
    """Say so if tars of a remote pool will be copied again and again.

    That is so if the cache holds fewer tars than are shuffled together.
    """
    limit = pool.storage.cache_limit_bytes
    if limit is None:
        return
    sizes = [pool.shards[shard].size_bytes for shard in np.unique(pool.shard_of_row[rows])]
    together = sorted(sizes, reverse=True)[:window_shards]
    if sum(together) > limit:
        log.warning(
            "pool %s: the cache of %.2f GB is smaller than the %d tars that are shuffled together "
            "(%.2f GB), so tars are copied again and again. Raise pool.shard_cache_gb, or set "
            "data.shuffle_window_shards=%d",
            pool.root,
            limit / 1e9,
            len(together),
            sum(together) / 1e9,
            max(1, limit // max(sizes)),
        )


class StreamDataModule(LightningDataModule):
    """Streams a selection into training, from the step which the trainer is at."""

    def __init__(
        self,
        *,
        pool: Pool,
        rows: np.ndarray,
        transform: Transform,
        tokenizer: Tokenizer,
        seed: int,
        global_batch_size: int,
        total_steps: int,
        loader: LoaderOptions,
        max_image_pixels: int,
        max_bad_fraction: float,
        window_shards: int | None = None,
        first_stage: FirstStage | None = None,
        references: RowFeatures | None = None,
        weights: np.ndarray | None = None,
        micro_batch_size: int | None = None,
        resize: ResizeBackend = "pillow",
    ) -> None:
        """Set what is streamed.

        Args:
            pool: to read from.
            rows: int64 [n], the selection expanded by `siftclip.datamodules.selection.expand_rows`.
            transform: of the images.
            tokenizer: of the captions.
            seed: of order, augmentation and substitutes.
            global_batch_size: samples a step over all ranks.
            total_steps: of the whole run.
            loader: processes and how far they work ahead.
            max_image_pixels: larger images are bad samples; checked before decoding.
            max_bad_fraction: how many of the loaded samples may be bad.
            window_shards: see `siftclip.datamodules.order.shuffle`; None shuffles over all tars.
            first_stage: chooses each global batch from a larger one before anything is read.
            references: cached features that the batches carry along.
            weights: float32 [n] by the pool's rows, of the samples in the loss; None: all alike.
            micro_batch_size: samples that a device takes at a time; None: all of a step.
            resize: see `siftclip.datamodules.image_transform`.
        """
        super().__init__()
        pixels = require_int("data.max_image_pixels", max_image_pixels, minimum=1)
        self.dataset = SampleDataset(
            reader=SampleReader(pool=pool, max_image_pixels=pixels),
            transform=transform,
            tokenizer=tokenizer,
            seed=seed,
            substitutes=rows,
            references=references,
            weights=weights,
            resize=resize,
        )
        self.order = SampleOrder(
            rows=rows,
            seed=seed,
            global_batch=first_stage.super_batch_samples if first_stage else global_batch_size,
            shard_of_row=pool.shard_of_row,
            window_shards=require_window(window_shards),
        )
        warn_of_small_cache(pool, rows, self.order.window_shards)
        self.global_batch_size = global_batch_size
        self.total_steps = total_steps
        self.loader = loader
        self.first_stage = first_stage
        self.micro_batch_size = micro_batch_size
        self.max_bad_fraction = max_bad_fraction
        self.faults = FaultLog()
        self.loaded_samples = 0
        self.retries = 0

    def train_dataloader(self) -> StepLoader:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the datamodule needs a trainer, which knows rank and step")
        sampler = OrderSampler(
            order=self.order,
            global_batch=self.global_batch_size,
            start_step=trainer.global_step,
            total_steps=self.total_steps,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            first_stage=self.first_stage,
            micro_batch=self.micro_batch_size,
        )
        loader = make_loader(
            self.dataset,
            sampler,
            self.loader,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        return StepLoader(loader, sampler.micro_batches)

    def transfer_batch_to_device(
        self, batch: StepBatch, device: torch.device, dataloader_idx: int
    ) -> StepBatch:
        """Copy from pinned memory while the device computes; Lightning does so for tensors only."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def state_dict(self) -> dict[str, Any]:
        """What cannot be derived from the step: the counts of this run so far, of rank 0."""
        return {
            "order": self._order_identity,
            "loaded_samples": self.loaded_samples,
            "retries": self.retries,
            "faults": self.faults.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting.

        Raises:
            InputError: the checkpoint belongs to another order of samples.
        """
        if state_dict["order"] != self._order_identity:
            raise InputError(
                "The checkpoint was written with another selection, seed, global batch or window "
                f"of tars: its order is {state_dict['order']}, this one {self._order_identity}. "
                "Start a new run."
            )
        self.loaded_samples = state_dict["loaded_samples"]
        self.retries = state_dict["retries"]
        self.faults = FaultLog.from_state(state_dict["faults"])

    @cached_property
    def _order_identity(self) -> dict[str, Any]:
        rows = np.ascontiguousarray(self.order.rows)
        return {
            "rows": hashlib.sha256(rows.tobytes()).hexdigest()[:16],
            "pool": self.dataset.reader.pool.fingerprint,
            "seed": self.order.seed,
            "selection_version": self.order.selection_version,
            "window_shards": self.order.window_shards,
            "global_batch": self.global_batch_size,
            "super_batch": self.order.global_batch,
        }

    def account(self, batch: Batch) -> None:
        """Count a batch's bad samples of this rank, and stop the run if there are too many.

        The first FIRST_SAMPLES samples are judged together: few samples say little of a rate.
        """
        self.loaded_samples += len(batch.rows)
        self.retries += batch.retries
        for cause, place in batch.faults:
            self.faults.add(cause, place)
        bound = self.max_bad_fraction * max(self.loaded_samples, FIRST_SAMPLES)
        if self.faults.samples > bound:
            self.faults.check(
                owner=f"pool {self.dataset.reader.pool.root}",
                total=self.loaded_samples + self.faults.samples,
                max_bad_fraction=self.max_bad_fraction,
            )
