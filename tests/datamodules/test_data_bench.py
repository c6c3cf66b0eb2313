"""What is measured adds up, and the advice follows from the numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming import image_transform
from siftclip.datamodules.streaming.batches import Batch, SampleDataset
from siftclip.datamodules.streaming.datamodule import LoaderOptions, OrderSampler, make_loader
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.errors import InputError
from siftclip.trainer.bench import measure as data_bench
from siftclip.trainer.bench.measure import (
    CopyCost,
    LoaderRate,
    ReadCost,
    StageTimes,
    available_memory_bytes,
    compare_reading,
    conclude,
    passes_until_copy_pays,
    time_copying,
    time_loader,
    time_stages,
)
from siftclip.trainer.runtime import step_clock
from siftclip.trainer.runtime.step_clock import StepClock, StepTimes

Make = Callable[..., Any]
MakeDataset = Callable[..., SampleDataset]
STAGES = ["read", "decode", "transform", "tokenise", "collate"]


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]) -> Pool:
    return load_pool(write_pool(make_samples(40), shards=4))


def sampler(pool: Pool, *, batches: int, batch: int = 8) -> OrderSampler:
    return OrderSampler(
        order=SampleOrder(rows=np.arange(len(pool)), seed=1, global_batch=batch),
        global_batch=batch,
        start_step=0,
        total_steps=batches,
        rank=0,
        world_size=1,
    )


class Count:
    """Adds up what it is called with."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, samples: int) -> None:
        self.total += samples


