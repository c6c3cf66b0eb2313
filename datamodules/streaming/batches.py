"""From requests to batches: read, decode, transform, tokenise, replace what is bad.

A request is a (position in the order, row of the pool). The augmentation of a sample depends on
(seed, position) alone, so that neither the number of workers nor of ranks changes a pixel.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.models.load import Tokenizer, Transform
from siftclip.datamodules.pool.image_formats import rare_format
from siftclip.datamodules.pool.reader import (
    BadSampleError,
    ChangedTarError,
    RawSample,
    SampleReader,
    decode_caption,
)
from siftclip.datamodules.streaming.order import DrawnRequests, Substitutes, derive_seeds
from siftclip.datamodules.streaming.pixels import Normalization
from siftclip.errors import InputError, ParameterError
from siftclip.purposes import GeneratorPurpose

if TYPE_CHECKING:
    from siftclip.datamodules.streaming.crops import Crops
    from siftclip.datamodules.streaming.image_transform import ImageTransform, ResizeBackend

SUBSTITUTE_ATTEMPTS = 20

Request = tuple[int, int]  # (position in the order, row of the pool)
Fault = tuple[str, str]  # (cause, place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a training or embedding step gets."""

    # float32 [b, 3, size, size]; or pixels, uint8, until `finished`; or crops, uint8 [bytes]
    images: Tensor
    tokens: Tensor  # int64 [b, context_length]
    rows: Tensor  # int64 [b], the samples' ids: their rows in the pool
    valid: Tensor  # bool [b]; False where a bad sample was not replaced
    references: dict[str, Tensor] = field(default_factory=dict)  # cached features [b, d] by key
    weights: Tensor | None = None  # float32 [b], of the samples in the loss; None: all alike
    copies: bool = False  # the batch of all ranks may hold a sample twice; the same on all ranks
    faults: tuple[Fault, ...] = ()  # of the samples that were bad, replaced or not
    formats: tuple[str, ...] = ()  # of the images that are none of JPEG, PNG and WEBP
    retries: int = 0  # reads that had to be repeated
    failure: str = ""  # why the run cannot continue; the rest means nothing then
    host_rows: Tensor | None = None  # `rows` of a batch that was moved to a device
    normalization: Normalization | None = None  # of images that are pixels
    crops: Crops | None = None  # where crops are in `images`, until `resized`

    def resized(self) -> Batch:
        """Return the batch with images of one size, uint8, on the device it is on."""
        if self.crops is None:
            return self
        from siftclip.datamodules.streaming.device_resize import resize_crops

        return replace(self, images=resize_crops(self.images, self.crops), crops=None)

    def finished(self) -> Batch:
        """Return the batch with images that a model takes, float32, on the device it is on."""
        if self.normalization is None:
            return self
        images = self.normalization(self.resized().images)
        return replace(self, images=images, normalization=None, crops=None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move the batch to another device; its rows stay known on the CPU."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, host_rows=self.rows if self.rows.is_cpu else self.host_rows)

    def rows_on_cpu(self) -> Tensor:
        """Return the rows, int64 [b], without waiting for a device where they are known."""
        return self.rows.cpu() if self.host_rows is None else self.host_rows

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory. The DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """Yield what `to` moves."""
        yield from (self.images, self.tokens, self.rows, self.valid, *self.references.values())
        if self.weights is not None:
            yield self.weights

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images=change(self.images),
            tokens=change(self.tokens),
            rows=change(self.rows),
            valid=change(self.valid),
            references={key: change(values) for key, values in self.references.items()},
            weights=None if self.weights is None else change(self.weights),
        )


