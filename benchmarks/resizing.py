"""Compare the ways of resizing, `data.resize`: pixels against Pillow's, and what a loader reaches.

    python benchmarks/resizing.py POOL --samples 1024 --rounds 5

Pixels: crops of the sizes that open_clip's train transform takes of images up to 512 pixels, and of
any size from a quarter of 224 pixels to four times as many, of photographs and of noise, resized to
224. `torch` does so in a loader; `gpu` on a device, here the CPU, in one batch.

Rates: one loader process, one thread, batches of 256 of a pool of make_pool.py with open_clip's
train transform. The ways take turns, and the first batch of a turn does not count. What the device
does for `gpu` is not in them: nothing is resized there but in `resized on the CPU`.
"""

import argparse
import time
from pathlib import Path
from typing import get_args

import numpy as np
import open_clip
import torch
from common import BATCH, describe_machine, open_benchmark_pool, table
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import InterpolationMode, functional

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming.batches import SampleDataset
from siftclip.datamodules.streaming.crops import CropRoom, PackedCrops
from siftclip.datamodules.streaming.datamodule import OrderSampler
from siftclip.datamodules.streaming.device_resize import resize_crops
from siftclip.datamodules.streaming.image_transform import ResizeBackend
from siftclip.datamodules.streaming.loader import LoaderOptions, make_loader
from siftclip.datamodules.streaming.order import SampleOrder

SIDE = 224
WAYS: tuple[ResizeBackend, ...] = get_args(ResizeBackend)


def crops(kind: str, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Crops of photographs, or noise, uint8 [h, w, 3]."""
    photographs = [load_sample_image(name).copy() for name in ("china.jpg", "flower.jpg")]
    made = []
    for _ in range(count):
        if kind == "noise, any size":
            height, width = generator.integers(SIDE // 4, 4 * SIDE + 1, 2)
            made.append(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
            continue
        largest = np.array([427, 512]) if kind == "photographs, train crops" else [427, 640]
        least = 280 if kind == "photographs, train crops" else SIDE // 4
        height, width = (int(generator.integers(least, most + 1)) for most in largest)
        top, left = generator.integers(0, 428 - height), generator.integers(0, 641 - width)
        photograph = photographs[int(generator.integers(2))]
        made.append(np.ascontiguousarray(photograph[top : top + height, left : left + width]))
    return made


def by_torch(image: np.ndarray) -> np.ndarray:
    planes = torch.from_numpy(image).permute(2, 0, 1)
    resized = functional.resize(planes, [SIDE, SIDE], InterpolationMode.BICUBIC, antialias=True)
    return resized.permute(1, 2, 0).numpy()


def by_device(images: list[np.ndarray]) -> np.ndarray:
    packed = PackedCrops(len(images), SIDE, CropRoom())
    for index, image in enumerate(images):
        packed.put(index, torch.from_numpy(image).permute(2, 0, 1))
    buffer, places = packed.finish(torch.ones(len(images), dtype=torch.bool))
    return resize_crops(buffer, places).permute(0, 2, 3, 1).numpy()


def compare_pixels(count: int) -> str:
    """Shares of values that differ from Pillow's, and by how much, as a markdown table."""
    lines = ["| crops | way | values | differ | largest |", "|---|---|---:|---:|---:|"]
    generator = np.random.default_rng(0)
    for kind in ("photographs, train crops", "photographs, any size", "noise, any size"):
        images = crops(kind, count, generator)
        size, bicubic = (SIDE, SIDE), Image.Resampling.BICUBIC
        expected = np.stack([Image.fromarray(image).resize(size, bicubic) for image in images])
        for way, found in (
            ("torch", np.stack([by_torch(image) for image in images])),
            ("gpu", by_device(images)),
        ):
            difference = np.abs(found.astype(np.int16) - expected)
            share = (difference > 0).mean()
            lines.append(
                f"| {kind} | `{way}` | {difference.size:,} | {share:.4%} | {difference.max()} |"
            )
    return "\n".join(lines)


def time_loading(pool: Pool, samples: int, rounds: int) -> str:
    """Samples per second of a loader process, by way, and bytes of a sample."""
    rows = np.arange(len(pool))
    order = SampleOrder(rows=rows, seed=0, global_batch=BATCH)
    steps = 1 + -(-samples // BATCH)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds["resized on the CPU"] = []
    sizes: dict[str, float] = {}
    for turn in range(rounds):
        for way in WAYS:
            dataset = SampleDataset(
                reader=SampleReader(pool=pool, max_image_pixels=10**8),
                transform=image_transform_v2(PreprocessCfg(size=SIDE), is_train=True),
                tokenizer=open_clip.get_tokenizer("ViT-B-32"),
                seed=0,
                substitutes=rows,
                resize=way,
            )
            sampler = OrderSampler(
                order=order,
                global_batch=BATCH,
                start_step=turn * steps,
                total_steps=(turn + 1) * steps,
                rank=0,
                world_size=1,
            )
            options = LoaderOptions(num_workers=1)
            batches = iter(make_loader(dataset, sampler, options, pin_memory=False))
            batch = next(batches)
            start = time.perf_counter()
            for batch in batches:
                sizes[way] = batch.images.nbytes / len(batch.rows)
            seconds[way].append((time.perf_counter() - start) / (steps - 1) / BATCH)
            if batch.crops is not None:
                start = time.perf_counter()
                batch.resized()
                seconds["resized on the CPU"].append((time.perf_counter() - start) / BATCH)
    bytes_of = ", ".join(f"{way} {size / 1e3:.1f}" for way, size in sizes.items())
    spread = ", ".join(
        f"{way} {1e6 * min(taken):.0f} to {1e6 * max(taken):.0f}" for way, taken in seconds.items()
    )
    return f"{table(seconds, 'pillow')}\n\nkB a sample: {bytes_of}\n\nus a sample: {spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--crops", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_machine()}\n\n{compare_pixels(options.crops)}\n")
    print(time_loading(open_benchmark_pool(options.pool), options.samples, options.rounds))


if __name__ == "__main__":
    main()