# ---- the stages of loading ----------------------------------------------------------------------
def test_stages_add_up_to_the_total(pool: Pool, make_dataset: MakeDataset) -> None:
    count, state = Count(), torch.get_rng_state()
    times = time_stages(
        make_dataset(pool), sampler(pool, batches=5), max_bad_fraction=0, advance=count
    )
    assert times.samples == count.total == 40
    assert list(times.seconds) == STAGES
    assert all(seconds > 0 for seconds in times.seconds.values())
    total = sum(times.seconds.values())
    assert 0.8 * times.total_seconds < total <= times.total_seconds
    assert times.read_bytes == pool.image_sizes_bytes.sum() + pool.text_sizes_bytes.sum()
    assert times.samples_per_second == times.samples / times.total_seconds
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_are_timed_as_they_are_handed_over(
    pool: Pool, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = image_transform_v2(PreprocessCfg(size=16), is_train=True)
    dataset = replace(make_dataset(pool), transform=transform, resize="gpu")
    times = time_stages(
        dataset, sampler(pool, batches=2), max_bad_fraction=0, advance=lambda _: None
    )
    assert times.samples == 16
    assert all(seconds > 0 for seconds in times.seconds.values())
    resized = []
    resize = Batch.resized
    monkeypatch.setattr(Batch, "resized", lambda self: resized.append(1) or resize(self))
    batch = dataset.__getitems__([(0, 3), (1, 5)])
    assert data_bench.time_finishing(batch, torch.device("cpu"), rounds=2) > 0
    assert len(resized) == 3


def test_a_slow_stage_is_the_one_that_is_blamed(
    pool: Pool, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(pool)
    slow = {"tokenise": 0.05, "transform": 0.01, "read": 0.03, "decode": 0.008}
    tokenizer, transform, read = dataset.tokenizer, dataset.transform, SampleReader.read
    decode = image_transform.decode_image

    def wait_and(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*arguments: Any) -> Any:
            time.sleep(slow[stage])
            return function(*arguments)

        return waiting

    dataset = replace(
        dataset,
        tokenizer=wait_and("tokenise", tokenizer),
        transform=wait_and("transform", transform),
    )
    monkeypatch.setattr(SampleReader, "read", wait_and("read", read))
    monkeypatch.setattr(image_transform, "decode_image", wait_and("decode", decode))
    times = time_stages(
        dataset, sampler(pool, batches=2), max_bad_fraction=0, advance=lambda _: None
    )
    for stage, calls in (("tokenise", 2), ("transform", 16), ("read", 2), ("decode", 16)):
        assert slow[stage] * calls <= times.seconds[stage], stage
    after_reading = sum(times.seconds.values()) - times.seconds["read"]
    assert times.seconds_after_reading >= after_reading / 16


def test_bad_samples_are_left_out_and_bounded(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], make_dataset: MakeDataset
) -> None:
    samples = make_samples(16)
    samples[3].image = b"no picture"
    samples[5].caption = b" "
    pool = load_pool(write_pool(samples))
    dataset = make_dataset(pool)
    batches = list(sampler(pool, batches=2))
    times = time_stages(dataset, batches, max_bad_fraction=0.2, advance=lambda _: None)
    assert times.samples == 14
    with pytest.raises(InputError, match=r"2 of 16 samples are bad"):
        time_stages(dataset, batches, max_bad_fraction=0.1, advance=lambda _: None)
    only_bad = [[(0, 3), (1, 5)]]
    with pytest.raises(InputError, match=r"2 of 2 samples are bad"):
        time_stages(dataset, only_bad, max_bad_fraction=1.0, advance=lambda _: None)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_is_timed_after_its_start(
    pool: Pool, make_dataset: MakeDataset, workers: int
) -> None:
    count = Count()
    loader = make_loader(
        make_dataset(pool),
        sampler(pool, batches=6),
        LoaderOptions(num_workers=workers),
        pin_memory=False,
    )
    rate = time_loader(loader, skipped_batches=2, advance=count)
    assert (rate.samples, count.total) == (32, 48)
    assert rate.seconds > 0
    assert rate.samples_per_second == 32 / rate.seconds


# ---- training -----------------------------------------------------------------------------------
def test_waiting_is_what_passes_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps are skipped; then 1 s of waiting and 3 of work, and 2 and 3."""
    times = iter([10.0, 20.0, 21.0, 24.0, 26.0, 29.0])
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: next(times))
    clock = StepClock(skipped_steps=2, steps=2)
    meter = SimpleNamespace(scoring_seconds=0.0, selection_seconds=0.0)
    module = SimpleNamespace(device=torch.device("cpu"), meter=meter)
    batch = SimpleNamespace(samples=8)
    for step in range(5):  # the last is not counted
        clock.on_train_batch_start(None, module, batch, step)
        meter.scoring_seconds, meter.selection_seconds = 2.0 * step, 0.5 * step
        clock.on_train_batch_end(None, module, None, batch, step)
    found = clock.times()
    assert found == StepTimes(
        steps=2,
        samples=16,
        total_seconds=9.0,
        waiting_seconds=3.0,
        scoring_seconds=4.0,
        selection_seconds=1.0,
    )
    assert found.wait_fraction == pytest.approx(1 / 3)
    assert found.model_seconds == pytest.approx(6 / 16)
    assert found.samples_per_second == pytest.approx(16 / 9)


# ---- reading and copying ------------------------------------------------------------------------
@pytest.mark.parametrize("window_shards", [None, 2])
def test_reading_is_measured_at_every_keep_fraction(pool: Pool, window_shards: int | None) -> None:
    count = Count()
    costs = compare_reading(
        SampleReader(pool=pool, max_image_pixels=10_000),
        samples=10,
        batch_samples=4,
        seed=0,
        window_shards=window_shards,
        advance=count,
    )
    assert [cost.keep_fraction for cost in costs] == [1.0, 0.5, 0.3, 0.1]
    # four rounds of 3 samples; a tenth of 40 is 4, so of 1
    assert [cost.samples for cost in costs] == [12, 12, 12, 4]
    assert count.total == 2 * 40
    for cost in costs:
        assert len(cost.streaming_rounds) == len(cost.sequential_rounds) == 4
        assert min(*cost.streaming_rounds, *cost.sequential_rounds) > 0


def test_reading_takes_what_training_would_read(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def note(_: SampleReader, rows: np.ndarray) -> list[Any]:
        asked.append(rows.tolist())
        return []

    monkeypatch.setattr(SampleReader, "read", note)
    reader = SampleReader(pool=pool, max_image_pixels=10_000)
    (cost,) = compare_reading(
        reader,
        samples=20,
        batch_samples=4,
        seed=0,
        window_shards=None,
        advance=lambda _: None,
        keep_fractions=[1.0],
    )
    order = SampleOrder(rows=np.arange(40), seed=0, global_batch=4)
    steps = [order.batch(step)[1].tolist() for step in range(8)]
    in_a_row = [rows for rows in asked if len(rows) == 5]
    assert len(in_a_row) == 4
    assert all(rows == list(range(rows[0], rows[0] + 5)) for rows in in_a_row)
    # each round reads five samples of its own: a step, and one of the next step
    shuffled = [rows for rows in asked if len(rows) != 5]
    assert shuffled == [step[: 4 if i % 2 == 0 else 1] for i, step in enumerate(steps)]
    # and every other round begins with the samples in a row
    assert [len(rows) for rows in asked] == [4, 1, 5, 5, 4, 1, 4, 1, 5, 5, 4, 1]
    assert cost.samples == 20


def test_parts_take_turns_to_be_read_first(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        data_bench, "time_reading", lambda _, batches: asked.append(sum(map(len, batches))) or 1.0
    )
    compare_reading(
        SampleReader(pool=pool, max_image_pixels=10_000),
        samples=40,
        batch_samples=4,
        seed=0,
        window_shards=None,
        advance=lambda _: None,
    )
    assert asked[::8] == [10, 5, 3, 1]  # parts of 40, 20, 12 and 4 samples in four rounds


@pytest.mark.parametrize(
    ("streaming", "sequential", "clear"),
    [
        ((5.0, 4.0, 9.0, 6.0), (1.0, 3.0, 2.0, 1.0), True),
        ((5.0, 2.5, 9.0, 6.0), (1.0, 3.0, 2.0, 1.0), False),  # one round says otherwise
        ((1.0, 1.0), (1.0, 1.0), False),
    ],
)
def test_a_difference_that_rounds_do_not_agree_on_is_none(
    streaming: tuple[float, ...], sequential: tuple[float, ...], clear: bool
) -> None:
    cost = ReadCost(
        keep_fraction=0.3, samples=1, streaming_rounds=streaming, sequential_rounds=sequential
    )
    assert cost.is_clear is clear
    passes = passes_until_copy_pays(
        cost, copy_seconds=1.0, other_seconds=0.0, model_seconds=0.0, parallel=1.0
    )
    assert math.isinf(passes) is not clear


def test_copying_is_bounded_and_leaves_nothing(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "copy.tar"
    three = int(pool.sample_sizes_bytes[:3].sum())
    cost = time_copying(pool, path, max_bytes=three)
    assert (cost.samples, cost.size_bytes) == (3, three + 1024)
    assert cost.sample_seconds == cost.seconds / 3 > 0
    assert cost.seconds < 60
    assert time_copying(pool, path, max_bytes=1).samples == 1
    assert time_copying(pool, path).samples == 40
    assert not path.exists()


def test_available_memory_is_less_than_a_petabyte() -> None:
    memory = available_memory_bytes()
    assert memory is None or 1 << 20 < memory < 1 << 50


# ---- the advice ---------------------------------------------------------------------------------
MICRO = 1e-6


@pytest.mark.parametrize(
    ("streaming", "sequential", "other", "model", "parallel", "expected"),
    [
        # a cold disk: 5,000 us become 50, four loaders, nothing else matters: 200 / (4,950 / 4)
        (5000, 50, 0, 0, 4, 200 * 4 / 4950),
        # loading between the steps saves all of it: 200 / 400
        (500, 100, 2000, 1000, 0, 0.5),
        # up to the model's time: (1,000 + 3,000) / 2 becomes 1,500, not 1,000 / 2: 200 / 500
        (3000, 0, 1000, 1500, 2, 0.4),
        # nothing is saved
        (100, 100, 0, 0, 1, math.inf),
        (100, 300, 0, 0, 1, math.inf),
        # the model takes longer than the loader in both cases
        (500, 50, 1000, 800, 2, math.inf),
        # decoding takes so long that what reading saves, 10 of 2,030 us, is not noticed
        (30, 20, 2000, 0, 4, math.inf),
        # 30 of 2,030 are: 200 * 4 / 30 passes
        (30, 0, 2000, 0, 4, 200 * 4 / 30),
    ],
)
def test_passes_until_a_copy_pays(
    streaming: float,
    sequential: float,
    other: float,
    model: float,
    parallel: float,
    expected: float,
) -> None:
    cost = ReadCost(
        keep_fraction=0.3,
        samples=1,
        streaming_rounds=(streaming * MICRO,),
        sequential_rounds=(sequential * MICRO,),
    )
    passes = passes_until_copy_pays(
        cost,
        copy_seconds=200 * MICRO,
        other_seconds=other * MICRO,
        model_seconds=model * MICRO,
        parallel=parallel,
    )
    assert passes == pytest.approx(expected)


def test_conclusion_is_about_the_passes_of_this_run() -> None:
    never = dict.fromkeys((1.0, 0.3), math.inf)
    assert conclude(never, run_passes=100.0) == (
        "data compact does not pay here at any keep fraction for the 100.0 passes of this run "
        "(its samples seen)."
    )
    passes = {1.0: math.inf, 0.5: 8.3, 0.3: 2.0, 0.1: 0.7}
    assert "does not pay here at any" in conclude(passes, run_passes=0.5)
    assert conclude(passes, run_passes=8.0) == (
        "data compact pays here where 30 %, 10 % of the pool are kept, for the 8.0 passes of this "
        "run (its samples seen)."
    )


def test_finishing_is_timed_where_something_is_left_to_finish(
    pool: Pool, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(data_bench, "device_seconds", lambda device: next(clock))
    batch = make_dataset(pool).__getitems__([(0, 3), (1, 5)])
    finished = []
    finish = Batch.finished
    monkeypatch.setattr(Batch, "finished", lambda self: finished.append(1) or finish(self))
    device = torch.device("cpu")
    assert data_bench.time_finishing(batch, device, rounds=3) == 1.0  # 2 of 3, 1, 2 by 2 samples
    assert len(finished) == 4


def test_rates_follow_from_the_numbers() -> None:
    seconds = dict(zip(STAGES, [1.0, 2.0, 3.0, 0.5, 0.5], strict=True))
    stages = StageTimes(samples=10, read_bytes=1, seconds=seconds, total_seconds=8.0)
    assert stages.seconds_after_reading == 0.7
    nothing = torch.empty(0)
    batch = Batch(images=nothing, tokens=nothing, rows=nothing, valid=nothing)
    assert LoaderRate(samples=10, seconds=4.0, batch=batch).samples_per_second == 2.5
    assert CopyCost(samples=4, size_bytes=9, seconds=2.0).sample_seconds == 0.5