class StepBatch:
    """The batch of one step on one rank, in the micro-batches that the device takes at a time.

    `digest` stands for what all ranks together read at the step, for them to compare; 0 with one.
    `samples` counts what this rank has read.

    Neither a list nor a dataclass, so that Lightning hands it on as it is.
    """

    __slots__ = ("digest", "micro_batches", "samples")

    def __init__(self, micro_batches: Sequence[Batch], digest: int = 0) -> None:
        self.micro_batches, self.digest = micro_batches, digest
        self.samples = sum(len(batch.rows) for batch in micro_batches)

    @property
    def device(self) -> torch.device:
        return self.micro_batches[0].images.device

    def keep(self, chosen: Sequence[Batch]) -> None:
        """Keep what is trained on; the memory of the rest is free when nobody else has it."""
        self.micro_batches = chosen

    def resize(self) -> None:
        """Make images of one size out of crops, which are then given up."""
        self.micro_batches = [batch.resized() for batch in self.micro_batches]

    def tensors(self) -> Iterator[Tensor]:
        """Yield what `to` moves."""
        for batch in self.micro_batches:
            yield from batch.tensors()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """Move the batch to another device."""
        moved = [b.to(device, non_blocking=non_blocking) for b in self.micro_batches]
        return StepBatch(moved, self.digest)


@dataclass(slots=True, kw_only=True)
class SampleDataset(Dataset[Batch]):
    """Turns requests into batches. With `substitutes`, bad samples are replaced by others.

    Args:
        reader: of the pool.
        transform: of the images. Its random numbers come from the global states of torch, Python
            and numpy (open_clip's colour jitter draws from Python's), set for every sample.
        tokenizer: of the captions.
        seed: of the augmentation and of the substitutes.
        resize: see `siftclip.datamodules.streaming.image_transform`.
        substitutes: int64 [n], the rows to replace bad samples from, each once, sorted; None keeps
            bad samples as zeros marked invalid, which embedding wants.
        references: cached features that batches carry along.
        weights: float32 [n] by the pool's rows, of the samples in the loss; None: all alike.
        finished: whether images are float32 already. Else they are pixels, a quarter of the bytes,
            where the transform ends as open_clip's do; see `Batch.finished`.
        channels_last: the layout of finished images in memory.
    """

    reader: SampleReader
    transform: Transform
    tokenizer: Tokenizer
    seed: int
    substitutes: np.ndarray | None
    references: Sequence[RowFeatures] = ()
    weights: np.ndarray | None = None
    resize: ResizeBackend = "pillow"
    finished: bool = False
    channels_last: bool = False
    image_transform: ImageTransform = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from siftclip.datamodules.streaming.image_transform import ImageTransform

        if self.finished and self.resize == "gpu":
            raise ParameterError(
                "hands over crops, which are no finished images",
                parameter="resize",
                value=self.resize,
                way_out="Use torch or pillow.",
            )
        self.image_transform = ImageTransform(
            self.transform, self.resize, channels_last=self.channels_last
        )

    @property
    def normalization(self) -> Normalization | None:
        """What the transform ends with, if it ends as open_clip's do."""
        return self.image_transform.normalization

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
        replacing: Substitutes | None = None  # of a bad sample, made when there is one
        seeds = derive_seeds(positions, self.seed, GeneratorPurpose.AUGMENT).tolist()
        filling = self.image_transform.filling(len(rows), finished=self.finished)
        valid = torch.zeros(len(rows), dtype=torch.bool)
        captions = [""] * len(rows)
        faults: list[list[Fault]] = [[] for _ in rows]
        formats: list[str] = []
        # Loaders without workers run in the training process, whose state must not change.
        with kept_random_states():
            for index, raw in self.reader.read(rows):
                row = int(rows[index])
                for attempt in range(SUBSTITUTE_ATTEMPTS + 1):
                    try:
                        prepared, captions[index], rare = self._decode(raw, seeds[index])
                        filling.put(index, prepared)
                        rows[index], valid[index] = row, True
                        if rare is not None:
                            formats.append(rare)
                        break
                    except ChangedTarError as error:
                        raise error.stop() from None
                    except BadSampleError as error:
                        faults[index].append((str(error), self.reader.pool.place(row)))
                    if self.substitutes is None:
                        break
                    if attempt == SUBSTITUTE_ATTEMPTS:
                        self._give_up(faults[index])
                    replacing = replacing or self._replacing(self.substitutes, requests)
                    place = int(positions[index]) - replacing.start
                    row = replacing.row(place, attempt)
                    ((_, raw),) = self.reader.read(np.asarray([row]))
        images, crops = filling.finish(valid)
        return Batch(
            images=images,
            tokens=self.tokenizer(captions),
            rows=torch.from_numpy(rows),
            valid=valid,
            references={
                key: values
                for features in self.references
                for key, values in features.gather(rows).items()
            },
            weights=None if self.weights is None else torch.from_numpy(self.weights[rows]),
            copies=isinstance(requests, DrawnRequests) and requests.copies,
            faults=tuple(fault for of_sample in faults for fault in of_sample),
            formats=tuple(formats),
            normalization=self.normalization if images.dtype == torch.uint8 else None,
            crops=crops,
        )

    def _decode(self, raw: RawSample | BadSampleError, seed: int) -> tuple[Tensor, str, str | None]:
        """Return the image as `ImageTransform.prepare` does, the caption, and a rare format."""
        if isinstance(raw, BadSampleError):
            raise raw
        caption = decode_caption(raw.caption, self.reader.max_caption_bytes)
        image = self.image_transform.decode(raw.image, self.reader.max_image_pixels)
        self.image_transform.require_bounded(image, self.reader.max_image_pixels)
        # not torch.manual_seed, which also sets the accelerators' states
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        return self.image_transform.prepare(image), caption, rare_format(raw.image)

    def _replacing(self, distinct: np.ndarray, requests: Sequence[Request]) -> Substitutes:
        if not isinstance(requests, DrawnRequests):  # they are all that is read at a time
            rows = np.array([row for _, row in requests])
            requests = DrawnRequests(requests, start=requests[0][0], drawn=rows, copies=False)
        return Substitutes(distinct, requests.drawn, seed=self.seed, start=requests.start)

    def _give_up(self, faults: Sequence[Fault]) -> None:
        cause, place = faults[-1]
        raise InputError(
            f"{SUBSTITUTE_ATTEMPTS + 1} samples of the pool {self.reader.pool.root} in a row are "
            f"bad; the last one is {place}, one of those {cause}. docs/pools.md says which images "
            "and captions are read, and how to write a pool anew."
        )


