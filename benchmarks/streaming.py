"""Selected samples per second, side by side with what a user would pick instead.

    python benchmarks/tools/make_pool.py POOL
    python benchmarks/streaming.py POOL

Per keep fraction: (a) webdataset over the pool with a filter on the uid, (b) webdataset over tars
that hold the selection alone (writing them is not counted, but printed), (c) open_clip's pipeline
over the same tars, and siftclip over the original tars. First the bytes alone, in one process;
then batches ready to train on, with the same transform, tokenizer and workers.
"""

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from common import (
    BATCH,
    alternate,
    choose,
    describe_machine,
    open_benchmark_pool,
    table,
    window_order,
)
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train import data
from peers import (
    image_decode,
    loader,
    open_clip_pipeline,
    reshard,
    webdataset_pairs,
)

from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming.batches import SampleDataset
from siftclip.datamodules.streaming.datamodule import LoaderOptions, OrderSampler, make_loader
from siftclip.datamodules.streaming.order import SampleOrder

FILTER = "(a) webdataset, filter"


def count(batches: Iterable[Any], most: int | None = None) -> int:
    """Draw batches until there are `most` samples; how many there were."""
    samples = 0
    for batch in batches:
        samples += len(batch.rows) if hasattr(batch, "rows") else len(batch[1])
        if most is not None and samples >= most:
            break
    return samples


def our_bytes(pool: Pool, rows: np.ndarray, window: int | None) -> int:
    """Read one pass, bytes only."""
    reader = SampleReader(pool=pool, max_image_pixels=10**8)
    order = window_order(pool, rows, window)
    return sum(1 for step in range(len(rows) // BATCH) for _ in reader.read(order.batch(step)[1]))


def our_batches(
    pool: Pool, rows: np.ndarray, workers: int, resize: Any, transform: Any, tokenizer: Any
) -> Iterable[Any]:
    """The loader that training uses."""
    dataset = SampleDataset(
        reader=SampleReader(pool=pool, max_image_pixels=10**8),
        transform=transform,
        tokenizer=tokenizer,
        seed=0,
        substitutes=rows,
        resize=resize,
    )
    sampler = OrderSampler(
        order=SampleOrder(rows=rows, seed=0, global_batch=BATCH),
        global_batch=BATCH,
        start_step=0,
        total_steps=10**6,
        rank=0,
        world_size=1,
    )
    return make_loader(dataset, sampler, LoaderOptions(num_workers=workers), pin_memory=False)


def measure_bytes(pool: Pool, rows: np.ndarray, new: Sequence[Path], rounds: int) -> str:
    """Passes over the bytes alone, in one process."""
    paths = [shard.path for shard in pool.shards]
    uids = frozenset(format_uid(pool.uids[row]) for row in rows)
    raw: dict[str, Any] = {"batch_size": BATCH, "partial_batches": True}
    sides = {
        FILTER: lambda: count(webdataset_pairs(paths, uids=uids, **raw)),
        "(b) webdataset, resharded": lambda: count(webdataset_pairs(new, **raw)),
        "siftclip": lambda: our_bytes(pool, rows, None),
        "siftclip, window of 2 tars": lambda: our_bytes(pool, rows, 2),
    }
    return table(alternate(sides, rounds), FILTER)


def measure_batches(
    pool: Pool, rows: np.ndarray, new: Sequence[Path], rounds: int, workers: int, most: int
) -> str:
    """Batches at 224 pixels from loader processes."""
    paths = [shard.path for shard in pool.shards]
    uids = frozenset(format_uid(pool.uids[row]) for row in rows)
    transform = image_transform_v2(PreprocessCfg(size=224), is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    full: dict[str, Any] = {
        "batch_size": BATCH,
        "partial_batches": True,
        "decode": image_decode(transform),
        "tokenize": tokenizer,
    }

    def ours(resize: str) -> int:
        return count(our_batches(pool, rows, workers, resize, transform, tokenizer), most)

    def open_clips() -> int:
        batches = open_clip_pipeline(
            new,
            transform=transform,
            tokenizer=tokenizer,
            batch_size=BATCH,
            samples=len(rows),
            workers=workers,
        )
        return count(batches, most)

    sides = {
        FILTER: lambda: count(loader(webdataset_pairs(paths, uids=uids, **full), workers), most),
        "(b) webdataset, resharded": lambda: count(
            loader(webdataset_pairs(new, **full), workers), most
        ),
        "(c) open_clip, resharded": open_clips,
        "siftclip": lambda: ours("pillow"),
        "siftclip, resize=torch": lambda: ours("torch"),
    }
    return table(alternate(sides, rounds), FILTER)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.1])
    parser.add_argument("--samples", type=int, default=1536, help="decoded a side and round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = open_benchmark_pool(options.pool)
    # open_clip's own code stumbles over what webdataset 1.0 sends at the end of a tar
    data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)
    print(f"{describe_machine()}, webdataset {wds.__version__}; {len(pool)} samples\n")
    for fraction in options.fractions:
        rows = choose(pool, np.arange(len(pool)), fraction)
        uids = frozenset(format_uid(pool.uids[row]) for row in rows)
        with TemporaryDirectory(dir=options.pool) as folder:
            paths = [shard.path for shard in pool.shards]
            new = reshard(paths, uids, Path(folder) / "new", shard_samples=2500, workers=2)
            print(
                f"## keep {fraction:.0%}: {len(rows)} samples. Resharding took {new.seconds:.1f} s "
                f"with 2 processes and wrote {new.bytes_written / 1e6:.0f} MB\n"
            )
            print(f"bytes, one process, {options.rounds} rounds of one pass:\n")
            print(measure_bytes(pool, rows, new.shards, options.rounds), "\n")
            print(f"batches of {BATCH} at 224 px, {options.workers} worker(s):\n")
            print(
                measure_batches(
                    pool, rows, new.shards, options.rounds, options.workers, options.samples
                ),
                "\n",
                flush=True,
            )


if __name__ == "__main__":
    main()
