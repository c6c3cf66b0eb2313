"""Time how a loader process hands over images of 224 pixels: as pixels, uint8, or as float32.

    python benchmarks/handing_over.py --batches 12 --rounds 7

The process does nothing but fill batches with an image that is ready, so that what is compared is
filling shared memory and handing it over; the training process copies each batch once, as the
thread does that puts it into page-locked memory. One process, one thread each; the two ways take
turns, and the first batch of a turn, in which the process starts, does not count.

`fill` and `copy` are seconds of CPU, `handed over` is what arrives by the clock. `finish` is what
the training process adds to pixels where the CPU computes. Both ways end in the same floats, which
is checked to the bit.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from common import BATCH, describe_machine, table
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from siftclip.datamodules.streaming.image_transform import ImageTransform

SIZE = 224
WAYS = {"float32": True, "uint8": False}  # whether images are finished in the loader process


class Filled(Dataset[tuple[Tensor, float]]):
    """Batches of one prepared image, and the seconds of CPU that filling them took."""

    def __init__(self, images: ImageTransform, prepared: Tensor, *, finished: bool) -> None:
        self.images, self.prepared, self.finished = images, prepared, finished

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, float]:
        start = time.thread_time()
        batch = self.images.empty_batch(len(rows), self.prepared, finished=self.finished)
        for out in batch:
            self.images.put(self.prepared, out)
        return batch, time.thread_time() - start


def as_it_is(batch: tuple[Tensor, float]) -> tuple[Tensor, float]:
    """Collate nothing."""
    return batch


def batches_of(count: int) -> Iterator[range]:
    return itertools.repeat(range(BATCH), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = ImageTransform(image_transform_v2(PreprocessCfg(size=SIZE), is_train=False))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    prepared = images.prepare(Image.fromarray(pixels.numpy()))
    measured: dict[str, dict[str, list[float]]] = {
        what: {way: [] for way in WAYS} for what in ("handed over", "fill", "copy")
    }
    finishing: list[float] = []
    last: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        for way, finished in WAYS.items():
            loader = iter(
                DataLoader(
                    Filled(images, prepared, finished=finished),
                    batch_sampler=list(batches_of(options.batches + 1)),
                    collate_fn=as_it_is,
                    num_workers=1,
                )
            )
            batch, _ = next(loader)
            target = torch.empty_like(batch)
            fill = copy = 0.0
            start = time.perf_counter()
            for batch, seconds in loader:
                fill += seconds
                mark = time.thread_time()
                target.copy_(batch)
                copy += time.thread_time() - mark
            samples = options.batches * BATCH
            seconds_of = {"handed over": time.perf_counter() - start, "fill": fill, "copy": copy}
            for what, taken in seconds_of.items():
                measured[what][way].append(taken / samples)
            last[way] = target
        assert images.normalization is not None
        mark = time.thread_time()
        floats = images.normalization(last["uint8"])
        finishing.append((time.thread_time() - mark) / BATCH)
        if not torch.equal(floats, last["float32"]):
            raise SystemExit("the two ways differ")
    print(f"{describe_machine()}\n{options.rounds} rounds of {options.batches} x {BATCH} images\n")
    for what, seconds in measured.items():
        print(f"{what}\n\n{table(seconds, 'float32')}\n")
    print(f"finish: {1e6 * statistics.median(finishing):.1f} us a sample; the same floats")


if __name__ == "__main__":
    main()
