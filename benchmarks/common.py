"""What the benchmarks share: alternating rounds, medians, tables, and the machine in words."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from siftclip.datamodules.pool.pool import Pool, open_pool
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.datamodules.streaming.order import SampleOrder

BATCH = 256


def describe_machine() -> str:
    """Cores, processor, and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores ({model}), {versions}"


def alternate(sides: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds a sample of every side and round; a side returns how many samples it has handled.

    The sides take turns within a round, so that what the machine does besides hits all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            samples = side()
            seconds[name].append((time.perf_counter() - start) / samples)
    return seconds


def table(seconds: Mapping[str, list[float]], reference: str) -> str:
    """Medians as a markdown table, with the ratio of each side to the reference."""
    base = statistics.median(seconds[reference])
    lines = ["| | samples/s | us a sample | times as fast |", "|---|---|---|---|"]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {1 / median:,.0f} | {1e6 * median:.1f} | {base / median:.2f} |")
    return "\n".join(lines)


def open_benchmark_pool(folder: Path) -> Pool:
    """The pool that make_pool.py wrote; its index stays inside it."""
    return open_pool(
        LocalStorage(str(folder)), cache_dir=folder / ".siftclip", max_bad_fraction=0, workers=2
    )


def window_order(pool: Pool, rows: np.ndarray, window: int | None) -> SampleOrder:
    """Batches of BATCH samples, shuffled over so many tars at a time."""
    return SampleOrder(
        rows=rows,
        seed=0,
        global_batch=BATCH,
        shard_of_row=pool.shard_of_row,
        window_shards=window,
    )


def choose(pool: Pool, rows: np.ndarray, fraction: float) -> np.ndarray:
    """A uniform selection of rows, sorted."""
    count = round(fraction * len(rows))
    return np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
