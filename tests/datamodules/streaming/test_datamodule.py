"""Streaming gives the selected samples, the same pixels whatever ranks and workers there are."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pools import changed_pool

from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.models.load import Tokenizer, Transform
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.storage import local as storage
from siftclip.datamodules.storage.local import LocalStorage, Storage
from siftclip.datamodules.streaming.batches import Batch, SampleDataset, StepBatch
from siftclip.datamodules.streaming.datamodule import (
    LoaderOptions,
    OrderSampler,
    StreamDataModule,
    make_loader,
    warn_of_small_cache,
)
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.errors import InputError

Make = Callable[..., Any]
MakeDataset = Callable[..., SampleDataset]
STEPS, BATCH = 5, 8


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]) -> Pool:
    return load_pool(write_pool(make_samples(20), shards=3))


@pytest.fixture
def rows() -> np.ndarray:
    """Nine of the twenty samples, one of them three times."""
    return np.array([0, 2, 3, 3, 3, 8, 10, 11, 14, 17, 19])


def load(
    dataset: SampleDataset,
    rows: np.ndarray,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    start_method: Any = None,
    start_step: int = 0,
) -> Iterator[Batch]:
    order = SampleOrder(rows=rows, seed=dataset.seed, global_batch=BATCH)
    sampler = OrderSampler(
        order=order,
        global_batch=BATCH,
        start_step=start_step,
        total_steps=STEPS,
        rank=rank,
        world_size=world_size,
    )
    options = LoaderOptions(num_workers=num_workers, start_method=start_method)
    yield from make_loader(dataset, sampler, options, pin_memory=False)


def join(batches: list[Batch]) -> Batch:
    fields = {
        k: torch.cat([getattr(b, k) for b in batches])
        for k in ("images", "tokens", "rows", "valid")
    }
    return Batch(**fields, faults=tuple(fault for b in batches for fault in b.faults))


def assert_equal(first: Batch, second: Batch) -> None:
    for name in ("images", "tokens", "rows", "valid"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.faults == second.faults


def test_batch_holds_what_the_tars_hold(
    pool: Pool,
    rows: np.ndarray,
    make_dataset: MakeDataset,
    make_samples: Make,
    tokenizer: Tokenizer,
) -> None:
    (first, *_) = load(make_dataset(pool), rows)
    assert first.images.shape == (BATCH, 3, 16, 16)
    assert first.images.dtype == torch.uint8
    assert first.finished().images.dtype == torch.float32
    assert first.tokens.dtype == first.rows.dtype == torch.int64
    assert first.valid.tolist() == [True] * BATCH
    assert first.faults == ()
    captions = [make_samples(20)[row].caption.decode() for row in first.rows]
    assert torch.equal(first.tokens, tokenizer(captions))


def test_image_and_caption_are_those_of_the_row(pool: Pool, make_samples: Make) -> None:
    reader = SampleReader(pool=pool, max_image_pixels=10_000)
    for row, sample in enumerate(make_samples(20)):
        assert format_uid(pool.uids[row]) == sample.uid
        assert reader.read_caption(row) == sample.caption.decode()
        expected = Image.open(io.BytesIO(sample.image)).convert("RGB")
        assert reader.read_image(row).tobytes() == expected.tobytes()


# torch's advice for machines with fewer cores than loader processes
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_ledger_and_pixels_are_the_same_for_all_ranks_and_workers(
    pool: Pool, rows: np.ndarray, make_dataset: MakeDataset, world_size: int, num_workers: int
) -> None:
    dataset = make_dataset(pool)
    reference = join(list(load(dataset, rows)))
    ranks = [
        list(load(dataset, rows, rank=rank, world_size=world_size, num_workers=num_workers))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {STEPS}
    assert {len(b.rows) for batches in ranks for b in batches} == {BATCH // world_size}
    assert_equal(join([batches[step] for step in range(STEPS) for batches in ranks]), reference)
    # 40 samples of 11 selected: three whole passes, and 7 of the fourth
    counts = Counter(reference.rows.tolist())
    assert set(counts) == set(rows.tolist())
    assert 9 <= counts[3] <= 12
    assert all(3 <= counts[row] <= 4 for row in set(rows.tolist()) - {3})


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_start_method_does_not_change_a_pixel(
    pool: Pool, rows: np.ndarray, make_dataset: MakeDataset, start_method: str
) -> None:
    dataset = make_dataset(pool)
    workers = 1 if start_method == "spawn" else 2  # a spawned one imports torch anew: seconds
    batches = list(load(dataset, rows, num_workers=workers, start_method=start_method))
    assert_equal(join(batches), join(list(load(dataset, rows))))


def test_run_that_starts_in_the_middle_sees_the_same(
    pool: Pool, rows: np.ndarray, make_dataset: MakeDataset
) -> None:
    whole = list(load(make_dataset(pool), rows))
    assert_equal(join(list(load(make_dataset(pool), rows, start_step=3))), join(whole[3:]))


def test_augmentation_depends_on_seed_and_position_alone(
    pool: Pool, make_dataset: MakeDataset
) -> None:
    dataset = make_dataset(pool)

    def image(position: int, seed: int = 7) -> torch.Tensor:
        return make_dataset(pool, seed=seed).__getitems__([(position, 5)]).images[0]

    together = dataset.__getitems__([(i, 5) for i in range(12)]).images
    for position in range(12):
        random.seed(position % 3)
        np.random.seed(position % 3)
        torch.manual_seed(position % 3)
        assert torch.equal(image(position), together[position])
    assert len({view.numpy().tobytes() for view in together}) == 12
    assert not torch.equal(image(0, seed=8), together[0])


def test_global_random_states_are_left_alone(
    pool: Pool, rows: np.ndarray, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("the accelerator's random state was set")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    loader = load(make_dataset(pool), rows)
    next(loader)  # DataLoader itself draws a base seed once, at the start
    before = (torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state()))
    next(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert pickle.dumps(np.random.get_state()) == before[2]


def test_only_the_bytes_of_selected_rows_are_read(
    pool: Pool, rows: np.ndarray, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Counter[tuple[str, int, int]]()
    real_pread = os.pread

    def spy(file: int, size: int, offset: int) -> bytes:
        reads[os.readlink(f"/proc/self/fd/{file}"), size, offset] += 1
        return real_pread(file, size, offset)

    monkeypatch.setattr(os, "pread", spy)
    monkeypatch.setattr(LocalStorage, "max_gap_bytes", 1024)  # samples are smaller than the gap
    batches = list(load(make_dataset(pool), rows))
    expected = Counter[tuple[str, int, int]]()
    for row in (row for batch in batches for row in set(batch.rows.tolist())):
        # image, a header, caption: neighbours, and one read
        start = int(pool.image_offsets_bytes[row])
        end = int(pool.text_offsets_bytes[row] + pool.text_sizes_bytes[row])
        expected[pool.shards[pool.shard_of_row[row]].path, end - start, start] += 1
    assert reads == expected


def test_few_files_are_open_at_a_time(
    make_samples: Make,
    write_pool: Make,
    load_pool: Callable[..., Pool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "_max_open_files", lambda: 3)
    pool = load_pool(write_pool(make_samples(10), shards=10))
    reader = SampleReader(pool=pool, max_image_pixels=10_000)
    before = len(os.listdir("/proc/self/fd"))
    for row in [*range(10), 0, 9, 0, 5]:
        assert reader.read_caption(row) == f"caption of sample {row}"
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.read_caption(1) == "caption of sample 1"


class RetryingStorage:
    """A storage that has repeated five reads before, and then two more."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.counts = storage, iter([5, 7])

    @property
    def retries(self) -> int:
        return next(self.counts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)


