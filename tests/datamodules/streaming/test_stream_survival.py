"""A stream continues where it was killed, keeps its memory, and never waits for ever."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.datamodules.streaming.batches import Batch, SampleDataset
from siftclip.datamodules.streaming.datamodule import LoaderOptions, OrderSampler, make_loader
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.errors import InputError
from siftclip.files import append_jsonl, read_jsonl

Make = Callable[..., Any]
BATCH, STEPS = 8, 60
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")


def batches(
    dataset: SampleDataset,
    order: SampleOrder,
    options: LoaderOptions,
    *,
    start_step: int = 0,
    total_steps: int = STEPS,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    sampler = OrderSampler(
        order=order,
        global_batch=BATCH,
        start_step=start_step,
        total_steps=total_steps,
        rank=rank,
        world_size=world_size,
    )
    yield from make_loader(dataset, sampler, options, pin_memory=False)


def train(
    dataset: SampleDataset, order: SampleOrder, ledger: Path, workers: int, world_size: int
) -> None:
    """What a run does: go on behind the last step that was written down."""
    done = len(read_jsonl(ledger))
    ranks = [
        batches(
            dataset,
            order,
            LoaderOptions(num_workers=workers),
            start_step=done,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for step, parts in enumerate(zip(*ranks, strict=True), start=done):
        rows = torch.cat([part.rows for part in parts]).tolist()
        digest = float(torch.cat([part.images for part in parts]).double().sum())
        append_jsonl(ledger, {"step": step, "rows": rows, "pixels": digest})
        time.sleep(0.002)


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("window", [None, 2])
def test_twenty_kills_change_nothing(
    window: int | None,
    tmp_path: Path,
    make_samples: Make,
    write_pool: Make,
    load_pool: Make,
    make_dataset: Make,
) -> None:
    samples = make_samples(50)
    samples[7].image = b"no image"
    pool: Pool = load_pool(write_pool(samples, shards=5))
    rows = np.sort(np.r_[np.arange(0, 50, 2), 7, 7, 10, 10, 10])
    order = SampleOrder(
        rows=rows,
        seed=7,
        global_batch=BATCH,
        shard_of_row=pool.shard_of_row,
        window_shards=window,
    )
    dataset = make_dataset(pool, substitutes=rows)
    train(dataset, order, tmp_path / "whole", workers=0, world_size=1)
    expected = read_jsonl(tmp_path / "whole")
    assert len(expected) == STEPS

    generator, ledger = random.Random(0), tmp_path / "killed"
    context = multiprocessing.get_context("fork")
    kills = 0
    points = sorted(generator.sample(range(1, STEPS - 1), 10))
    for point in points:
        workers, world_size = generator.choice([0, 1, 2]), generator.choice([1, 2, 4])
        process = context.Process(target=train, args=(dataset, order, ledger, workers, world_size))
        process.start()
        deadline = time.monotonic() + 60
        while len(read_jsonl(ledger)) < point and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        # a killed writer may leave half a line, which the next one must not continue
        whole = read_jsonl(ledger)
        ledger.write_text("".join(json.dumps(record) + "\n" for record in whole))
    assert kills >= 8
    train(dataset, order, ledger, workers=0, world_size=1)
    assert read_jsonl(ledger) == expected


def private_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) for line in fields}
    return 1024 * (values["Private_Dirty"] + values["Private_Clean"])


@pytest.mark.slow
@linux_only
def test_memory_of_workers_is_flat_over_ten_passes(
    make_samples: Make, write_pool: Make, load_pool: Make, make_dataset: Make
) -> None:
    samples = make_samples(240)
    for sample in samples:  # 100 kB each: all that is kept of a pass would be 24 MB
        assert sample.image is not None
        sample.image += os.urandom(100_000)
    pool: Pool = load_pool(write_pool(samples, shards=6))
    order = SampleOrder(rows=np.arange(240), seed=0, global_batch=BATCH)
    used: list[int] = []
    steps_a_pass = 240 // BATCH
    loader = batches(
        make_dataset(pool),
        order,
        LoaderOptions(num_workers=2),
        total_steps=10 * steps_a_pass,
    )
    for step, _ in enumerate(loader, start=1):
        if step % steps_a_pass == 0 and step < 10 * steps_a_pass:
            used.append(sum(private_bytes(p.pid or 0) for p in multiprocessing.active_children()))
    assert len(used) == 9
    assert max(used[2:]) - used[1] < 6_000_000, used


class Stuck(LocalStorage):
    """A file system that does not answer."""

    def read(self, spans: Any) -> Iterator[Any]:
        time.sleep(600)
        yield b""


@linux_only
# torch joins its killed workers again when the loader is collected, and is told of the kill there
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*_MultiProcessingDataLoaderIter.__del__"
    ":pytest.PytestUnraisableExceptionWarning"
)
# and torch's signal handler raises wherever the main thread is, even in a callback of the collector
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*gc_callback:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("what", ["stuck storage", "killed worker", "killed while it sends"])
def test_stream_that_stops_is_an_error(
    what: str,
    make_samples: Make,
    write_pool: Make,
    load_pool: Make,
    make_dataset: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool: Pool = load_pool(write_pool(make_samples(20)))
    if what == "stuck storage":
        object.__setattr__(pool, "storage", Stuck(pool.root))
    order = SampleOrder(rows=np.arange(20), seed=0, global_batch=BATCH)
    loader = batches(make_dataset(pool), order, LoaderOptions(num_workers=1, timeout_seconds=3))
    start = time.monotonic()
    if what == "killed worker":
        next(loader)
        for process in multiprocessing.active_children():
            process.kill()
    if what == "killed while it sends":
        next(loader)

        def fail(self: Any) -> Any:
            raise ConnectionResetError(104, "Connection reset by peer")

        monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", fail)
    with pytest.raises(InputError, match=r"The loader gives no more samples: .*timeout_sec"):
        for _ in loader:
            pass
    assert time.monotonic() - start < 30
