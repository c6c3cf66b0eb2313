"""Pixels become what open_clip's transform gives, to the bit, wherever they are finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import Compose, Normalize, ToTensor

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming.batches import SampleDataset, pick
from siftclip.datamodules.streaming.image_transform import ImageTransform
from siftclip.datamodules.streaming.loader import LoaderOptions, make_loader
from siftclip.datamodules.streaming.pixels import Normalization

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LEVELS = np.arange(256, dtype=np.uint8)
# uint8 [16, 16, 3]: each channel has all levels, in its own order
ALL = np.stack([LEVELS, LEVELS[::-1], np.roll(LEVELS, 100)], axis=1).reshape(16, 16, 3)

MakeDataset = Callable[..., SampleDataset]


def as_open_clip(pixels: np.ndarray, mean: Any, std: Any) -> Tensor:
    image: Tensor = Compose([ToTensor(), Normalize(mean, std)])(Image.fromarray(pixels))
    return image


@pytest.mark.parametrize(("mean", "std"), [OPENAI, IMAGENET, HALVES])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_levels_of_all_channels_are_open_clips_to_the_bit(
    mean: Any, std: Any, layout: torch.memory_format
) -> None:
    pixels = torch.from_numpy(np.stack([ALL, ALL[::-1]])).permute(0, 3, 1, 2)
    pixels = pixels.contiguous(memory_format=layout)
    normalization = Normalization(mean=mean, std=std)
    expected = torch.stack([as_open_clip(image, mean, std) for image in (ALL, ALL[::-1].copy())])
    assert torch.equal(normalization(pixels), expected)
    whole = torch.empty(pixels.shape)  # as on other devices
    normalization.write(pixels, whole)
    assert torch.equal(whole, expected)
    assert normalization(pixels).is_contiguous()


def test_a_reciprocal_would_give_other_bits() -> None:
    """Which is how CUDA divides by a number, but not by a tensor that lies on it."""
    levels = torch.arange(256, dtype=torch.float32)
    assert int((levels * (torch.ones(()) / 255) != levels / 255).sum()) == 126


class Divisors(TorchDispatchMode):
    """Notes by what is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.startswith("aten::div"):
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


def test_a_device_divides_by_tensors_of_its_own_alone() -> None:
    pixels = torch.empty(2, 3, 4, 4, dtype=torch.uint8, device="meta")
    with Divisors() as divisors:
        images = Normalization(mean=OPENAI[0], std=OPENAI[1])(pixels)
    assert (images.dtype, images.device.type) == (torch.float32, "meta")
    assert len(divisors.found) == 2
    assert all(divisor.device.type == "meta" for divisor in divisors.found)


@pytest.fixture
def pool(make_samples: Any, write_pool: Any, load_pool: Callable[..., Pool]) -> Pool:
    return load_pool(write_pool(make_samples(12), shards=2))


REQUESTS = [(position, row) for position, row in enumerate((3, 1, 11, 1))]


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_hands_over_pixels_that_finish_as_they_would_there(
    pool: Pool, make_dataset: MakeDataset, workers: int
) -> None:
    dataset = make_dataset(pool)
    options = LoaderOptions(num_workers=workers)
    (batch,) = make_loader(dataset, [REQUESTS], options, pin_memory=False)  # type: ignore[arg-type]  # a sampler
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)  # as decoded
    dataset.finished = True
    expected = dataset.__getitems__(REQUESTS)
    assert expected.images.dtype == torch.float32
    assert expected.normalization is None
    assert expected.finished() is expected
    assert torch.equal(batch.finished().images, expected.images)
    assert batch.finished().rows.tolist() == expected.rows.tolist()


def test_other_transforms_hand_over_what_they_give(pool: Pool, tokenizer: Any) -> None:
    def transform(image: Image.Image) -> Tensor:
        return torch.full((3, 4, 4), image.width / 7)

    reader = SampleDataset(
        reader=SampleReader(pool=pool, max_image_pixels=10_000),
        transform=transform,
        tokenizer=tokenizer,
        seed=0,
        substitutes=None,
    )
    batch = reader.__getitems__(REQUESTS)
    assert batch.images.dtype == torch.float32
    assert batch.finished() is batch


def test_what_is_picked_of_pixels_is_still_to_be_finished(
    pool: Pool, make_dataset: MakeDataset
) -> None:
    dataset = make_dataset(pool)
    parts = [dataset.__getitems__(REQUESTS), dataset.__getitems__(REQUESTS[::-1])]
    chosen = pick(parts, torch.tensor([1, 2, 5]))
    assert chosen.images.dtype == torch.uint8
    assert chosen.images.is_contiguous(memory_format=torch.channels_last)
    expected = torch.cat([part.finished().images for part in parts])[[1, 2, 5]]
    assert torch.equal(chosen.finished().images, expected)


@pytest.mark.parametrize("finished", [True, False])
def test_channels_last_is_a_layout_of_the_same_images(
    pool: Pool, make_dataset: MakeDataset, finished: bool
) -> None:
    dataset = make_dataset(pool)
    expected = dataset.__getitems__(REQUESTS).finished().images
    other = replace(dataset, channels_last=True, finished=finished)
    images = other.__getitems__(REQUESTS).finished().images
    assert expected.is_contiguous()
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, expected)


def test_put_writes_pixels_or_floats_as_the_batch_is() -> None:
    transform = ImageTransform(image_transform_v2(PreprocessCfg(size=16), is_train=False))
    prepared = transform.prepare(Image.fromarray(ALL))
    (pixels,) = transform.empty_batch(1, prepared, finished=False)
    (floats,) = transform.empty_batch(1, prepared, finished=True)
    transform.put(prepared, pixels)
    transform.put(prepared, floats)
    assert torch.equal(pixels, torch.from_numpy(ALL).permute(2, 0, 1))
    assert torch.equal(floats, as_open_clip(ALL, *OPENAI))
