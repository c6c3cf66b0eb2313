"""Crops that a device resizes get Pillow's pixels, to the bit, in whatever company they come."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from simulated_cuda import GPU, MIX, WAIT, simulated_cuda
from torch import Tensor

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming import datamodule, device_resize
from siftclip.datamodules.streaming.batches import Batch, SampleDataset, StepBatch
from siftclip.datamodules.streaming.crops import (
    MOST_SHRINK,
    CropRoom,
    Crops,
    PackedCrops,
    bounded_crop,
)
from siftclip.datamodules.streaming.datamodule import (
    OrderSampler,
    SelectionVersion,
    StepLoader,
    StreamDataModule,
    resize_for,
)
from siftclip.datamodules.streaming.device_resize import (
    group_crops,
    resize_crops,
    vertical_first,
)
from siftclip.datamodules.streaming.image_transform import ImageTransform
from siftclip.datamodules.streaming.loader import LoaderOptions, make_loader
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.errors import InputError

Size = tuple[int, int]  # height, width
SIDES = [1, 3, 16, 30, 64, 224]


def noise(size: Size, seed: int = 0, *, extremes: bool = False) -> np.ndarray:
    """uint8 [h, w, 3]; or of 0 and 255 alone, whose filtered values leave the range of uint8."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return np.where(pixels > 127, 255, 0).astype(np.uint8) if extremes else pixels


def by_pillow(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def packed(images: Sequence[np.ndarray], side: int) -> tuple[Tensor, Crops]:
    batch = PackedCrops(len(images), side, CropRoom())
    for index in np.random.default_rng(1).permutation(len(images)).tolist():
        batch.put(index, torch.from_numpy(images[index]).permute(2, 0, 1))
    return batch.finish(torch.ones(len(images), dtype=torch.bool))


def by_device(images: Sequence[np.ndarray], side: int) -> list[np.ndarray]:
    resized = resize_crops(*packed(images, side))
    assert resized.shape == (len(images), 3, side, side)
    assert resized.is_contiguous(memory_format=torch.channels_last)
    return [*resized.permute(0, 2, 3, 1).numpy()]


# ---- the pixels ---------------------------------------------------------------------------------
@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[np.ndarray]]:
    side = draw(st.sampled_from(SIDES))
    lengths = st.integers(1, MOST_SHRINK * side)
    sizes = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=6))
    extremes, seed = draw(st.booleans()), draw(st.integers(0, 2**32))
    return side, [noise(size, seed + i, extremes=extremes) for i, size in enumerate(sizes)]


@settings(max_examples=60, deadline=None)
@given(batches())
def test_pixels_are_pillows_to_the_bit(batch: tuple[int, list[np.ndarray]]) -> None:
    side, images = batch
    for resized, image in zip(by_device(images, side), images, strict=True):
        assert np.array_equal(resized, by_pillow(image, side)), image.shape


@pytest.mark.parametrize("side", [16, 224])
@pytest.mark.parametrize("shrinks", [1 / 16, 0.5, 1, 1.25, 2, 3, MOST_SHRINK])
def test_special_ratios_are_pillows_to_the_bit(side: int, shrinks: float) -> None:
    """Ratios whose weights, and sums, lie in the middle between two values."""
    length = max(1, round(side * shrinks))
    images = [noise(size) for size in ((length, length), (length, side), (side, length))]
    for resized, image in zip(by_device(images, side), images, strict=True):
        assert np.array_equal(resized, by_pillow(image, side))


@pytest.mark.parametrize("tall_first", [True, False])
def test_versions_of_pillow_differ_in_the_order_of_passes(
    tall_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_resize, "_TALL_VERTICALLY_FIRST", tall_first)
    side, bicubic = 32, Image.Resampling.BICUBIC
    image = noise((100, 40), extremes=True)
    first = (40, side) if tall_first else (side, 100)
    expected = Image.fromarray(image).resize(first, bicubic).resize((side, side), bicubic)
    assert np.array_equal(by_device([image], side)[0], np.asarray(expected))
    sizes = np.array([(100, 40), (100, 66), (32, 3), (40, 32), (300, 300), (3, 100)])
    found = vertical_first(*sizes.T, side).tolist()
    assert found == ([True, False, False, True, False, False] if tall_first else [False] * 6)


