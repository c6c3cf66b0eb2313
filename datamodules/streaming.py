"""Streams selected samples from the original tars: positional reads, decoding in the workers.

Only rows that are asked for are read and decoded. A worker gets (position, row) pairs; the
augmentation of a sample depends on (seed, position) alone, so that neither the number of workers
nor of ranks changes a pixel.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from siftclip.datamodules.clip_models import Tokenizer, Transform
from siftclip.datamodules.faults import FaultLog
from siftclip.datamodules.order import SampleOrder, derive_generator, rank_batch_size, substitute
from siftclip.datamodules.pool import Pool
from siftclip.datamodules.reader import BadSampleError, SampleReader
from siftclip.selectors.errors import InputError, require_int

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
    rows: Tensor  # int64 [b], the samples' rows in the pool
    valid: Tensor  # bool [b]; False where a bad sample was not replaced
    faults: tuple[Fault, ...]  # of the samples that were bad, replaced or not

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device. Lightning calls this."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("images", "tokens", "rows", "valid")
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory. The DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), tokens=self.tokens.pin_memory())


@dataclass(slots=True, kw_only=True)
class SampleDataset(Dataset[Batch]):
    """Turns requests into batches. With `substitutes`, bad samples are replaced by others.

    Args:
        reader: of the pool.
        transform: of the images. Its random numbers come from the global states of torch, Python
            and numpy (open_clip's colour jitter draws from Python's), set for every sample.
        tokenizer: of the captions.
        seed: of the augmentation and of the substitutes.
        substitutes: int64 [n], the rows to replace bad samples from; None keeps bad samples as
            zeros marked invalid, which embedding wants.
    """

    reader: SampleReader
    transform: Transform
    tokenizer: Tokenizer
    seed: int
    substitutes: np.ndarray | None

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        # Loaders without workers run in the training process, whose state must not change.
        with _kept_random_states():
            samples = [self._load(position, row) for position, row in requests]
        images, captions, rows, faults = zip(*samples, strict=True)
        shape = next((image.shape for image in images if image is not None), None)
        if shape is None:
            shape = self.transform(Image.new("RGB", (8, 8))).shape
        return Batch(
            images=torch.stack([torch.zeros(shape) if i is None else i for i in images]),
            tokens=self.tokenizer(list(captions)),
            rows=torch.tensor(rows, dtype=torch.int64),
            valid=torch.tensor([image is not None for image in images]),
            faults=tuple(fault for found in faults for fault in found),
        )

    def _load(self, position: int, row: int) -> tuple[Tensor | None, str, int, list[Fault]]:
        faults: list[Fault] = []
        for attempt in range(SUBSTITUTE_ATTEMPTS):
            try:
                caption = self.reader.read_caption(row)
                image = self.reader.read_image(row)
                self._seed_augmentation(position)
                return self.transform(image), caption, row, faults
            except BadSampleError as error:
                faults.append((str(error), self.reader.pool.place(row)))
            if self.substitutes is None:
                return None, "", row, faults
            row = substitute(self.substitutes, seed=self.seed, position=position, attempt=attempt)
        raise InputError(
            f"{SUBSTITUTE_ATTEMPTS} samples of the pool {self.reader.pool.root} in a row are bad; "
            f"the last one is {faults[-1][1]}, one of those {faults[-1][0]}. "
            "Is this the right pool?"
        )

    def _seed_augmentation(self, position: int) -> None:
        generator = derive_generator(self.seed, position, _PURPOSE_AUGMENT)
        # not torch.manual_seed, which also sets the accelerators' states
        torch.default_generator.manual_seed(int(generator.integers(2**63)))
        random.seed(int(generator.integers(2**63)))
        np.random.seed(int(generator.integers(2**32)))


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
    start_step: int
    total_steps: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[list[Request]]:
        for step in range(self.start_step, self.total_steps):
            positions, rows = self.order.rank_batch(
                step, rank=self.rank, world_size=self.world_size
            )
            yield list(zip(positions.tolist(), rows.tolist(), strict=True))


def make_loader(
    dataset: SampleDataset,
    sampler: Sampler[list[Request]],
    *,
    num_workers: int,
    start_method: StartMethod | None,
    pin_memory: bool,
) -> DataLoader[Any]:
    """A loader whose workers read, decode and tokenise whole batches.

    Raises:
        InputError: the number of workers or their start method is not possible.
    """
    if start_method is not None and start_method not in multiprocessing.get_all_start_methods():
        raise InputError(
            f"data.start_method must be null or one of {multiprocessing.get_all_start_methods()}. "
            f"Got {start_method!r}."
        )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=first_item,
        num_workers=require_int("data.num_workers", num_workers, minimum=0),
        multiprocessing_context=start_method if num_workers else None,
        pin_memory=pin_memory,
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
        num_workers: int,
        start_method: StartMethod | None,
        max_image_pixels: int,
        max_bad_fraction: float,
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
            num_workers: loader processes a rank; 0 loads in the training process.
            start_method: of these processes; None is the platform's default.
            max_image_pixels: larger images are bad samples; checked before decoding.
            max_bad_fraction: how many of the loaded samples may be bad.
        """
        super().__init__()
        reader = SampleReader(
            pool, require_int("data.max_image_pixels", max_image_pixels, minimum=1)
        )
        self.dataset = SampleDataset(
            reader=reader, transform=transform, tokenizer=tokenizer, seed=seed, substitutes=rows
        )
        self.order = SampleOrder(rows=rows, seed=seed, global_batch=global_batch_size)
        self.total_steps = total_steps
        self.num_workers = num_workers
        self.start_method = start_method
        self.max_bad_fraction = max_bad_fraction
        self.faults = FaultLog()
        self.loaded_samples = 0

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the datamodule needs a trainer, which knows rank and step")
        rank_batch_size(self.order.global_batch, trainer.world_size)
        sampler = OrderSampler(
            order=self.order,
            start_step=trainer.global_step,
            total_steps=self.total_steps,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return make_loader(
            self.dataset,
            sampler,
            num_workers=self.num_workers,
            start_method=self.start_method,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def account(self, batch: Batch) -> None:
        """Count a batch's bad samples of this rank, and stop the run if there are too many.

        The first FIRST_SAMPLES samples are judged together: few samples say little of a rate.
        """
        self.loaded_samples += len(batch.rows)
        for cause, place in batch.faults:
            self.faults.add(cause, place)
        bound = self.max_bad_fraction * max(self.loaded_samples, FIRST_SAMPLES)
        if self.faults.samples > bound:
            self.faults.check(
                owner=f"pool {self.dataset.reader.pool.root}",
                total=self.loaded_samples + self.faults.samples,
                max_bad_fraction=self.max_bad_fraction,
            )