def test_batch_tells_the_retries_of_its_own_reads(
    pool: Pool, rows: np.ndarray, make_dataset: MakeDataset
) -> None:
    retrying: Any = RetryingStorage(pool.storage)
    dataset = make_dataset(changed_pool(pool, storage=retrying))
    assert dataset.__getitems__([(0, int(rows[0]))]).retries == 2


def test_reader_is_picklable_and_opens_its_own_files(pool: Pool) -> None:
    reader = SampleReader(pool=pool, max_image_pixels=123)
    reader.read_caption(0)
    copied = pickle.loads(pickle.dumps(reader))  # noqa: S301 - our own bytes
    reader.close()
    assert copied.max_image_pixels == 123
    assert copied.read_caption(4) == "caption of sample 4"
    copied.close()


def test_batch_moves_with_all_its_tensors(pool: Pool, make_dataset: MakeDataset) -> None:
    batch = make_dataset(pool).__getitems__([(0, 1), (1, 2)])
    moved = batch.to("meta")
    for name in ("images", "tokens", "rows", "valid"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.faults == batch.faults
    assert_equal(batch.to(torch.device("cpu"), non_blocking=True), batch)


def make_module(
    pool: Pool, rows: np.ndarray, transform: Transform, tokenizer: Tokenizer, **options: Any
) -> StreamDataModule:
    defaults = {
        "seed": 7,
        "global_batch_size": BATCH,
        "total_steps": STEPS,
        "loader": LoaderOptions(num_workers=0),
        "max_image_pixels": 10_000,
        "max_bad_fraction": 0.0,
    }
    return StreamDataModule(
        pool=pool, rows=rows, transform=transform, tokenizer=tokenizer, **{**defaults, **options}
    )


@pytest.mark.parametrize("micro_batch_size", [None, BATCH // 4])
@pytest.mark.parametrize(("rank", "world_size", "step"), [(0, 1, 0), (1, 2, 0), (1, 2, 3)])
def test_datamodule_streams_the_part_of_its_rank_from_the_trainers_step(
    pool: Pool,
    rows: np.ndarray,
    transform: Transform,
    tokenizer: Tokenizer,
    make_dataset: MakeDataset,
    rank: int,
    world_size: int,
    step: int,
    micro_batch_size: int | None,
) -> None:
    weights = np.linspace(0, 1, len(pool), dtype=np.float32)
    module = make_module(
        pool, rows, transform, tokenizer, micro_batch_size=micro_batch_size, weights=weights
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(  # type: ignore[assignment]  # what the module asks of it
        global_rank=rank, world_size=world_size, global_step=step, strategy=strategy
    )
    loader = module.train_dataloader()
    assert len(loader) == STEPS
    steps = list(loader)
    parts = 1 if micro_batch_size is None else BATCH // world_size // micro_batch_size
    assert [len(batch.micro_batches) for batch in steps] == [parts] * (STEPS - step)
    batches = [part for batch in steps for part in batch.micro_batches]
    expected = load(make_dataset(pool), rows, rank=rank, world_size=world_size, start_step=step)
    assert_equal(join(batches), join(list(expected)))
    for part in batches:
        assert part.weights is not None
        assert part.weights.tolist() == weights[part.rows].tolist()
    moved = steps[0].to("meta").micro_batches[0]
    assert moved.weights is not None
    assert (moved.weights.device.type, moved.images.device.type) == ("meta", "meta")


def test_datamodule_refuses_what_cannot_be(
    pool: Pool, rows: np.ndarray, transform: Transform, tokenizer: Tokenizer
) -> None:
    with pytest.raises(RuntimeError, match="needs a trainer"):
        make_module(pool, rows, transform, tokenizer).train_dataloader()
    with pytest.raises(InputError, match=r"max_image_pixels must be an integer of at least 1"):
        make_module(pool, rows, transform, tokenizer, max_image_pixels=0)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_rank=0, world_size=3, global_step=0, strategy=strategy)
    module = make_module(pool, rows, transform, tokenizer)
    module.trainer = trainer
    with pytest.raises(InputError, match=r"global_batch must be a multiple of the 3"):
        module.train_dataloader()
    for option, value in (
        ("num_workers", -1),
        ("prefetch_batches", 0),
        ("timeout_seconds", -1),
        ("start_method", "clone"),
    ):
        with pytest.raises(InputError, match=rf"LoaderOptions: {option} must be"):
            LoaderOptions(**{"num_workers": 1, option: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"window_shards must be an integer"):
        make_module(pool, rows, transform, tokenizer, window_shards=0)
    trainer.world_size = 1
    module = make_module(pool, rows, transform, tokenizer, micro_batch_size=BATCH - 1)
    module.trainer = trainer
    with pytest.raises(InputError, match=rf"micro_batch_size must divide the {BATCH}"):
        module.train_dataloader()


def test_state_holds_the_counts_and_refuses_another_order(
    pool: Pool, rows: np.ndarray, transform: Transform, tokenizer: Tokenizer
) -> None:
    module = make_module(pool, rows, transform, tokenizer, max_bad_fraction=0.5)
    empty = torch.zeros(8)
    faults = (("torn", "a.tar:1"),)
    module.account(
        Batch(images=empty, tokens=empty, rows=empty, valid=empty, faults=faults, retries=3)
    )
    state = json.loads(json.dumps(module.state_dict()))  # plain values: nothing is pickled
    other = make_module(pool, rows, transform, tokenizer, max_bad_fraction=0.5)
    other.load_state_dict(state)
    assert (other.loaded_samples, other.retries) == (8, 3)
    assert other.faults == module.faults
    changes: list[dict[str, Any]] = [{"seed": 8}, {"global_batch_size": 4}, {"window_shards": 2}]
    for change in changes:
        changed = make_module(pool, rows, transform, tokenizer, **change)
        with pytest.raises(InputError, match=r"another selection, seed, global batch or window"):
            changed.load_state_dict(state)
    with pytest.raises(InputError, match=r"differs in .* or start a new run"):
        make_module(pool, rows[:-1], transform, tokenizer).load_state_dict(state)


def test_batches_go_to_a_gpu_without_blocking(
    pool: Pool,
    rows: np.ndarray,
    transform: Transform,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, bool]] = []

    def note(batch: Batch, device: torch.device, non_blocking: bool = False) -> Batch:
        asked.append((str(device), non_blocking))
        return batch

    module = make_module(pool, rows, transform, tokenizer)
    (part, *_) = load(module.dataset, rows)
    batch = StepBatch([part])
    monkeypatch.setattr(Batch, "to", note)
    for device in ("cuda:1", "mps"):
        module.transfer_batch_to_device(batch, torch.device(device), 0)
    assert asked == [("cuda:1", True), ("mps", False)]
    assert module.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch


class Cheapest:
    """A first stage on cached scores: of twice the samples, those with the lowest score."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def __call__(self, step: int, rows: np.ndarray, wanted: int) -> np.ndarray:
        return np.argsort(self.scores[rows], kind="stable")[:BATCH]


@pytest.mark.parametrize("world_size", [1, 2])
def test_first_stage_decides_what_is_read(
    pool: Pool,
    transform: Transform,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
) -> None:
    rows = np.arange(20)
    scores = np.random.default_rng(0).permutation(20)
    read: list[int] = []
    real_read = SampleReader.read

    def spy(reader: SampleReader, asked: np.ndarray) -> Any:
        read.extend(asked.tolist())
        return real_read(reader, asked)

    monkeypatch.setattr(SampleReader, "read", spy)
    order = SampleOrder(rows=rows, seed=7, global_batch=2 * BATCH)
    twice = StepPlan(trained=BATCH, drawn=np.full(2, 2 * BATCH), read=np.full(2, BATCH))
    expected = []
    for step in range(2):
        drawn = order.batch(step)[1]
        expected.append(sorted(drawn.tolist(), key=lambda row: scores[row])[:BATCH])
    parts = []
    for rank in range(world_size):
        module = make_module(
            pool,
            rows,
            transform,
            tokenizer,
            first_stage=Cheapest(scores),
            total_steps=2,
            plan=twice,
        )
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        module.trainer = SimpleNamespace(  # type: ignore[assignment]  # what the module asks of it
            global_rank=rank, world_size=world_size, global_step=0, strategy=strategy
        )
        batches = [part for batch in module.train_dataloader() for part in batch.micro_batches]
        parts.append([batch.rows.tolist() for batch in batches])
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == expected
    assert sorted(read) == sorted(chain(*expected))


@pytest.mark.parametrize(("window", "warned"), [(None, True), (2, True), (1, False)])
def test_cache_that_is_smaller_than_a_window_is_named(
    pool: Pool, rows: np.ndarray, caplog: pytest.LogCaptureFixture, window: Any, warned: bool
) -> None:
    sizes = [shard.size_bytes for shard in pool.shards]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "cache_limit_bytes", int(1.5 * max(sizes)))
        warn_of_small_cache(pool, rows, window)
    assert ("shuffle 1 of them together" in caplog.text) == warned
    caplog.clear()
    warn_of_small_cache(pool, rows, window)  # a local pool has no cache
    assert not caplog.text
