"""Crops of any size in one buffer, which a device resizes: what loaders hand over with `gpu`.

A crop stands in the buffer as it was decoded, row by row, uint8 [h, w, 3]. Behind the last one are
some bytes more, so that rows can be read at the width of the widest crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from siftclip.datamodules.streaming.shared_memory import empty

if TYPE_CHECKING:
    from siftclip.datamodules.streaming.image_transform import ImageTransform

MOST_SHRINK = 4  # of a side on the device; the loader resizes larger crops
MOST_TALL = 100  # times as high as wide: some versions of Pillow resize taller images in other ways
MAX_SIDE = 1024  # of the images in pixels: their weights are computed in int64
_ALIGNED = 8  # lengths on the device are multiples of it, which tensor cores want


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """Where the crops of a batch are in its buffer, and what they are resized to."""

    side: int  # in pixels, of the images that they become
    places: np.ndarray  # int64 [b, 3]: first byte, height, width


def taps_of(length: int, side: int) -> int:
    """Return how many pixels at most one of `side` pixels is made of."""
    return -(-4 * max(length, side) // side) + 1


def padded_length(lengths: np.ndarray, side: int) -> np.ndarray:
    """Return lengths of crops as they are padded on the device, in pixels."""
    least = max(side, taps_of(MOST_SHRINK * side, side))
    padded: np.ndarray = -(-np.maximum(lengths, least) // _ALIGNED) * _ALIGNED
    return padded


def tail_bytes(side: int) -> int:
    """Return how many bytes follow the last crop of a buffer."""
    return 3 * int(padded_length(np.array(MOST_SHRINK * side), side))


def bounded_crop(crop: Tensor, side: int) -> Tensor:
    """Resize a crop here if it is too large for the device; it gets the same pixels there.

    Args:
        crop: uint8 [3, h, w], channels last in memory.
        side: of the image that it becomes, in pixels.

    Returns:
        uint8 [3, h, w], or [3, side, side].
    """
    _, height, width = crop.shape
    if max(height, width) <= MOST_SHRINK * side and height <= MOST_TALL * width:
        return crop
    image = Image.fromarray(np.ascontiguousarray(crop.permute(1, 2, 0).numpy()))
    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@dataclass(slots=True)
class CropRoom:
    """What batches before have taken, so that the next buffer need not grow while it is filled."""

    crop_bytes: int = 0  # of a crop of the largest batch


class PackedCrops:
    """A batch that is being filled with crops, in any order."""

    def __init__(self, count: int, side: int, room: CropRoom) -> None:
        self._places = np.zeros((count, 3), dtype=np.int64)
        self._side, self._room, self._used = side, room, 0
        crop_bytes = max(room.crop_bytes, 3 * side * side)
        self._buffer = empty((crop_bytes * count + tail_bytes(side),), torch.uint8)

    def put(self, index: int, crop: Tensor) -> None:
        """Write a crop, uint8 [3, h, w], as the sample at `index`."""
        _, height, width = crop.shape
        start, size = self._used, crop.numel()
        self._used += size
        self._make_room(self._used + tail_bytes(self._side))
        rows = self._buffer[start : self._used].numpy().reshape(height, 3 * width)
        rows[:] = crop.permute(1, 2, 0).numpy().reshape(rows.shape)  # torch takes twice as long
        self._places[index] = start, height, width

    def finish(self, valid: Tensor) -> tuple[Tensor, Crops]:
        """Return the buffer, uint8 [bytes], and where its crops are.

        Args:
            valid: bool [count], of the samples; the others become black.
        """
        for index in np.flatnonzero(~valid.numpy()).tolist():
            self.put(index, torch.zeros(3, 1, 1, dtype=torch.uint8))
        end = self._used + tail_bytes(self._side)
        self._buffer[self._used : end] = 0
        self._room.crop_bytes = max(self._room.crop_bytes, -(-self._used // len(valid)))
        return self._buffer[:end], Crops(side=self._side, places=self._places)

    def _make_room(self, size: int) -> None:
        if size > len(self._buffer):
            larger = empty((max(size, 3 * len(self._buffer) // 2),), torch.uint8)
            larger[: len(self._buffer)] = self._buffer
            self._buffer = larger


class FilledBatch:
    """A batch that is being filled with images of one size, in any order."""

    def __init__(self, transform: ImageTransform, count: int, *, finished: bool) -> None:
        self._transform, self._count, self._finished = transform, count, finished
        self._images: Tensor | None = None

    def put(self, index: int, prepared: Tensor) -> None:
        """Write what `ImageTransform.prepare` gave as the sample at `index`."""
        self._transform.put(prepared, self._allocated(prepared)[index])

    def finish(self, valid: Tensor) -> tuple[Tensor, None]:
        """Return the images, [count, 3, size, size] as `ImageTransform.empty_batch` has them.

        Args:
            valid: bool [count], of the samples; the others become zeros.
        """
        images = self._images
        if images is None:
            images = self._allocated(self._transform.prepare(self._transform.blank()))
        images[~valid] = 0
        return images, None

    def _allocated(self, prepared: Tensor) -> Tensor:
        if self._images is None:
            self._images = self._transform.empty_batch(
                self._count, prepared, finished=self._finished
            )
        return self._images