@pytest.mark.parametrize("side", [*SIDES, 1024])
def test_sums_are_exact_in_any_order(side: int) -> None:
    """float16 holds the parts, and float32 all that they add up to."""
    lengths = np.unique(np.geomspace(1, MOST_SHRINK * side, 40).astype(np.int64))
    taps = device_resize.taps_of(int(lengths[-1]), side)
    found = device_resize._weights(
        torch.from_numpy(lengths), side=side, taps=taps, dtype=torch.float64
    )
    assert torch.equal(found.parts, found.parts.half().double())
    integers = found.parts * torch.tensor([2**10, 2**12]).view(1, 2, 1, 1)
    assert torch.equal(integers, integers.round())
    assert float(255 * integers.abs().sum(3).max()) < 2**24
    high, low = integers.unbind(1)
    weights = high * 2**12 + low
    assert float((weights.sum(2) - 2**22).abs().max()) <= taps / 2  # each is rounded


@pytest.mark.parametrize("most", [1, 40 * 40 * 2, 1 << 22])
def test_groups_change_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    images = [noise((int(h), int(w))) for h, w in generator.integers(1, 128, (20, 2))]
    expected = by_device(images, 32)
    monkeypatch.setattr(device_resize, "GROUP_PIXELS", most)
    assert np.array_equal(by_device(images, 32), expected)
    groups = group_crops(np.array([image.shape[:2] for image in images]), 32)
    assert sorted(np.concatenate([group.samples for group in groups]).tolist()) == [*range(20)]
    for group in groups:
        pixels = len(group.samples) * group.height * group.width
        assert pixels <= most or len(group.samples) == 1
        for sample in group.samples.tolist():
            height, width, _ = images[sample].shape
            assert (height <= group.height, width <= group.width) == (True, True)


def test_a_simulated_gpu_gives_the_same_bits_and_is_not_waited_for() -> None:
    """In float16, with padded crops, of both orders of passes, under autocast."""
    generator = np.random.default_rng(4)
    images = [noise((int(h), int(w))) for h, w in generator.integers(1, 128, (20, 2))]
    buffer, crops = packed(images, 32)
    expected = resize_crops(buffer, crops)
    with simulated_cuda() as events:
        sent = buffer.to(GPU, non_blocking=True)
        events.clear()
        with torch.autocast("cuda", torch.bfloat16):
            resized = resize_crops(sent, crops)
        assert (events.of(WAIT), events.of(MIX)) == ({}, {})
        assert resized.is_cuda
        found = resized.cpu()
    assert torch.equal(found, expected)


# ---- packing ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "stays"), [((64, 64), True), ((65, 9), False), ((9, 65), False)])
def test_crops_too_large_for_the_device_are_resized_here(size: Size, stays: bool) -> None:
    image = noise(size)
    crop = bounded_crop(torch.from_numpy(image).permute(2, 0, 1), 16)
    expected = image if stays else by_pillow(image, 16)
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)


def test_crops_of_extreme_height_are_resized_here() -> None:
    image = noise((201, 2))
    crop = bounded_crop(torch.from_numpy(image).permute(2, 0, 1), 64)
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), by_pillow(image, 64))


def test_a_packed_batch_holds_its_crops_and_little_else() -> None:
    images = [noise((60 - i, 7 + i), i) for i in range(30)]  # more than the buffer begins with
    buffer, crops = packed(images, 16)
    size = sum(image.size for image in images)
    assert len(buffer) == size + 3 * MOST_SHRINK * 16
    for image, (start, height, width) in zip(images, crops.places.tolist(), strict=True):
        crop = buffer[start : start + image.size].view(height, width, 3)
        assert np.array_equal(crop.numpy(), image)


def test_buffers_begin_as_large_as_those_before_became() -> None:
    room = CropRoom()
    crop = torch.zeros(3, 50, 60, dtype=torch.uint8)
    grown = []
    for _ in range(2):
        batch = PackedCrops(4, 16, room)
        before = batch._buffer
        for index in range(4):
            batch.put(index, crop)
        batch.finish(torch.ones(4, dtype=torch.bool))
        grown.append(batch._buffer is not before)
    assert (grown, room.crop_bytes) == ([True, False], 3 * 50 * 60)


def test_samples_that_are_missing_are_black() -> None:
    batch = PackedCrops(3, 16, CropRoom())
    batch.put(1, torch.full((3, 5, 9), 200, dtype=torch.uint8))
    images = resize_crops(*batch.finish(torch.tensor([False, True, False])))
    assert images.flatten(1).float().mean(1).tolist() == [0, 200, 0]


