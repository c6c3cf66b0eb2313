"""Crops get on a GPU the pixels that Pillow gives, to the bit, and open_clip's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from siftclip.datamodules.streaming.batches import Batch, StepBatch
from siftclip.datamodules.streaming.crops import MOST_SHRINK, CropRoom, PackedCrops
from siftclip.datamodules.streaming.device_copies import on_device
from siftclip.datamodules.streaming.pixels import Normalization

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("side", [32, 224])
def test_crops_are_resized_and_finished_to_the_bit(
    side: int, tf32: bool, device: torch.device
) -> None:
    generator = np.random.default_rng(0)
    sizes = [(side, side), *generator.integers(1, MOST_SHRINK * side + 1, (40, 2)).tolist()]
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    packed = PackedCrops(len(images), side, CropRoom())
    for index, image in enumerate(images):
        packed.put(index, torch.from_numpy(image).permute(2, 0, 1))
    valid = torch.ones(len(images), dtype=torch.bool)
    buffer, crops = packed.finish(valid)
    batch = Batch(
        images=buffer,
        tokens=torch.zeros(len(images), 1, dtype=torch.int64),
        rows=torch.arange(len(images)),
        valid=valid,
        crops=crops,
        normalization=Normalization(mean=MEAN, std=STD),
    )
    if device.type == "cuda":
        batch = batch.pin_memory()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        (step,) = on_device([StepBatch([batch])], device)
        step.resize()
    finally:
        torch.set_float32_matmul_precision(before)
    (part,) = step.micro_batches
    found = part.finished().images.cpu()
    as_open_clip = Compose([ToTensor(), Normalize(MEAN, STD)])
    for image, ours in zip(images, found, strict=True):
        theirs = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        assert torch.equal(ours, as_open_clip(theirs)), image.shape
