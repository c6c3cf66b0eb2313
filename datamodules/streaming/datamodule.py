"""Streams selected samples into training: requests by step, loader processes, the datamodule."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import Sampler

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.index.faults import FaultLog
from siftclip.datamodules.models.load import Tokenizer, Transform
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming.batches import Batch, Request, SampleDataset, StepBatch
from siftclip.datamodules.streaming.copies import count_copies
from siftclip.datamodules.streaming.device_copies import on_device
from siftclip.datamodules.streaming.load_counts import LoadCounts
from siftclip.datamodules.streaming.loader import LoaderOptions, StreamLoader, make_loader
from siftclip.datamodules.streaming.order import (
    DrawnRequests,
    FirstStage,
    SampleOrder,
    check_chosen,
    rank_slice,
    require_window,
    rows_digest,
)
from siftclip.datamodules.streaming.step_plan import StepPlan, part_sizes
from siftclip.errors import InputError, ParameterError, require_int

if TYPE_CHECKING:
    from siftclip.datamodules.streaming.image_transform import ResizeBackend

log = logging.getLogger(__name__)

ROOM_DRAWS = 4  # a selection has for three attempts at each bad sample, see `Substitutes`
CPU = torch.device("cpu")
COUNTED_SAMPLES = 1_000_000  # of an order, for the share of batches that hold copies
RESIZING_DEVICES = ("cuda",)  # elsewhere loaders resize, in parallel, and give the same pixels


@dataclass(slots=True, kw_only=True)
class OrderSampler(Sampler[list[Request]]):
    """The requests of one rank from step `start_step` to `total_steps`.

    With `micro_batch` the requests of a step come in parts of that size, so that loader processes
    share the work of a step; those of a super-batch in parts of at most what the rank trains on.
    """

    order: SampleOrder
    global_batch: int  # samples that a step trains on
    start_step: int
    total_steps: int
    rank: int
    world_size: int
    plan: StepPlan | None = None  # of steps that draw more than they train on
    first_stage: FirstStage | None = None  # of such a plan
    micro_batch: int | None = None
    weights: np.ndarray | None = None  # float32 by the pool's rows, of the samples in the loss
    # Of the steps that were asked for and not trained on yet, what all ranks read: see `StepBatch`.
    digests: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        mine = rank_slice(self.global_batch, rank=self.rank, world_size=self.world_size)
        count_micro_batches(mine.stop - mine.start, self.micro_batch)

    def parts(self, step: int) -> list[int]:
        """Return how many samples of this rank each part of a step has."""
        read = self.global_batch if self.plan is None else int(self.plan.read[step])
        return part_sizes(
            read // self.world_size, self.micro_batch or self.global_batch // self.world_size
        )

    def __len__(self) -> int:
        return sum(len(self.parts(step)) for step in range(self.start_step, self.total_steps))

    def __iter__(self) -> Iterator[list[Request]]:
        for step in range(self.start_step, self.total_steps):
            drawn_positions, drawn = self._drawn_at(step)
            positions, rows = self._read_of(step, drawn_positions, drawn)
            if self.world_size > 1:
                weights = None if self.weights is None else self.weights[rows]
                self.digests[step] = rows_digest(rows, weights)
            mine = rank_slice(len(rows), rank=self.rank, world_size=self.world_size)
            requests = list(zip(positions[mine].tolist(), rows[mine].tolist(), strict=True))
            start, copies = 0, self._may_hold_copies(drawn, rows)
            for size in self.parts(step):
                part = requests[start : start + size]
                first = int(drawn_positions[0])
                yield DrawnRequests(part, start=first, drawn=drawn, copies=copies)
                start += size

    def _may_hold_copies(self, drawn: np.ndarray, rows: np.ndarray) -> bool:
        """Return whether a step may hold a sample twice, by itself or where a bad one is replaced.

        Every rank gets the same answer.
        """
        if len(self.order.distinct) < ROOM_DRAWS * len(drawn):
            return True
        return not self.order.is_distinct and count_copies(rows) > 0

    def _drawn_at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and rows of the samples that all ranks together draw at a step."""
        if self.plan is None:
            return self.order.batch(step)
        return self.order.span(int(self.plan.starts[step]), int(self.plan.drawn[step]))

    def _read_of(
        self, step: int, positions: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and rows of those that are read."""
        wanted = len(rows) if self.plan is None else int(self.plan.read[step])
        if self.first_stage is None or wanted == len(rows):
            return positions, rows
        chosen = check_chosen(
            self.first_stage(step, rows, wanted),
            drawn=len(rows),
            wanted=wanted,
            owner=f"The first stage {type(self.first_stage).__name__}",
        )
        return positions[chosen], rows[chosen]


def count_micro_batches(rank_batch: int, micro_batch: int | None) -> int:
    """Count the micro-batches into which the batch of a rank is split.

    Raises:
        InputError: it cannot be split into equal ones.
    """
    if micro_batch is None:
        return 1
    require_int("micro_batch_size", micro_batch, minimum=1)
    if rank_batch % micro_batch:
        raise ParameterError(
            f"must divide the {rank_batch} samples that each device gets of the global batch",
            parameter="micro_batch_size",
            value=micro_batch,
        )
    return rank_batch // micro_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionVersion:
    """A selection of a run, and the steps that are trained on it."""

    number: int  # 0 is what was selected before training
    rows: np.ndarray  # int64 [n], repetitions repeated, sorted
    start_step: int
    stop_step: int  # where the next version begins, or the run ends
    weights: np.ndarray | None = None  # float32 by the pool's rows, of the samples in the loss


# The version that a step belongs to. It is asked in order, between two steps, on every rank.
FindVersion = Callable[[int], SelectionVersion]


class StepLoader:
    """The step batches of a run from `start_step` on, over all versions of its selection.

    Loader processes work ahead, so they are started anew for each version. Its length is that of
    the whole run, also when it starts in the middle: Lightning counts the batches of an interrupted
    run as fetched, and asks for no batch ahead of its step from a loader that has a length.
    """

    def __init__(
        self,
        open_loader: Callable[[SelectionVersion, int], tuple[StreamLoader, OrderSampler]],
        find_version: FindVersion,
        *,
        start_step: int,
        total_steps: int,
        device: torch.device = CPU,
    ) -> None:
        self.open_loader, self.find_version = open_loader, find_version
        self.start_step, self.total_steps = start_step, total_steps
        self.device = device

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[StepBatch]:
        step = self.start_step
        while step < self.total_steps:
            loader, sampler = self.open_loader(self.find_version(step), step)
            batches = on_device(self._steps_of(loader, sampler, step), self.device)
            for batch in batches:
                batch.resize()
                yield batch
                step += 1
            if step < sampler.total_steps:
                return
            del batches, loader  # ends its processes before a version may start others

    @staticmethod
    def _steps_of(loader: StreamLoader, sampler: OrderSampler, step: int) -> Iterator[StepBatch]:
        """Yield the step batches of one version, from a step on, where the loader gives them."""
        batches = iter(loader)
        while step < sampler.total_steps:
            parts = islice(batches, len(sampler.parts(step)))
            batch = StepBatch([*parts], sampler.digests.pop(step, 0))
            if not batch.micro_batches:
                return
            yield batch  # which alone has the parts, so that it can give them up
            step += 1


def resize_for(device: torch.device, resize: ResizeBackend) -> ResizeBackend:
    """Return how loaders resize for a device: `gpu` is for those that can, else its pixels are."""
    return "pillow" if resize == "gpu" and device.type not in RESIZING_DEVICES else resize


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
            "(%.2f GB), so tars are copied again and again. Raise the pool's shard_cache_gb, or "
            "shuffle %d of them together (shuffle_window_shards)",
            pool.root,
            limit / 1e9,
            len(together),
            sum(together) / 1e9,
            max(1, limit // max(sizes)),
        )


def warn_of_copies(order: SampleOrder, *, first_step: int, steps: int) -> float:
    """Say so if batches hold a sample several times; the share of the batches that do.

    That of a long run is counted on its first batches, unless it is known to be 0 or 1.
    """
    fraction = order.copies_fraction(first_step, steps, most_samples=COUNTED_SAMPLES)
    if fraction:
        counts_all = steps * order.largest_draw <= COUNTED_SAMPLES
        repeated = f" among {len(order.rows)}, one of them {order.most_copies} times"
        fits = min(len(order.distinct), len(order.rows) // order.most_copies)
        log.warning(
            "%s%.3g %% of the batches hold a sample twice or more: a step draws %d samples, and "
            "the selection has %d different ones%s. Copies are no negatives of each other, so that "
            "samples have fewer of them than the batch is large. With draws of %d or fewer none "
            "would meet: lower the global batch size (or what super-batches drop), or select more",
            "" if fraction == 1 or counts_all else "about ",
            100 * fraction,
            order.largest_draw,
            len(order.distinct),
            "" if order.most_copies == 1 else repeated,
            fits,
        )
    return fraction


def order_identity(order: SampleOrder, pool: Pool) -> dict[str, Any]:
    """Return what an order of samples depends on: equal values, equal samples at every step."""
    rows = np.ascontiguousarray(order.rows)
    return {
        "rows": hashlib.sha256(rows.tobytes()).hexdigest()[:16],
        "pool": pool.fingerprint,
        "seed": order.seed,
        "selection_version": order.selection_version,
        "window_shards": order.window_shards,
        "global_batch": order.global_batch,
    }


def require_order(kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to this order of samples.

    Raises:
        InputError: it does not.
    """
    if kept != now:
        differing = [name for name in now if kept.get(name) != now[name]]
        raise InputError(
            "The checkpoint was written with another selection, seed, global batch or window of "
            f"tars: its order of samples differs in {', '.join(differing) or 'what it holds'}. "
            "Put the run's own checkpoint back, or start a new run."
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
        plan: StepPlan | None = None,
        first_stage: FirstStage | None = None,
        references: Sequence[RowFeatures] = (),
        weights: np.ndarray | None = None,
        micro_batch_size: int | None = None,
        resize: ResizeBackend = "pillow",
        channels_last: bool = False,
    ) -> None:
        """Set what is streamed.

        Args:
            pool: to read from.
            rows: int64 [n], the selection with its repeats, see `selection.expand_rows`.
            transform: of the images.
            tokenizer: of the captions.
            seed: of order, augmentation and substitutes.
            global_batch_size: samples per step over all ranks.
            total_steps: of the whole run.
            loader: processes and how far they work ahead.
            max_image_pixels: larger images are bad samples; checked before decoding.
            max_bad_fraction: how many of the loaded samples may be bad.
            window_shards: see `order.shuffle`; None shuffles over all tars.
            plan: of steps that draw more than they train on.
            first_stage: chooses what such a step reads of what it draws.
            references: cached features that the batches carry along.
            weights: float32 [n] by the pool's rows, of the samples in the loss; None: all alike.
            micro_batch_size: samples that a device takes at a time; None: all of a step.
            resize: see `siftclip.datamodules.streaming.image_transform`.
            channels_last: the layout of images in memory, when the model takes them.
        """
        super().__init__()
        pixels = require_int("max_image_pixels", max_image_pixels, minimum=1)
        self.order = SampleOrder(
            rows=rows,
            seed=seed,
            global_batch=global_batch_size,
            shard_of_row=pool.shard_of_row,
            window_shards=require_window(window_shards),
            starts=None if plan is None else plan.starts,
        )
        self.dataset = SampleDataset(
            reader=SampleReader(pool=pool, max_image_pixels=pixels),
            transform=transform,
            tokenizer=tokenizer,
            seed=seed,
            substitutes=self.order.distinct,
            references=references,
            weights=weights,
            resize=resize,
            channels_last=channels_last,
        )
        warn_of_small_cache(pool, rows, self.order.window_shards)
        self.global_batch_size = global_batch_size
        self.total_steps = total_steps
        self.loader = loader
        self.plan = plan
        self.first_stage = first_stage
        self.find_version: FindVersion = lambda step: SelectionVersion(
            number=0, rows=rows, start_step=0, stop_step=total_steps, weights=weights
        )
        self.micro_batch_size = micro_batch_size
        self.counts = LoadCounts(owner=f"pool {pool.root}", max_bad_fraction=max_bad_fraction)
        self.copies_fraction = 0.0  # of the batches of this version, that hold a sample twice

    def train_dataloader(self) -> StepLoader:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the datamodule needs a trainer, which knows rank and step")
        # before the first step: what the sampler of a version checks, too
        share = rank_slice(self.global_batch_size, rank=0, world_size=trainer.world_size)
        count_micro_batches(share.stop, self.micro_batch_size)
        device = trainer.strategy.root_device

        def open_loader(version: SelectionVersion, step: int) -> tuple[StreamLoader, OrderSampler]:
            order, stop = self._order_of(version), min(version.stop_step, self.total_steps)
            if trainer.global_rank == 0:
                self.copies_fraction = warn_of_copies(order, first_step=step, steps=stop - step)
            sampler = OrderSampler(
                order=order,
                global_batch=self.global_batch_size,
                start_step=step,
                total_steps=stop,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                plan=self.plan,
                first_stage=self.first_stage,
                micro_batch=self.micro_batch_size,
                weights=version.weights,
            )
            dataset = replace(
                self.dataset,
                substitutes=order.distinct,
                weights=version.weights,
                resize=resize_for(device, self.dataset.resize),
            )
            return make_loader(
                dataset, sampler, self.loader, pin_memory=device.type == "cuda"
            ), sampler

        return StepLoader(
            open_loader,
            self.find_version,
            start_step=trainer.global_step,
            total_steps=self.total_steps,
            device=device,
        )

    def _order_of(self, version: SelectionVersion) -> SampleOrder:
        if version.number == 0:
            return self.order
        first = version.start_step
        return replace(
            self.order,
            rows=version.rows,
            selection_version=version.number,
            first_position=first * self.global_batch_size
            if self.plan is None
            else int(self.plan.starts[first]),
        )

    def transfer_batch_to_device(
        self, batch: StepBatch, device: torch.device, dataloader_idx: int
    ) -> StepBatch:
        """Move a batch that the loader has not moved; Lightning does so for tensors only."""
        if batch.device == device:
            return batch  # not a copy, which would keep what `StepBatch.keep` gives up
        return batch.to(device, non_blocking=device.type == "cuda")

    def state_dict(self) -> dict[str, Any]:
        """Return what cannot be derived from the step: the counts of this run so far, of rank 0."""
        return {"order": self._order_identity, **self.counts.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts of `state_dict`.

        Raises:
            InputError: the checkpoint belongs to another order of samples.
        """
        require_order(state_dict["order"], self._order_identity)
        self.counts.load_state_dict(state_dict)

    @cached_property
    def _order_identity(self) -> dict[str, Any]:
        return {
            **order_identity(self.order, self.dataset.reader.pool),
            **({"copies_apart": True} if self._moves_samples else {}),
            "drawn": None
            if self.plan is None
            else hashlib.sha256(self.plan.starts.tobytes()).hexdigest()[:16],
        }

    @property
    def _moves_samples(self) -> bool:
        """Whether this order is not that of versions that did not keep copies apart."""
        steps = self.total_steps
        stop = steps * self.global_batch_size if self.plan is None else self.plan.starts[steps]
        return self.order.moves_samples(int(stop))

    def account(self, batch: Batch) -> None:
        """Count a batch's bad samples of this rank, and stop the run if there are too many."""
        self.counts.add(batch)

    @property
    def faults(self) -> FaultLog:
        """The bad samples of this rank so far."""
        return self.counts.faults

    @property
    def loaded_samples(self) -> int:
        """All samples of this rank so far."""
        return self.counts.loaded_samples

    @property
    def retries(self) -> int:
        """Reads of this rank that had to be repeated."""
        return self.counts.retries
