"""Clocks, peaks of the device, and the model that is measured."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from training_step import SMALL

from gpu_checks.harness import Setup
from siftclip.datamodules.models.load import ClipModel, load_clip_model, save_model_folder
from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.online.flops import input_sizes

# Dense bf16 products of the chips, in TFLOP/s, as the maker states them.
NOISE = 256  # images of noise that are drawn; others are those in another contrast
STATED_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0}


def stated_tflops(setup: Setup) -> float | None:
    """The stated peak of this GPU; None if it is not known here."""
    name = torch.cuda.get_device_name() if setup.on_gpu else ""
    return next((peak for chip, peak in STATED_TFLOPS.items() if chip in name), None)


def seconds_of(setup: Setup, function: Callable[[], object], *, repeats: int = 3) -> float:
    """The median of some calls, after one that is not timed, the device waited for."""
    taken = []
    for _ in range(1 + repeats):
        setup.synchronize()
        start = time.perf_counter()
        function()
        setup.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def gemm_tflops(setup: Setup, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """What a square matrix product of normal numbers reaches here."""
    size = setup.size(8192, 512)
    left, right = torch.randn(2, size, size, device=setup.device).to(dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        seconds = seconds_of(setup, lambda: left @ right, repeats=5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / seconds / 1e12


def step_options(setup: Setup, *, compiled: bool) -> argparse.Namespace:
    """What training_step.py takes: bf16, and on a CPU fp32 and a compiler of no code."""
    return argparse.Namespace(
        device=setup.device.type,
        precision="bf16-mixed" if setup.on_gpu else "32-true",
        compile=compiled,
        backend="inductor" if setup.on_gpu else "eager",
    )


def clip_model(setup: Setup) -> ClipModel:
    """ViT-B/32 with random weights; a small one where the check is tiny."""
    torch.manual_seed(0)
    if setup.tiny:
        return load_clip_model("small", architecture=SMALL)
    return load_clip_model("ViT-B-32")


def model_folder(setup: Setup) -> Path:
    """The model in a folder, for commands."""
    folder = setup.work / "model"
    if not folder.exists():
        save_model_folder(clip_model(setup), folder)
    return folder


def noise_batch(setup: Setup, clip: ClipModel, samples: int, *, seed: int = 0) -> Batch:
    """Noise and captions of full length in page-locked memory; drawn noise is used repeatedly."""
    generator = torch.Generator().manual_seed(seed)
    sizes = input_sizes(clip)
    side, length = sizes["image_size"], sizes["context_length"]
    height, width = (side, side) if isinstance(side, int) else side
    tokens = torch.randint(1, 49406, (samples, length), generator=generator)
    tokens[:, -1] = 49407
    drawn = torch.randn(min(samples, NOISE), 3, height, width, generator=generator)
    images = drawn.repeat(-(-samples // len(drawn)), 1, 1, 1)[:samples]
    batch = Batch(
        images=images.mul_(torch.linspace(0.5, 1.5, samples)[:, None, None, None]),
        tokens=tokens,
        rows=torch.arange(samples),
        valid=torch.ones(samples, dtype=torch.bool),
    )
    return batch.pin_memory() if setup.on_gpu else batch


def cut(batch: Batch, size: int) -> list[Batch]:
    """Pieces of so many samples."""
    return [
        batch._map(lambda tensor, at=at: tensor[at : at + size])  # type: ignore[misc]
        for at in range(0, len(batch.rows), size)
    ]
