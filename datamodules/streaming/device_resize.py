"""Resizes the crops of a batch on the device that they lie on, to the pixels that Pillow gives.

Pillow's antialiased bicubic filter, in its two passes, with its rounding: weights are multiples of
2^-22, sums are exact, and after each pass values are rounded to uint8. A pass is a product of
matrices. A weight has two parts there, a high one and a low one of at most 11 bits each, and pixels
have 8: float16 holds both, and sums of their products have at most 24 bits, which float32 holds. So
the pixels do not depend on the device, on the order in which it adds, on TF32, or on what else
is in the batch.

Crops of similar sizes are resized together, padded to the largest of them, in bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL
import torch
from torch import Tensor

from siftclip.datamodules.streaming.crops import Crops, padded_length, taps_of

# Of a group, padding included: resizing it takes some 100 bytes per pixel
GROUP_PIXELS = 1 << 22
_BITS = 22  # of a weight behind the point
_LOW_BITS = 12  # of these in its low part
_HIGH_UNIT = 2.0 ** (_LOW_BITS - _BITS)  # of a high part
_LOW_UNIT = 2.0**-_LOW_BITS  # of a low part, which is given in high units
_TALL_VERTICALLY_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Crops that are resized together."""

    samples: np.ndarray  # int64 [n], their places in the batch
    vertical_first: bool
    height: int  # in pixels, of the padded crops
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """Weights of a pass over images of several lengths."""

    pixels: Tensor  # int64 [lengths, side, taps], which the weights are of
    parts: Tensor  # [lengths, 2, side, taps]: high parts, and low ones in high units


def resize_crops(buffer: Tensor, crops: Crops) -> Tensor:
    """Resize all crops of a batch. The host does not wait for the device.

    Args:
        buffer: uint8 [bytes], of `PackedCrops`, on any device.
        crops: where they are in it.

    Returns:
        uint8 [b, 3, side, side] on the device, channels last in memory.
    """
    device, side = buffer.device, crops.side
    # CUDA multiplies float16 on tensor cores, and adds the products in float32
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    sizes = crops.places[:, 1:]
    groups = group_crops(sizes, side)
    lengths, numbers = np.unique(sizes, return_inverse=True)
    order = np.concatenate([group.samples for group in groups])
    columns = np.column_stack([order, crops.places[order], numbers.reshape(-1, 2)[order]])
    samples = torch.from_numpy(columns).to(device, non_blocking=True)
    images = torch.empty(len(order), side, side, 3, dtype=torch.uint8, device=device)
    with torch.autocast(device.type, enabled=False):  # it would round the weights
        weights = _weights(
            torch.from_numpy(lengths).to(device, non_blocking=True),
            side=side,
            taps=taps_of(int(lengths[-1]), side),
            dtype=dtype,
        )
        of_groups = torch.split(samples, [len(group.samples) for group in groups])
        for group, of_group in zip(groups, of_groups, strict=True):
            index, starts, heights, widths, high, wide = of_group.unbind(1)
            planes = _padded(buffer, starts, heights, widths, group=group)
            down = _matrices(weights, high, group.height)
            across = _matrices(weights, wide, group.width)
            if group.vertical_first:
                planes = _resize_across(_resize_down(planes, down), across)
            else:
                planes = _resize_down(_resize_across(planes, across), down)
            images.index_copy_(0, index, planes.permute(0, 1, 3, 2))
    return images.permute(0, 3, 1, 2)


def vertical_first(heights: np.ndarray, widths: np.ndarray, side: int) -> np.ndarray:
    """Return which images the installed Pillow resizes vertically first, bool [n].

    Those are the ones that lose more than twice as many rows as columns, since Pillow 13.
    """
    if not _TALL_VERTICALLY_FIRST:
        return np.zeros(len(heights), dtype=bool)
    tall: np.ndarray = (heights > side) & (heights - side > 2 * (widths - side))
    return tall