def pick(parts: Sequence[Batch], index: Tensor) -> Batch:
    """Pick samples of several batches as one: int64 [m] into the samples of all, ascending."""
    bounds = torch.tensor([0, *(len(part.rows) for part in parts)]).cumsum(0)
    cuts = torch.searchsorted(index, bounds).tolist()
    places = [
        index[cuts[number] : cuts[number + 1]] - bounds[number] for number in range(len(parts))
    ]
    chosen = [
        (part, at.to(part.rows.device, non_blocking=True))
        for part, at in zip(parts, places, strict=True)
    ]
    known = [
        part.host_rows[at]
        for part, at in zip(parts, places, strict=True)
        if part.host_rows is not None
    ]

    def joined(get: Callable[[Batch], Tensor]) -> Tensor:
        return torch.cat([_take(get(part), at) for part, at in chosen if len(at)])

    return Batch(
        images=joined(lambda part: part.images),
        tokens=joined(lambda part: part.tokens),
        rows=joined(lambda part: part.rows),
        valid=joined(lambda part: part.valid),
        references={
            key: joined(lambda part, key=key: part.references[key])  # type: ignore[misc]  # mypy 12557
            for key in parts[0].references
        },
        weights=None if parts[0].weights is None else joined(lambda part: part.weights),  # type: ignore[arg-type,return-value]  # all have them
        copies=parts[0].copies,
        host_rows=torch.cat(known) if len(known) == len(parts) else None,
        normalization=parts[0].normalization,
    )


def _take(values: Tensor, at: Tensor) -> Tensor:
    """Take samples of [b, ...] as they lie in memory, which is ten times as fast for pixels."""
    if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1).index_select(0, at).permute(0, 3, 1, 2)
    return values.index_select(0, at)


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Put the random states of torch's CPU, Python and numpy back after the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
