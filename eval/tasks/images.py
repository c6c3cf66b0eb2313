"""The images that tasks share: each is read, decoded and encoded once.

Tasks share images more often than it seems: the same images with other labels, a test set as a
task of its own and as that of a linear probe, candidates that occur in many associations.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from siftclip.datamodules.pool.image_formats import rare_format
from siftclip.datamodules.pool.reader import BadSampleError
from siftclip.errors import InputError
from siftclip.eval.tasks.kinds.values import TaskSamples
from siftclip.eval.tasks.samples import CHANGED
from siftclip.file_identity import FileIdentity, has_changed
from siftclip.hashing import mix64

if TYPE_CHECKING:
    from siftclip.datamodules.streaming.image_transform import ImageTransform

_PROBE_BYTES = 64
_PROBED_SIZES = 64  # of each two tasks
_OFFSET_BITS = 44  # of a tar of at most 16 TiB


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTable:
    """Where distinct images are, U of them."""

    shards: tuple[Path, ...]
    identities: tuple[FileIdentity, ...]  # of these tars when they were indexed
    places: np.ndarray  # int64 [U, 3]: which of the tars, offset and size in bytes
    names: np.ndarray  # object [U]: the keys of the samples that they are of, for messages

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: np.ndarray) -> ImageTable:
        """Take some of the images, by their rows."""
        return replace(self, places=self.places[rows], names=self.names[rows])


def content_id(data: bytes) -> int:
    """Hash an image, whatever its file, to 64 bits: BLAKE2b of its bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def distinct_images(samples: Sequence[TaskSamples]) -> tuple[ImageTable, list[np.ndarray]]:
    """Find the images of some tasks, shared ones once, and which of them each task's images are.

    Images at the same place of the same tar are one. Others are compared between tasks, and inside
    a task whose samples have several images, where a candidate recurs. For each two tasks, images
    of up to 64 sizes that both have are compared by 64 bytes from their middle. Only where some
    agree, all images of common sizes are compared so, and those that agree by a hash of all their
    bytes. So little is read where nothing is shared. What is missed is encoded twice, no more:
    copies inside a task, and the few images that two tasks share beside many of equal size.

    Args:
        samples: of each task, at least one.

    Returns:
        The table, in the order of first occurrence, and int64 [m] for each task.

    Raises:
        InputError: a tar cannot be read.
    """
    table = _all_images(samples)
    place = table.places[:, 0] << _OFFSET_BITS | table.places[:, 1]
    _, first, inverse = np.unique(place, return_index=True, return_inverse=True)
    suspects = _likely_shared(samples, table, np.sort(first))
    signature = table.places[suspects, 2].astype(np.uint64)
    for part in (_middles, _wholes):
        looked_at = replace(table.take(suspects), places=part(table.places[suspects]))
        signature = mix64(signature) ^ image_ids(looked_at)
        suspects, signature = _repeated(suspects, signature)
    first_like = np.arange(len(table))
    if len(suspects):
        _, first_place, which = np.unique(signature, return_index=True, return_inverse=True)
        first_like[suspects] = suspects[first_place][which.reshape(-1)]
    distinct, number = np.unique(first_like[first[inverse.reshape(-1)]], return_inverse=True)
    ends = np.cumsum([len(of_task.places) for of_task in samples])[:-1]
    return table.take(distinct), np.split(number.reshape(-1), ends)