# ---- the transform ------------------------------------------------------------------------------
def train_transform(size: int = 16, **augmentation: Any) -> Any:
    config = AugmentationCfg(scale=(0.2, 1.0), **augmentation)
    return image_transform_v2(PreprocessCfg(size=size), is_train=True, aug_cfg=config)


@pytest.mark.parametrize("size", [(40, 30), (300, 200), (64, 500)])
def test_crops_and_pixels_are_open_clips(size: Size) -> None:
    transform = train_transform()
    images = ImageTransform(transform, "gpu")
    batch = images.filling(8, finished=False)
    expected = []
    for seed in range(8):
        image = noise(size, seed)
        for run in (transform, lambda image: batch.put(seed, images.prepare(np.array(image)))):  # noqa: B023
            torch.manual_seed(seed)
            random.seed(seed)
            made = run(Image.fromarray(image))
            expected += [] if made is None else [made]
    buffer, crops = batch.finish(torch.ones(8, dtype=torch.bool))
    assert crops is not None
    assert images.normalization is not None
    assert torch.equal(images.normalization(resize_crops(buffer, crops)), torch.stack(expected))


def test_transforms_that_do_something_else_are_refused() -> None:
    way_out = r"has the steps .*\. Got 'gpu'\. Use torch or pillow"
    evaluation = image_transform_v2(PreprocessCfg(size=16), is_train=False)
    with pytest.raises(InputError, match=rf"crops at random.* Resize, CenterCrop.*|{way_out}"):
        ImageTransform(evaluation, "gpu")
    for other in (
        train_transform(size=1025),
        train_transform(size=(16, 20)),  # type: ignore[arg-type]  # open_clip takes both
    ):
        with pytest.raises(InputError, match="RandomResizedCrop"):
            ImageTransform(other, "gpu")
    with pytest.raises(InputError, match="ends with ToTensor and Normalize"):
        ImageTransform(lambda image: torch.zeros(3, 4, 4), "gpu")


# ---- loading ------------------------------------------------------------------------------------
@pytest.fixture
def pool(make_samples: Any, write_pool: Any, load_pool: Any) -> Pool:
    return load_pool(write_pool(make_samples(20), shards=3))  # type: ignore[no-any-return]


@pytest.fixture
def dataset(pool: Pool, tokenizer: Any) -> SampleDataset:
    """With `gpu`."""
    return SampleDataset(
        reader=SampleReader(pool=pool, max_image_pixels=10_000),
        transform=train_transform(),
        tokenizer=tokenizer,
        seed=7,
        substitutes=np.arange(len(pool)),
        resize="gpu",
    )


