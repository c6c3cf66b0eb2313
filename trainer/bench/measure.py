"""Measures how fast samples come from a pool on this machine, and whether a copy of them would pay.

All times are of the state that the machine is in: what has been read before may come from memory.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from siftclip.datamodules.index.faults import FaultLog
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import (
    BadSampleError,
    ChangedTarError,
    SampleReader,
    decode_caption,
)
from siftclip.datamodules.selection.compaction import write_shard
from siftclip.datamodules.streaming.batches import Batch, Request, SampleDataset
from siftclip.datamodules.streaming.loader import StreamLoader
from siftclip.datamodules.streaming.order import SampleOrder, derive_generator
from siftclip.purposes import GeneratorPurpose
from siftclip.trainer.runtime.step_clock import device_seconds

KEEP_FRACTIONS = (1.0, 0.5, 0.3, 0.1)
COPY_BYTES = 256 << 20  # written at most to find out what writing costs
# A smaller gain than this part of a sample's time is noise: it would pay "after 3,000 passes".
NOTICEABLE_FRACTION = 0.01
ROUNDS = 4  # of each reading, because a single one says little
SEQUENTIAL_SAMPLES = 1024  # read as one batch where the order is that of the tars


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where the time of one loading process goes."""

    samples: int  # good ones
    read_bytes: int
    seconds: dict[str, float]  # by stage: read, decode, transform, tokenise, collate
    total_seconds: float

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.total_seconds

    @property
    def seconds_after_reading(self) -> float:
        """Of a sample, in all stages but reading."""
        return (self.total_seconds - self.seconds["read"]) / self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderRate:
    """What the loader delivers when nobody keeps it waiting."""

    samples: int
    seconds: float
    batch: Batch  # the last one

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCost:
    """Seconds a sample of reading bytes, nothing decoded, in several rounds."""

    keep_fraction: float  # of the pool, chosen uniformly
    samples: int  # in all rounds
    streaming_rounds: tuple[float, ...]  # in training order, from the tars of the pool
    sequential_rounds: tuple[float, ...]  # in the order of the tars, all samples of them

    @property
    def streaming_seconds(self) -> float:
        return statistics.median(self.streaming_rounds)

    @property
    def sequential_seconds(self) -> float:
        return statistics.median(self.sequential_rounds)

    @property
    def is_clear(self) -> bool:
        """Whether every round of streaming took longer than every sequential one.

        Where there is no difference, ROUNDS of each come out so by chance once in 70 times.
        """
        return min(self.streaming_rounds) > max(self.sequential_rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCost:
    """What copying samples into a new tar took."""

    samples: int
    size_bytes: int
    seconds: float

    @property
    def sample_seconds(self) -> float:
        return self.seconds / self.samples


def time_stages(
    dataset: SampleDataset,
    batches: Iterable[Sequence[Request]],
    *,
    max_bad_fraction: float,
    advance: Callable[[int], object],
) -> StageTimes:
    """Load batches in this process, one thread, as a loader process does, and time each stage.

    Bad samples are left out, not replaced. `advance` is called with the samples of each batch.

    Raises:
        InputError: more than `max_bad_fraction` of the samples are bad, or all of them.
    """
    reader, faults = dataset.reader, FaultLog()
    images = dataset.image_transform
    seconds = dict.fromkeys(("read", "decode", "transform", "tokenise", "collate"), 0.0)
    samples = read_bytes = asked = 0
    clock = time.perf_counter
    with _one_thread(), torch.random.fork_rng(devices=[]):
        begin = clock()
        for requests in batches:
            rows = np.asarray([row for _, row in requests], dtype=np.int64)
            captions: list[str] = []
            filling = images.filling(len(rows), finished=dataset.finished)
            mark = clock()
            for index, raw in reader.read(rows):
                now = clock()
                seconds["read"] += now - mark
                try:
                    if isinstance(raw, BadSampleError):
                        raise raw
                    read_bytes += len(raw.image) + len(raw.caption)
                    caption = decode_caption(raw.caption, reader.max_caption_bytes)
                    image = images.decode(raw.image, reader.max_image_pixels)
                except ChangedTarError as error:
                    raise error.stop() from None
                except BadSampleError as error:
                    faults.add(str(error), reader.pool.place(int(rows[index])))
                    mark = clock()
                    seconds["decode"] += mark - now
                    continue
                decoded = clock()
                prepared = images.prepare(image)
                transformed = clock()
                filling.put(len(captions), prepared)
                captions.append(caption)
                mark = clock()
                seconds["decode"] += decoded - now
                seconds["transform"] += transformed - decoded
                seconds["collate"] += mark - transformed
            seconds["read"] += clock() - mark
            mark = clock()
            if captions:
                dataset.tokenizer(captions)
            seconds["tokenise"] += clock() - mark
            samples += len(captions)
            asked += len(rows)
            advance(len(rows))
        total_seconds = clock() - begin
    # where all are bad there is nothing to measure, whatever is allowed
    faults.check(
        owner=f"pool {reader.pool.root}",
        total=asked,
        max_bad_fraction=max_bad_fraction if samples else 0,
    )
    return StageTimes(
        samples=samples, read_bytes=read_bytes, seconds=seconds, total_seconds=total_seconds
    )


def time_finishing(batch: Batch, device: torch.device, *, rounds: int = ROUNDS) -> float:
    """Time what a device does to images before a model takes them: seconds a sample, the median.

    That is nothing where the loader hands over floats.
    """
    batch, seconds = batch.to(device), []
    batch.finished()  # what is made once
    for _ in range(rounds):
        start = device_seconds(device)
        batch.finished()
        seconds.append(device_seconds(device) - start)
    return statistics.median(seconds) / len(batch.rows)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def time_loader(
    loader: StreamLoader, *, skipped_batches: int, advance: Callable[[int], object]
) -> LoaderRate:
    """Take all batches of a loader as fast as they come.

    Args:
        loader: its processes take turns, so give it a whole number of turns.
        skipped_batches: not counted, because the processes are starting; at least 1, a whole turn.
        advance: called with the samples of each batch.
    """
    samples, start = 0, 0.0
    for number, batch in enumerate(loader):
        if number < skipped_batches:
            start = time.perf_counter()
        else:
            samples += len(batch.rows)
        advance(len(batch.rows))
    return LoaderRate(samples=samples, seconds=time.perf_counter() - start, batch=batch)


def time_reading(reader: SampleReader, batches: Iterable[np.ndarray]) -> float:
    """Time reading batches of rows, int64 [n], bytes alone: seconds."""
    start = time.perf_counter()
    for rows in batches:
        for _ in reader.read(rows):
            pass
    return time.perf_counter() - start


def compare_reading(
    reader: SampleReader,
    *,
    samples: int,
    batch_samples: int,
    seed: int,
    window_shards: int | None,
    advance: Callable[[int], object],
    keep_fractions: Sequence[float] = KEEP_FRACTIONS,
) -> list[ReadCost]:
    """Read in training order from random parts of the pool, and as many samples in a row.

    What is read first finds a colder page cache. So the rounds take turns: each begins with another
    part, and every other one with the samples in a row.

    Args:
        reader: of the pool.
        samples: read of each part, in all rounds; fewer where the part has fewer.
        batch_samples: of a training step. What a step reads is read in the order of the tars.
        seed: of the parts, the order, and where in the pool samples are read in a row.
        window_shards: see `siftclip.datamodules.streaming.order.shuffle`.
        advance: called with the samples that have been read.
        keep_fractions: sizes of the parts.
    """
    pool = reader.pool
    orders, counts = [], []
    for number, fraction in enumerate(keep_fractions):
        generator = derive_generator(seed, number, GeneratorPurpose.BENCH)
        kept = generator.choice(len(pool), max(1, round(fraction * len(pool))), replace=False)
        counts.append(-(-min(samples, len(kept)) // ROUNDS))
        orders.append(
            SampleOrder(
                rows=np.sort(kept),
                seed=seed,
                global_batch=min(batch_samples, counts[-1]),
                shard_of_row=pool.shard_of_row,
                window_shards=window_shards,
            )
        )
    streaming: list[list[float]] = [[] for _ in keep_fractions]
    sequential: list[list[float]] = [[] for _ in keep_fractions]
    for turn in range(ROUNDS):
        for place in range(len(keep_fractions)):
            number = (place + turn) % len(keep_fractions)
            order, count = orders[number], counts[number]
            steps = -(-count // order.global_batch)
            numbers = range(turn * steps, (turn + 1) * steps)
            shuffled = np.concatenate([order.batch(step)[1] for step in numbers])[:count]
            generator = derive_generator(seed, number, turn, GeneratorPurpose.BENCH)
            first = int(generator.integers(len(pool) - count + 1))
            in_a_row = np.arange(first, first + count, dtype=np.int64)
            readings = [
                (streaming[number], _cut(shuffled, order.global_batch)),
                (sequential[number], _cut(in_a_row, SEQUENTIAL_SAMPLES)),
            ]
            for seconds, batches in readings[:: -1 if turn % 2 else 1]:
                seconds.append(time_reading(reader, batches) / count)
            advance(2 * count)
    return [
        ReadCost(
            keep_fraction=fraction,
            samples=ROUNDS * counts[number],
            streaming_rounds=tuple(streaming[number]),
            sequential_rounds=tuple(sequential[number]),
        )
        for number, fraction in enumerate(keep_fractions)
    ]


def _cut(rows: np.ndarray, length: int) -> list[np.ndarray]:
    return np.split(rows, np.arange(length, len(rows), length))


def time_copying(pool: Pool, path: Path, *, max_bytes: int = COPY_BYTES) -> CopyCost:
    """Copy the first samples of a pool into a tar at `path`, to the disk, and delete it."""
    ends = np.cumsum(pool.sample_sizes_bytes)
    count = max(1, int(np.searchsorted(ends, max_bytes, side="right")))
    try:
        start = time.perf_counter()
        shard = write_shard(pool, np.arange(count), path, advance=lambda _: None)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)
    return CopyCost(samples=count, size_bytes=shard.size_bytes, seconds=seconds)


def passes_until_copy_pays(
    cost: ReadCost,
    *,
    copy_seconds: float,
    other_seconds: float,
    model_seconds: float,
    parallel: float,
) -> float:
    """Compute after how many passes over a copy its making has paid; infinity for never.

    A sample takes what the slower of loader and model takes. Reading matters only as far as it
    makes the loader the slower one, and a difference that the rounds do not agree on is none.

    Args:
        cost: of reading.
        copy_seconds: of making the copy, a sample.
        other_seconds: of decoding, transforming, tokenising and collating a sample in one process.
        model_seconds: of training on a sample.
        parallel: loader processes that really run at the same time; 0 loads between the steps.
    """

    def seconds(read: float) -> float:
        if parallel == 0:
            return model_seconds + other_seconds + read
        return max(model_seconds, (other_seconds + read) / parallel)

    streaming, copied = seconds(cost.streaming_seconds), seconds(cost.sequential_seconds)
    saved = streaming - copied
    if not cost.is_clear or saved <= NOTICEABLE_FRACTION * streaming:
        return math.inf
    return copy_seconds / saved


def conclude(passes: dict[float, float], *, run_passes: float) -> str:
    """Conclude in one sentence from the passes after which a copy pays, by keep fraction."""
    paying = [f"{100 * keep:g} %" for keep, after in passes.items() if after < run_passes]
    run = f"for the {run_passes:.1f} passes of this run (its samples seen)"
    if not paying:
        return f"data compact does not pay here at any keep fraction {run}."
    return f"data compact pays here where {', '.join(paying)} of the pool are kept, {run}."


def available_memory_bytes() -> int | None:
    """Return the memory that is free or can be freed for the page cache; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    value = fields.get("MemAvailable", "").split()
    return int(value[0]) << 10 if value else None
