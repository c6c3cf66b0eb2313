"""Streams selected samples from the original tars: reading, decoding, tokenising in the workers.

Only rows that are asked for are read and decoded. A worker gets (position, row) pairs; the
augmentation of a sample depends on (seed, position) alone, so that neither the number of workers
nor of ranks changes a pixel.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from siftclip.datamodules.clip_models import Tokenizer, Transform
from siftclip.datamodules.faults import FaultLog
from siftclip.datamodules.image_transform import ImageTransform, ResizeBackend
from siftclip.datamodules.order import (
    FirstStage,
    SampleOrder,
    check_chosen,
    derive_seeds,
    rank_slice,
    require_window,
    substitute,
)
from siftclip.datamodules.pool import Pool
from siftclip.datamodules.reader import (
    BadSampleError,
    RawSample,
    SampleReader,
    decode_caption,
    decode_image,
    decode_pixels,
)
from siftclip.datamodules.row_features import RowFeatures
from siftclip.selectors.errors import InputError, require_int

log = logging.getLogger(__name__)

SUBSTITUTE_ATTEMPTS = 20
FIRST_SAMPLES = 1000
_PURPOSE_AUGMENT = 3

Request = tuple[int, int]  # (position in the order, row of the pool)
Fault = tuple[str, str]  # (cause, place)
StartMethod = Literal["fork", "spawn", "forkserver"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a training or embedding step gets."""

    images: Tensor  # float32 [b, 3, size, size]
    tokens: Tensor  # int64 [b, context_length]
    rows: Tensor  # int64 [b], the samples' ids: their rows in the pool
    valid: Tensor  # bool [b]; False where a bad sample was not replaced
    references: dict[str, Tensor] = field(default_factory=dict)  # cached features [b, d] by key
    faults: tuple[Fault, ...] = ()  # of the samples that were bad, replaced or not
    retries: int = 0  # reads that had to be repeated
    failure: str = ""  # why the run cannot go on; the rest means nothing then

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory. The DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images=change(self.images),
            tokens=change(self.tokens),
            rows=change(self.rows),
            valid=change(self.valid),
            references={key: change(values) for key, values in self.references.items()},
        )


@dataclass(slots=True, kw_only=True)
class SampleDataset(Dataset[Batch]):
    """Turns requests into batches. With `substitutes`, bad samples are replaced by others.

    Args:
        reader: of the pool.
        transform: of the images. Its random numbers come from the global states of torch, Python
            and numpy (open_clip's colour jitter draws from Python's), set for every sample.
        tokenizer: of the captions.
        seed: of the augmentation and of the substitutes.
        resize: see `siftclip.datamodules.image_transform`.
        substitutes: int64 [n], the rows to replace bad samples from; None keeps bad samples as
            zeros marked invalid, which embedding wants.
        references: cached features that batches carry along.
    """

    reader: SampleReader
    transform: Transform
    tokenizer: Tokenizer
    seed: int
    substitutes: np.ndarray | None
    references: RowFeatures | None = None
    resize: ResizeBackend = "pillow"
    _images: ImageTransform = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._images = ImageTransform(self.transform, self.resize)

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        storage = self.reader.pool.storage
        retries = storage.retries
        try:
            batch = self._load(requests)
        except InputError as error:
            # Raised here, the loader would wrap its message into a traceback of the worker.
            nothing = torch.empty(0)
            return Batch(
                images=nothing, tokens=nothing, rows=nothing, valid=nothing, failure=str(error)
            )
        return replace(batch, retries=storage.retries - retries)

    def _load(self, requests: Sequence[Request]) -> Batch:
        positions, rows = np.asarray(requests, dtype=np.int64).T
        seeds = derive_seeds(positions, self.seed, _PURPOSE_AUGMENT).tolist()
        images: Tensor | None = None
        valid = torch.zeros(len(rows), dtype=torch.bool)
        captions = [""] * len(rows)
        faults: list[list[Fault]] = [[] for _ in rows]
        # Loaders without workers run in the training process, whose state must not change.
        with _kept_random_states():
            for index, raw in self.reader.read(rows):
                row = int(rows[index])
                for attempt in range(SUBSTITUTE_ATTEMPTS + 1):
                    try:
                        prepared, captions[index] = self._decode(raw, seeds[index])
                        if images is None:
                            images = _empty_batch(len(rows), prepared.shape)
                        self._images.finish(prepared, images[index])
                        rows[index], valid[index] = row, True
                        break
                    except BadSampleError as error:
                        faults[index].append((str(error), self.reader.pool.place(row)))
                    if self.substitutes is None:
                        break
                    if attempt == SUBSTITUTE_ATTEMPTS:
                        self._give_up(faults[index])
                    row = substitute(
                        self.substitutes,
                        seed=self.seed,
                        position=int(positions[index]),
                        attempt=attempt,
                    )
                    ((_, raw),) = self.reader.read(np.asarray([row]))
        if images is None:
            prepared = self._images.prepare(self._blank())
            images = _empty_batch(len(rows), prepared.shape)
        images[~valid] = 0
        return Batch(
            images=images,
            tokens=self.tokenizer(captions),
            rows=torch.from_numpy(rows),
            valid=valid,
            references={} if self.references is None else self.references.gather(rows),
            faults=tuple(fault for found in faults for fault in found),
        )

    def _decode(self, raw: RawSample | BadSampleError, seed: int) -> tuple[Tensor, str]:
        if isinstance(raw, BadSampleError):
            raise raw
        caption = decode_caption(raw.caption)
        decode = decode_pixels if self._images.on_tensors else decode_image
        image = decode(raw.image, self.reader.max_image_pixels)
        # not torch.manual_seed, which also sets the accelerators' states
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        return self._images.prepare(image), caption

    def _give_up(self, faults: Sequence[Fault]) -> None:
        cause, place = faults[-1]
        raise InputError(
            f"{SUBSTITUTE_ATTEMPTS + 1} samples of the pool {self.reader.pool.root} in a row are "
            f"bad; the last one is {place}, one of those {cause}. Is this the right pool?"
        )

    def _blank(self) -> Any:
        blank = Image.new("RGB", (8, 8))
        return np.array(blank) if self._images.on_tensors else blank