def steps_of(
    dataset: SampleDataset, *, workers: int = 0, start: int = 0, parts: int = 1, rank: int = 0,
    ranks: int = 1, device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Iterator[StepBatch]:  # fmt: skip
    """Five steps of eight samples, on a device that resizes."""
    rows = np.arange(20)

    def open_loader(version: SelectionVersion, step: int) -> Any:
        sampler = OrderSampler(
            order=SampleOrder(rows=rows, seed=7, global_batch=8), global_batch=8,
            start_step=step, total_steps=5, rank=rank, world_size=ranks,
            micro_batch=8 // ranks // parts,
        )  # fmt: skip
        options = LoaderOptions(num_workers=workers)
        return make_loader(dataset, sampler, options, pin_memory=False), sampler

    version = SelectionVersion(number=0, rows=rows, start_step=0, stop_step=5)
    return iter(
        StepLoader(
            open_loader, lambda step: version, start_step=start, total_steps=5, device=device
        )
    )


def images_of(steps: Iterator[StepBatch]) -> list[Tensor]:
    return [torch.cat([part.images for part in step.micro_batches]) for step in steps]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("parts", [1, 4])
def test_workers_parts_and_a_start_in_the_middle_change_no_pixel(
    dataset: SampleDataset, workers: int, parts: int
) -> None:
    expected = images_of(steps_of(replace(dataset, resize="pillow")))
    found = images_of(steps_of(dataset, workers=workers, parts=parts))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    rest = images_of(steps_of(dataset, workers=workers, parts=parts, start=3))
    assert torch.equal(torch.stack(rest), torch.stack(expected[3:]))


def test_ranks_change_no_pixel(dataset: SampleDataset) -> None:
    expected = images_of(steps_of(replace(dataset, resize="pillow")))
    ranks = [images_of(steps_of(dataset, rank=rank, ranks=2)) for rank in range(2)]
    for step, whole in enumerate(expected):
        assert torch.equal(torch.cat([ranks[0][step], ranks[1][step]]), whole)


def test_crops_are_given_up_once_they_are_resized(dataset: SampleDataset) -> None:
    batch = dataset.__getitems__([(0, 3), (1, 5)])
    assert (batch.images.ndim, batch.images.dtype) == (1, torch.uint8)
    step = StepBatch([batch])
    step.resize()
    (resized,) = step.micro_batches
    assert (resized.images.shape, resized.crops) == ((2, 3, 16, 16), None)
    assert resized.resized() is resized
    assert torch.equal(batch.finished().images, resized.finished().images)
    assert batch.finished().crops is None


def test_a_step_arrives_on_a_simulated_gpu_without_waiting(dataset: SampleDataset) -> None:
    expected = images_of(steps_of(dataset))
    with simulated_cuda() as events:
        found = []
        for step in steps_of(dataset, device=GPU, parts=2):
            assert step.device == GPU
            assert (events.of(WAIT), events.of(MIX)) == ({}, {})
            found.append(torch.cat([part.images for part in step.micro_batches]).cpu())
            events.clear()
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("substitutes", [None, "all"])
def test_bad_samples_are_black_or_replaced(
    dataset: SampleDataset, substitutes: str | None, make_samples: Any, write_pool: Any,
    load_pool: Any,
) -> None:  # fmt: skip
    samples = make_samples(20)
    samples[3].image = b"no picture"
    reader = SampleReader(pool=load_pool(write_pool(samples)), max_image_pixels=10_000)
    rows = None if substitutes is None else np.arange(20)
    requests = [(0, 3), (1, 5)]
    mixed = replace(dataset, reader=reader, substitutes=rows)
    batch, other = mixed.__getitems__(requests), replace(mixed, resize="pillow")
    expected = other.__getitems__(requests)
    assert torch.equal(batch.resized().images, expected.images)
    assert batch.valid.tolist() == expected.valid.tolist()
    assert len(batch.faults) == 1


def test_finished_images_are_refused(dataset: SampleDataset) -> None:
    with pytest.raises(InputError, match=r"resize hands over crops.*Got 'gpu'.*torch or pillow"):
        replace(dataset, finished=True)


# ---- which devices resize -----------------------------------------------------------------------
def test_loaders_resize_for_devices_that_do_not(
    pool: Pool, dataset: SampleDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, cpu, mps = (torch.device(name) for name in ("cuda", "cpu", "mps"))
    assert [resize_for(device, "gpu") for device in (cuda, cpu, mps)] == ["gpu", "pillow", "pillow"]
    assert [resize_for(device, "torch") for device in (cuda, cpu)] == ["torch", "torch"]
    module = StreamDataModule(
        pool=pool, rows=np.arange(20), transform=dataset.transform, tokenizer=dataset.tokenizer,
        seed=7, global_batch_size=8, total_steps=2, loader=LoaderOptions(num_workers=0),
        max_image_pixels=10_000, max_bad_fraction=0, resize="gpu",
    )  # fmt: skip
    module.trainer = SimpleNamespace(  # type: ignore[assignment]  # what the module asks of it
        global_rank=0, world_size=1, global_step=0, strategy=SimpleNamespace(root_device=cpu)
    )
    seen: list[bool] = []
    resize = StepBatch.resize

    def note(batch: StepBatch) -> None:
        seen.append(batch.micro_batches[0].crops is not None)
        resize(batch)

    monkeypatch.setattr(StepBatch, "resize", note)
    by_loader = images_of(module.train_dataloader())  # type: ignore[arg-type]  # an iterable
    monkeypatch.setattr(datamodule, "RESIZING_DEVICES", ("cpu",))
    by_trainer = images_of(module.train_dataloader())  # type: ignore[arg-type]
    assert seen == [False, False, True, True]
    assert torch.equal(torch.stack(by_loader), torch.stack(by_trainer))
    assert isinstance(dataset.__getitems__([(0, 1)]), Batch)