def group_crops(sizes: np.ndarray, side: int) -> list[Group]:
    """Divide crops into groups of similar sizes, of up to GROUP_PIXELS pixels or one crop.

    Args:
        sizes: int64 [b, 2], heights and widths in pixels.
        side: of the images that they become.
    """
    heights, widths = sizes.T
    vertical = vertical_first(heights, widths, side)
    padded = padded_length(sizes, side)
    order = np.lexsort((heights, widths // max(1, side // 4), vertical))
    groups: list[list[int]] = [[]]
    largest = np.zeros(2, dtype=np.int64)
    for sample in order.tolist():
        members = groups[-1]
        largest = np.maximum(largest, padded[sample])
        if members and (
            vertical[sample] != vertical[members[0]]
            or (len(members) + 1) * largest.prod() > GROUP_PIXELS
        ):
            groups.append([])
            largest = padded[sample]
        groups[-1].append(sample)
    return [
        Group(
            samples=np.array(members),
            vertical_first=bool(vertical[members[0]]),
            height=int(padded[members, 0].max()),
            width=int(padded[members, 1].max()),
        )
        for members in groups
    ]


def _weights(lengths: Tensor, *, side: int, taps: int, dtype: torch.dtype) -> _Weights:
    """Compute what each of `side` pixels is made of, in integers.

    The distance of two pixels is d / 2m there, m being the larger of both lengths, and the filter
    times 2 (2m)^3 is an integer, too.

    Args:
        lengths: int64 [n], of images in pixels.
        side: of what they become.
        taps: pixels that the longest of them has a weight for.
        dtype: of the parts.
    """
    device = lengths.device
    length = lengths.view(-1, 1, 1)
    double = 2 * length.clamp(min=side)  # 2m
    place = 2 * torch.arange(side, device=device).view(1, -1, 1) + 1
    first = torch.div(place * length - 2 * double + side, 2 * side, rounding_mode="floor")
    # A window begins within the image and ends there, if the image is longer than a window
    first = first.clamp(min=0).minimum((length - taps).clamp(min=0))
    pixels = first + torch.arange(taps, device=device)
    distance = ((2 * pixels + 1) * side - place * length).abs()
    square, cube = distance**2, distance**3
    near = 3 * cube - 5 * square * double + 2 * double**3
    far = 5 * square * double - cube - 8 * distance * double**2 + 4 * double**3
    filtered = torch.where(distance < double, near, far)
    filtered = torch.where((distance < 2 * double) & (pixels < length), filtered, 0)
    total = filtered.sum(2, keepdim=True)
    # rounded half away from zero, as Pillow rounds
    rounded = filtered.abs() * 2**_BITS + torch.div(total, 2, rounding_mode="floor")
    weight = torch.div(rounded, total, rounding_mode="floor") * filtered.sign()
    high = (weight + 2 ** (_LOW_BITS - 1)).bitwise_right_shift(_LOW_BITS)
    low = weight - high * 2**_LOW_BITS
    parts = torch.stack([high.to(dtype) * _HIGH_UNIT, low.to(dtype) * _LOW_UNIT], dim=1)
    return _Weights(pixels=pixels, parts=parts)


def _matrices(weights: _Weights, numbers: Tensor, length: int) -> Tensor:
    """Write weights into matrices, [n, 2 side, length]: the high parts, below them the low ones.

    `numbers`, int64 [n], are those of the images' lengths.
    """
    parts = weights.parts[numbers]
    pixels = weights.pixels[numbers].unsqueeze(1).expand_as(parts)
    matrices = parts.new_zeros(*parts.shape[:3], length)
    return matrices.scatter_(3, pixels, parts).flatten(1, 2)


def _padded(
    buffer: Tensor, starts: Tensor, heights: Tensor, widths: Tensor, *, group: Group
) -> Tensor:
    """Copy crops out of their buffer: uint8 [n, height, 3, width]; what they lack is anything."""
    rows = torch.arange(group.height, device=buffer.device).minimum(heights[:, None] - 1)
    places = starts[:, None] + 3 * widths[:, None] * rows
    windows = buffer.unfold(0, 3 * group.width, 1)  # a view: one begins at each byte
    read = windows.index_select(0, places.flatten())
    return read.view(len(starts), group.height, group.width, 3).transpose(2, 3)


def _resize_across(planes: Tensor, matrices: Tensor) -> Tensor:
    """Resize rows: uint8 [n, h, 3, w] to [n, h, 3, side]."""
    lines = planes.to(matrices.dtype, memory_format=torch.contiguous_format).flatten(1, 2)
    resized = _rounded(_product(lines, matrices.mT), 2)
    return resized.view(*planes.shape[:3], -1)


def _resize_down(planes: Tensor, matrices: Tensor) -> Tensor:
    """Resize columns: uint8 [n, h, 3, w] to [n, side, 3, w]."""
    lines = planes.to(matrices.dtype, memory_format=torch.contiguous_format).flatten(2)
    resized = _rounded(_product(matrices, lines), 1)
    return resized.view(len(planes), -1, *planes.shape[2:])


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype == torch.float16:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right)


def _rounded(sums: Tensor, dim: int) -> Tensor:
    """Join the sums of high and of low parts along a dimension, and round to uint8, half up.

    What the low ones have below a high unit changes nothing: 1/2 is a multiple of it.
    """
    high, low = sums.chunk(2, dim)
    joined = torch.add(high, low.floor_(), alpha=_HIGH_UNIT)
    return joined.add_(0.5).clamp_(0, 255).to(torch.uint8)