def _empty_batch(count: int, shape: torch.Size) -> Tensor:
    """float32 [count, *shape]; in a loader process, where the trainer reads it without a copy."""
    if get_worker_info() is None:
        return torch.empty(count, *shape)
    elements = count * shape.numel()
    # as torch's own collation does; `share_memory_` would copy what is not yet written
    storage = torch.UntypedStorage._new_shared(4 * elements)
    return torch.empty(0).set_(storage).view(count, *shape)


@contextmanager
def _kept_random_states() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def first_item(batches: list[Batch]) -> Batch:
    """Collate nothing: `__getitems__` has built the batch already."""
    return batches  # type: ignore[return-value]  # the loader hands over what __getitems__ gave


@dataclass(slots=True, kw_only=True)
class OrderSampler(Sampler[list[Request]]):
    """The requests of one rank from step `start_step` to `total_steps`.

    Its length is that of the whole run, also when it starts in the middle: Lightning counts the
    batches of an interrupted run as fetched.
    """

    order: SampleOrder
    global_batch: int
    start_step: int
    total_steps: int
    rank: int
    world_size: int
    first_stage: FirstStage | None = None
    mine: slice = field(init=False)

    def __post_init__(self) -> None:
        self.mine = rank_slice(self.global_batch, rank=self.rank, world_size=self.world_size)

    def __len__(self) -> int:
        return self.total_steps

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
            yield list(zip(positions[self.mine].tolist(), rows[self.mine].tolist(), strict=True))


class StreamLoader(DataLoader[Any]):
    """A loader whose failures say what to do, in place of a worker's traceback."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator is all it needs
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                raise InputError(
                    f"The loader gives no more samples: {error}. Memory may be short "
                    "(data.num_workers, data.prefetch_batches), or the storage does not answer "
                    f"within data.timeout_seconds={self.timeout:g}."
                ) from error
            if batch.failure:
                raise InputError(batch.failure)
            yield batch


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
        self.max_bad_fraction = max_bad_fraction
        self.faults = FaultLog()
        self.loaded_samples = 0
        self.retries = 0

    def train_dataloader(self) -> StreamLoader:
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
        )
        return make_loader(
            self.dataset,
            sampler,
            self.loader,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Copy from pinned memory while the device computes; Lightning does so for tensors only."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def state_dict(self) -> dict[str, Any]:
        """What cannot be derived from the step: the counts of this run so far, of rank 0."""
        return {
            "order": self._order_identity(),
            "loaded_samples": self.loaded_samples,
            "retries": self.retries,
            "faults": self.faults.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting.

        Raises:
            InputError: the checkpoint belongs to another order of samples.
        """
        if state_dict["order"] != self._order_identity():
            raise InputError(
                "The checkpoint was written with another selection, seed, global batch or window "
                f"of tars: its order is {state_dict['order']}, this one {self._order_identity()}. "
                "Start a new run."
            )
        self.loaded_samples = state_dict["loaded_samples"]
        self.retries = state_dict["retries"]
        self.faults = FaultLog.from_state(state_dict["faults"])

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