def _likely_shared(
    samples: Sequence[TaskSamples], table: ImageTable, rows: np.ndarray
) -> np.ndarray:
    """Find those of the rows, each of its own place, that are worth comparing by their content."""
    rows, sizes = _repeated(rows, table.places[rows, 2])
    owners, several = _owners(samples, table)
    owner = owners[table.places[rows, 0]]
    distinct, column, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    # The rarest sizes first, as chance gives fewest of them to two tasks and few images have them
    order = np.lexsort((mix64(distinct.astype(np.uint64)), counts))
    column = np.argsort(order)[column.reshape(-1)]
    cells, counts = np.unique(owner * len(distinct) + column, return_counts=True)
    has, repeats = np.zeros((2, len(several), len(distinct)), dtype=np.bool_)
    has.flat[cells] = True
    repeats.flat[cells[counts > 1]] = True
    pairs = [
        pair
        for pair in combinations_with_replacement(range(len(several)), 2)
        if pair[0] != pair[1] or several[pair[0]]
    ]

    def common(first: int, second: int) -> np.ndarray:
        sizes: np.ndarray = repeats[first] if first == second else has[first] & has[second]
        return sizes

    probed, worth = np.zeros((2, *has.shape), dtype=np.bool_)
    for first, second in pairs:
        some = np.flatnonzero(common(first, second))[:_PROBED_SIZES]
        probed[first, some] = probed[second, some] = True
    looked_at = probed[owner, column]
    middles = replace(table.take(rows[looked_at]), places=_middles(table.places[rows[looked_at]]))
    signature = mix64(sizes[looked_at].astype(np.uint64)) ^ image_ids(middles)
    of_owner = [signature[owner[looked_at] == number] for number in range(len(several))]
    for first, second in pairs:
        if first == second:
            agree = len(np.unique(of_owner[first])) < len(of_owner[first])
        else:
            agree = bool(np.isin(of_owner[first], of_owner[second]).any())
        if agree:
            worth[first] |= common(first, second)
            worth[second] |= common(first, second)
    worth_comparing: np.ndarray = rows[worth[owner, column]]
    return worth_comparing


def _owners(samples: Sequence[TaskSamples], table: ImageTable) -> tuple[np.ndarray, np.ndarray]:
    """Find the task each tar belongs to, the first that reads it, and which have several images."""
    numbers = {shard: number for number, shard in enumerate(table.shards)}
    owners = np.empty(len(numbers), dtype=np.int64)
    for number, of_task in reversed([*enumerate(samples)]):
        owners[[numbers[shard] for shard in of_task.task.shards]] = number
    return owners, np.asarray([len(of_task.places) > len(of_task) for of_task in samples])


def _all_images(samples: Sequence[TaskSamples]) -> ImageTable:
    numbers: dict[Path, int] = {}
    identities: dict[Path, FileIdentity] = {}
    places, names = [], []
    for of_task in samples:
        shards_of_task = [numbers.setdefault(shard, len(numbers)) for shard in of_task.task.shards]
        for shard, identity in zip(of_task.task.shards, of_task.identities, strict=True):
            if identities.setdefault(shard, identity) != identity:  # of two tasks that share it
                raise has_changed(shard, CHANGED)
        tars = np.asarray(shards_of_task, dtype=np.int64)[of_task.places[:, 0]]
        places.append(np.column_stack([tars, of_task.places[:, 1:]]))
        names.append(np.repeat(of_task.keys.astype(object), np.diff(of_task.first_image)))
    return ImageTable(
        shards=tuple(numbers),
        identities=tuple(identities[shard] for shard in numbers),
        places=np.concatenate(places),
        names=np.concatenate(names),
    )


