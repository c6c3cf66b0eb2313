"""From pixels to what a model takes: open_clip's ToTensor and Normalize, to the bit.

Loaders hand over pixels, uint8, which are a quarter of the bytes of the floats that they become.
They are finished where the model is, by the same lines for training, embedding and evaluation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalization:
    """What a model's images are normalised with."""

    mean: tuple[float, ...]  # of each channel, of values from 0 to 1
    std: tuple[float, ...]
    channels_last: bool = False  # of the images in memory

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch: uint8 [b, 3, h, w] to float32 of the same shape, on its device."""
        images = torch.empty(
            pixels.shape,
            dtype=torch.float32,
            device=pixels.device,
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
        )
        if pixels.device.type == "cpu":  # one by one they stay in the cache
            for image, out in zip(pixels, images, strict=True):
                self.write(image, out)
        else:
            self.write(pixels, images)
        return images

    def write(self, pixels: Tensor, out: Tensor) -> None:
        """Write normalised pixels, uint8 [..., 3, h, w], into float32 of the same shape."""
        levels, mean, std = _constants(self, out.device)
        torch.div(pixels, levels, out=out).sub_(mean).div_(std)


@functools.lru_cache(maxsize=64)
def _constants(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the 255 of ToTensor, mean and std, on a device, where they are copied once.

    255 is a tensor there: CUDA multiplies by the reciprocal of a number, which gives another last
    bit for 126 of the 256 levels, and divides by a tensor.
    """
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
        for values in (normalization.mean, normalization.std)
    )
    return torch.tensor(255, dtype=torch.float32, device=device), mean, std
