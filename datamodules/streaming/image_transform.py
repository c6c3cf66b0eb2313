"""open_clip's image transforms, without what costs time and changes nothing.

open_clip gives a torchvision pipeline from an RGB image to a normalised tensor. Here its last
steps, from pixels to normalised floats, are taken off, to be done where the model is, and a copy of
RGB images to RGB is left out: the numbers are the same to the bit. Transforms with other last steps
are left whole: what they give is handed over as floats.

With `resize="torch"` torch's resizing of uint8 takes the place of Pillow's. It computes the same
antialiased bicubic filter with other rounding: 0.4 % of the values differ by 1 of 255, more where
Pillow resizes vertically first, and loading a sample takes half the time (docs/results.md). The
crops are the same.

With `resize="gpu"` images are only cropped here, and `siftclip.datamodules.streaming.device_resize`
gives Pillow's pixels of them where the batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from open_clip.transform import MaybeConvertMode, MaybeToTensor, ResizeKeepRatio
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    RandomResizedCrop,
    Resize,
    ToTensor,
)
from torchvision.transforms.v2 import functional

from siftclip.datamodules.models.load import Transform
from siftclip.datamodules.pool.reader import BadSampleError, decode_image, decode_pixels
from siftclip.datamodules.streaming.crops import (
    MAX_SIDE,
    CropRoom,
    FilledBatch,
    PackedCrops,
    bounded_crop,
)
from siftclip.datamodules.streaming.pixels import Normalization
from siftclip.datamodules.streaming.shared_memory import empty
from siftclip.errors import ParameterError

LoaderResize = Literal["pillow", "torch"]  # in the loader
ResizeBackend = Literal["pillow", "torch", "gpu"]
RESIZE_BACKENDS = ("pillow", "torch", "gpu")
_LONGEST_ASPECT = 100  # of an image that is resized as a whole whatever the limit of pixels


class ImageTransform:
    """From a decoded image into the batch. Picklable if the transform is."""

    def __init__(
        self,
        transform: Transform,
        resize: ResizeBackend = "pillow",
        *,
        channels_last: bool = False,
    ) -> None:
        """Take a transform apart.

        Args:
            transform: RGB image -> float32 [3, size, size].
            resize: `pillow` for open_clip's own pixels, `torch` for the faster ones, `gpu` for
                crops that become open_clip's own pixels on a device.
            channels_last: the layout of finished images in memory.

        Raises:
            InputError: `resize` is unknown, or does not know a step of this transform.
        """
        if resize not in RESIZE_BACKENDS:
            rule = f"must be one of {RESIZE_BACKENDS}"
            raise ParameterError(rule, parameter="resize", value=resize)
        self.transform = transform
        self.channels_last = channels_last
        self.normalization = _last_normalization(transform, channels_last=channels_last)
        self.on_tensors = resize != "pillow"
        self.crops_to: int | None = None  # the side of images that crops become on a device
        self._room = CropRoom()
        steps: Sequence[Any] = ()
        if self.normalization is not None and isinstance(transform, Compose):
            steps = [t for t in transform.transforms[:-2] if not _changes_nothing(t)]
        self._shorter_side = _shorter_side(steps)
        if self.on_tensors:
            if self.normalization is None:
                raise ParameterError(
                    "needs a transform that ends with ToTensor and Normalize, as open_clip's do",
                    parameter="resize",
                    value=resize,
                    way_out="Use pillow.",
                )
            if resize == "gpu":
                self.crops_to = _cropped_side(steps)
                steps = [_RandomCrop(steps[0], self.crops_to)]
            else:
                steps = [_on_tensors(step) for step in steps]
        self.steps = tuple(steps)

    def decode(self, data: bytes, max_image_pixels: int) -> np.ndarray | Image.Image:
        """Decode an image for `prepare`; see `siftclip.datamodules.pool.reader.decode_image`."""
        if self.on_tensors:
            return decode_pixels(data, max_image_pixels)
        return decode_image(data, max_image_pixels)

    def blank(self) -> np.ndarray | Image.Image:
        """Return a black image as `prepare` takes it."""
        image = Image.new("RGB", (8, 8))
        return np.array(image) if self.on_tensors else image

    def require_bounded(
        self, pixels: np.ndarray | Image.Image, max_image_pixels: int, side: int | None = None
    ) -> None:
        """Refuse what `prepare` would blow up: it may make the shorter side that of the model.

        Args:
            pixels: as `prepare` takes them.
            max_image_pixels: of the resized image as well.
            side: of the model's images; None: as the steps say, of which a random crop has none.

        Raises:
            BadSampleError: the resized image would be too large.
        """
        side = self._shorter_side if side is None else side
        if side is None:
            return
        sides = pixels.shape[:2] if isinstance(pixels, np.ndarray) else pixels.size
        limit = max(max_image_pixels, _LONGEST_ASPECT * side**2)
        if side**2 * max(sides) > limit * min(sides):
            raise BadSampleError(
                f"with more pixels than max_image_pixels once its shorter side has {side}"
            )

    def prepare(self, pixels: np.ndarray | Image.Image) -> Tensor:
        """Crop and resize: uint8 [3, size, size], or float32 if the transform is not taken apart.

        With `resize="gpu"`, crop alone: uint8 [3, h, w].

        Args:
            pixels: an RGB image, or uint8 [h, w, 3] unless `resize` is "pillow".
        """
        if self.on_tensors:
            tensor = torch.from_numpy(pixels).permute(2, 0, 1)
            for step in self.steps:
                tensor = step(tensor)
            return tensor
        if self.normalization is None:
            return self.transform(pixels)  # type: ignore[arg-type]  # an image, as said above
        image = pixels
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def filling(self, count: int, *, finished: bool) -> FilledBatch | PackedCrops:
        """Begin a batch of `count` samples; `finished` as in `empty_batch`."""
        if self.crops_to is not None:
            return PackedCrops(count, self.crops_to, self._room)
        return FilledBatch(self, count, finished=finished)

    def empty_batch(self, count: int, prepared: Tensor, *, finished: bool) -> Tensor:
        """Allocate a batch for `put`; in a loader process, in memory shared with the trainer.

        Args:
            count: of its images.
            prepared: the first of them, as `prepare` gives it.
            finished: whether they are to be floats, also where pixels would do.

        Returns:
            uint8 [count, 3, h, w], laid out as images are decoded, channels last, so that nothing
            is rearranged; or float32 [count, *shape], laid out as asked for.
        """
        as_floats = self.normalization is None or finished
        dtype = torch.float32 if as_floats else torch.uint8
        if as_floats and not self.channels_last:
            return empty((count, *prepared.shape), dtype)
        channels, height, width = prepared.shape
        return empty((count, height, width, channels), dtype).permute(0, 3, 1, 2)

    def put(self, prepared: Tensor, out: Tensor) -> None:
        """Write what `prepare` gave into a batch of `empty_batch`: pixels, or finished images."""
        if self.normalization is None or out.dtype == torch.uint8:
            out.copy_(prepared)
        else:
            self.normalization.write(prepared, out)


def _last_normalization(transform: Transform, *, channels_last: bool) -> Normalization | None:
    if not isinstance(transform, Compose) or len(transform.transforms) < 2:
        return None
    to_tensor, normalize = transform.transforms[-2:]
    if type(to_tensor) in (ToTensor, MaybeToTensor) and type(normalize) is Normalize:
        mean, std = (tuple(map(float, values)) for values in (normalize.mean, normalize.std))
        return Normalization(mean=mean, std=std, channels_last=channels_last)
    return None


def _shorter_side(steps: Sequence[Any]) -> int | None:
    """Return the size that the steps give to the shorter side of whole images, if they do."""
    first: Any = next(iter(steps), None)
    if type(first) is ResizeKeepRatio:
        return max(first.size) if first.longest < 1 else None
    size = first.size if type(first) is Resize else None
    if isinstance(size, Sequence):
        return size[0] if len(size) == 1 else None
    return size


def _changes_nothing(step: Any) -> bool:
    return isinstance(step, MaybeConvertMode) and step.mode == "RGB"  # images are RGB already


def _on_tensors(step: Any) -> Callable[[Tensor], Tensor]:
    """Convert a step of a torchvision pipeline to one for uint8 [3, h, w].

    Raises:
        InputError: there is none.
    """
    if type(step) is RandomResizedCrop:
        return _RandomResizedCrop(step)
    if type(step) is Resize:
        return _Resize(step)
    if type(step) is CenterCrop:
        crop: Callable[[Tensor], Tensor] = step  # picks pixels: the same on both
        return crop
    raise ParameterError(
        f"does not know the step {type(step).__name__} of this model's transform",
        parameter="resize",
        value="torch",
        way_out="Use pillow.",
    )


def _cropped_side(steps: Sequence[Any]) -> int:
    """Return the side of the images that a transform's random crops become.

    Raises:
        InputError: it does something else than crop at random and resize to a square.
    """
    step: Any = steps[0] if len(steps) == 1 else None
    if type(step) is RandomResizedCrop and step.interpolation is InterpolationMode.BICUBIC:
        height, width = step.size
        if height == width <= MAX_SIDE:
            return int(height)
    names = ", ".join(type(each).__name__ for each in steps)
    raise ParameterError(
        "needs a transform that crops at random, resizes by bicubic to a square of at most "
        f"{MAX_SIDE} pixels, and does nothing else; this model's has the steps {names}",
        parameter="resize",
        value="gpu",
        way_out="Use torch or pillow.",
    )


class _RandomCrop:
    """The crop of a `RandomResizedCrop`, which draws what that draws."""

    def __init__(self, step: RandomResizedCrop, side: int) -> None:
        self.step, self.side = step, side

    def __call__(self, image: Tensor) -> Tensor:
        step = self.step
        top, left, height, width = step.get_params(image, list(step.scale), list(step.ratio))
        return bounded_crop(image[:, top : top + height, left : left + width], self.side)


class _RandomResizedCrop:
    def __init__(self, step: RandomResizedCrop) -> None:
        self.step = step

    def __call__(self, image: Tensor) -> Tensor:
        step = self.step
        top, left, height, width = step.get_params(image, list(step.scale), list(step.ratio))
        crop: Tensor = functional.resized_crop(
            image, top, left, height, width, list(step.size), step.interpolation, antialias=True
        )
        return crop


class _Resize:
    def __init__(self, step: Resize) -> None:
        self.step = step

    def __call__(self, image: Tensor) -> Tensor:
        size = self.step.size
        resized: Tensor = functional.resize(
            image,
            [size] if isinstance(size, int) else list(size),
            self.step.interpolation,
            max_size=self.step.max_size,
            antialias=True,
        )
        return resized