def _repeated(rows: np.ndarray, signature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep those whose signature another one has, too."""
    _, inverse, counts = np.unique(signature, return_inverse=True, return_counts=True)
    keep = counts[inverse.reshape(-1)] > 1
    return rows[keep], signature[keep]


def _middles(places: np.ndarray) -> np.ndarray:
    tars, starts, sizes = places.T
    part = np.minimum(sizes, _PROBE_BYTES)
    return np.column_stack([tars, starts + (sizes - part) // 2, part])


def _wholes(places: np.ndarray) -> np.ndarray:
    return places


def _read(shard: Path, identity: FileIdentity, offset_bytes: int, size_bytes: int) -> bytes:
    with shard.open("rb", buffering=0) as file:
        return _read_open(file.fileno(), shard, identity, offset_bytes, size_bytes)


def _read_open(
    descriptor: int, shard: Path, identity: FileIdentity, offset_bytes: int, size_bytes: int
) -> bytes:
    data = os.pread(descriptor, size_bytes, offset_bytes)
    if not identity.is_of(descriptor):  # asked after the reading, which no change may precede
        raise has_changed(shard, CHANGED)
    return data


def read_images(table: ImageTable) -> Iterator[bytes]:
    """Yield the bytes of each image, as they are in the tar. A tar is opened once for all in a row.

    Raises:
        InputError: a tar cannot be read, or has changed since it was indexed.
    """
    for number, group in groupby(table.places.tolist(), key=itemgetter(0)):
        shard, identity = table.shards[number], table.identities[number]
        try:
            with shard.open("rb", buffering=0) as file:
                for _, offset, size in group:
                    yield _read_open(file.fileno(), shard, identity, offset, size)
        except OSError as error:
            raise InputError(f"{shard} cannot be read: {error.strerror}.") from None


class ImageBatch(NamedTuple):
    """Images of a table, decoded."""

    rows: np.ndarray  # int64 [b], of the table
    images: Tensor  # [b, 3, size, size] as `ImageTransform.put` writes them; black for faults
    ids: np.ndarray  # uint64 [b], see `content_id`
    faults: list[tuple[int, str]]  # (row, what is wrong with the image)
    formats: tuple[str, ...] = ()  # of the images that are none of JPEG, PNG and WEBP

    def pin_memory(self) -> ImageBatch:
        """Copy to page-locked memory, for the loader."""
        return self._replace(images=self.images.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> ImageBatch:
        """Move the images to another device."""
        return self._replace(images=self.images.to(device, non_blocking=non_blocking))

    def tensors(self) -> tuple[Tensor]:
        """Return what `to` moves."""
        return (self.images,)


class ImageDataset(Dataset[ImageBatch]):
    """Batches of a table's images, by lists of rows. Travels to loader processes."""

    def __init__(
        self, table: ImageTable, transform: ImageTransform, *, max_image_pixels: int
    ) -> None:
        """Set what is read and how.

        Args:
            table: of the images.
            transform: the model's eval transform.
            max_image_pixels: larger images are faults.
        """
        self.table = table
        self.transform = transform
        self.max_image_pixels = max_image_pixels
        self._blank = transform.prepare(transform.blank())

    def __getitem__(self, row: int) -> ImageBatch:
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> ImageBatch:
        """Read a batch. A fault is returned, not raised: other tasks continue."""
        images = self.transform.empty_batch(len(rows), self._blank, finished=False)
        ids, faults = np.empty(len(rows), dtype=np.uint64), []
        formats: list[str] = []
        for place, row in enumerate(rows):
            number, offset, size = self.table.places[row].tolist()
            shard, data, image = self.table.shards[number], b"", self._blank
            try:
                data = _read(shard, self.table.identities[number], offset, size)
                image = self._prepare(data)
                formats += filter(None, [rare_format(data)])
            except InputError as error:
                faults.append((row, str(error)))
            except OSError as error:
                faults.append((row, f"{shard} cannot be read: {error.strerror}."))
            except BadSampleError as error:
                faults.append((row, f"{shard}: {self.table.names[row]}: {_fault(error)}"))
            ids[place] = content_id(data)
            self.transform.put(image, images[place])
        return ImageBatch(np.asarray(rows), images, ids, faults, tuple(formats))

    def _prepare(self, data: bytes) -> Tensor:
        """Decode and resize, in bounded memory: a resize makes the shorter side that of the model.

        Raises:
            BadSampleError: it cannot be decoded or resized, or would be too large.
        """
        pixels = self.transform.decode(data, self.max_image_pixels)
        self.transform.require_bounded(pixels, self.max_image_pixels, self._blank.shape[-1])
        try:
            return self.transform.prepare(pixels)
        except Exception as error:  # of torchvision, Pillow or torch, memory too
            cause = str(error) or type(error).__name__
            raise BadSampleError(f"whose image cannot be resized: {cause}") from None


def _fault(error: BadSampleError) -> str:
    if error.__cause__ is None:  # a limit or a step, which the message names
        return f"a sample {error}."
    cause = str(error.__cause__).partition(" <_io.")[0]  # Pillow names the bytes by their address
    return f"a sample {error}: {cause}. Copy this task again."


def only_item(batch: ImageBatch) -> ImageBatch:
    """Collate nothing: `__getitems__` has built the batch already."""
    return batch


def image_ids(table: ImageTable) -> np.ndarray:
    """Compute the `content_id` of each image, uint64 [U]. Reads all bytes, and decodes nothing.

    Raises:
        InputError: a tar cannot be read.
    """
    return np.fromiter(map(content_id, read_images(table)), np.uint64, len(table))
