"""What a window of tars costs in randomness and gives in locality, against a true permutation.

    python benchmarks/shuffling.py POOL

Per window: the chance that two samples of a batch come from the same tar (a true permutation has
that of the pool), how many tars a batch and a thousand batches touch, reads a sample after joining
neighbours, and the seconds of reading.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from common import BATCH, choose, describe_machine, open_benchmark_pool, window_order

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader, coalesce


def measure(pool: Pool, rows: np.ndarray, window: int | None, max_gap_bytes: int) -> list[str]:
    """One row of the table."""
    order = window_order(pool, rows, window)
    steps = len(rows) // BATCH
    same, tars, reads, transferred = [], [], [], []
    for step in range(steps):
        batch = order.batch(step)[1]
        shards = pool.shard_of_row[batch]
        counts = np.bincount(shards)
        same.append((counts * (counts - 1)).sum() / (BATCH * (BATCH - 1)))
        tars.append((counts > 0).sum())
        starts = pool.sample_offsets_bytes[batch]
        ends = starts + pool.sample_sizes_bytes[batch]
        spans = coalesce(shards, starts, ends, max_gap_bytes=max_gap_bytes)
        reads.append(len(spans) / BATCH)
        transferred.append(sum(end - start for _, start, end, _ in spans) / (ends - starts).sum())
    reader = SampleReader(pool=pool, max_image_pixels=10**8)
    began = time.perf_counter()
    samples = sum(1 for step in range(steps) for _ in reader.read(order.batch(step)[1]))
    seconds = time.perf_counter() - began
    return [
        "all" if window is None else str(window),
        f"{np.mean(same):.3f}",
        f"{np.mean(tars):.1f}",
        f"{np.mean(reads):.2f}",
        f"{np.mean(transferred):.2f}",
        f"{1e6 * seconds / samples:.1f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.3])
    options = parser.parse_args()
    pool = open_benchmark_pool(options.pool)
    print(describe_machine(), f"; {len(pool.shards)} tars\n")
    for fraction in options.fractions:
        rows = choose(pool, np.arange(len(pool)), fraction)
        for place, gap in (("local disk", 16 << 10), ("behind a URL", 256 << 10)):
            print(f"keep {fraction:.0%}, ranges joined as for a pool on a {place}:\n")
            print(
                "| window | same tar | tars a batch | reads a sample | bytes read / needed "
                "| local us a sample |"
            )
            print("|---|---|---|---|---|---|")
            for window in (1, 2, 4, 8, None):
                print("| " + " | ".join(measure(pool, rows, window, gap)) + " |")
            print()


if __name__ == "__main__":
    main()
