"""Bad samples are counted with their cause, replaced by others, and bounded."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from siftclip.datamodules.models.load import Tokenizer, Transform
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming.batches import Batch, SampleDataset
from siftclip.datamodules.streaming.datamodule import (
    LoaderOptions,
    OrderSampler,
    StreamDataModule,
    make_loader,
)
from siftclip.datamodules.streaming.load_counts import LoadCounts
from siftclip.datamodules.streaming.order import SampleOrder, Substitutes
from siftclip.errors import InputError

Make = Callable[..., Any]
MakeDataset = Callable[..., SampleDataset]


def huge_png(side: int) -> bytes:
    """The header of a PNG with side x side pixels, and next to nothing behind it."""

    def block(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"0" * 99))


def spoil(sample: Any, defect: str) -> None:
    if defect == "not an image":
        sample.image = b"no image at all"
    elif defect == "empty image":
        sample.image = b""
    elif defect == "cut image":
        sample.image = sample.image[: len(sample.image) // 2]
    elif defect == "too many pixels":
        sample.image, sample.image_suffix = huge_png(200), "png"
    elif defect == "bomb":
        sample.image, sample.image_suffix = huge_png(60_000), "png"
    elif defect == "jpeg 2000":
        buffer = io.BytesIO()  # a sound image, of a format that is not decoded
        Image.open(io.BytesIO(sample.image)).save(buffer, format="JPEG2000")
        sample.image = buffer.getvalue()
    elif defect == "empty caption":
        sample.caption = b""
    elif defect == "blank caption":
        sample.caption = b" \n\t "
    elif defect == "not UTF-8":
        sample.caption = b"caf\xe9"
    else:
        raise AssertionError(defect)


CAUSES = {
    "not an image": "whose image cannot be decoded",
    "empty image": "whose image cannot be decoded",
    "cut image": "whose image cannot be decoded",
    "too many pixels": "with more pixels than max_image_pixels",
    "bomb": "with more pixels than",
    "jpeg 2000": "whose image cannot be decoded (it is a JPEG 2000 image)",
    "empty caption": "with an empty caption",
    "blank caption": "with an empty caption",
    "not UTF-8": "with a caption that is not UTF-8",
}


@pytest.fixture
def spoilt_pool(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]
) -> Callable[..., Pool]:
    """`spoilt_pool({row: defect}, count=12)`."""

    def make(defects: dict[int, str], count: int = 12) -> Pool:
        samples = make_samples(count)
        for row, defect in defects.items():
            spoil(samples[row], defect)
        return load_pool(write_pool(samples))

    return make


@pytest.mark.parametrize("defect", CAUSES)
def test_bad_sample_is_counted_and_replaced(
    spoilt_pool: Callable[..., Pool], make_dataset: MakeDataset, defect: str
) -> None:
    pool = spoilt_pool({4: defect})
    others = np.array([0, 1, 2, 6, 7, 8, 9, 10, 11])
    dataset = make_dataset(pool, substitutes=others)
    batch = dataset.__getitems__([(100, 3), (101, 4), (102, 5)])
    ((cause, place),) = batch.faults
    assert cause.startswith(CAUSES[defect])
    assert place == "00000000.tar:000000004"
    replacement = Substitutes(others, np.array([3, 4, 5]), seed=7, start=100).row(1, 0)
    assert replacement not in (3, 4, 5)
    assert batch.rows.tolist() == [3, replacement, 5]
    assert batch.valid.all()
    expected = dataset.__getitems__([(101, replacement)])
    assert torch.equal(batch.images[1], expected.images[0])
    assert torch.equal(batch.tokens[1], expected.tokens[0])


def test_samples_of_a_deleted_tar_are_bad_and_a_shortened_one_is_an_error(
    spoilt_pool: Callable[..., Pool], make_dataset: MakeDataset
) -> None:
    pool = spoilt_pool({})
    first, second = (Path(shard.path) for shard in pool.shards)
    first.unlink()
    data, before = second.read_bytes(), second.stat()
    cut = int(pool.text_offsets_bytes[10]) + 3
    second.write_bytes(data[:cut])
    dataset = make_dataset(pool, substitutes=np.array([7]))
    assert "00000001.tar has changed" in dataset.__getitems__([(0, 1), (1, 10), (2, 8)]).failure
    second.write_bytes(data)
    os.utime(second, ns=(before.st_atime_ns, before.st_mtime_ns))
    batch = dataset.__getitems__([(0, 1), (1, 10), (2, 8)])
    assert batch.rows.tolist() == [7, 10, 8]
    assert [cause for cause, _ in batch.faults] == [
        "in a tar that cannot be opened (No such file or directory)"
    ]


def run(
    dataset: SampleDataset,
    *,
    num_workers: int,
    world_size: int,
    steps: int = 3,
    global_batch: int = 8,
    micro_batch: int | None = None,
) -> list[Batch]:
    """The batches of all steps and ranks, in order."""
    order = SampleOrder(rows=np.arange(12), seed=7, global_batch=global_batch)
    ranks = []
    for rank in range(world_size):
        sampler = OrderSampler(
            order=order,
            global_batch=global_batch,
            start_step=0,
            total_steps=steps,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
        )
        options = LoaderOptions(num_workers=num_workers)
        loader = make_loader(dataset, sampler, options, pin_memory=False)
        ranks.append(list(loader))
    return [batch for step in zip(*ranks, strict=True) for batch in step]


@pytest.mark.parametrize(("num_workers", "world_size"), [(2, 1), (0, 2), (0, 4)])
def test_replacement_keeps_batches_full_and_is_the_same_everywhere(
    spoilt_pool: Callable[..., Pool], make_dataset: MakeDataset, num_workers: int, world_size: int
) -> None:
    pool = spoilt_pool({1: "not an image", 6: "empty caption", 7: "cut image", 11: "not UTF-8"})
    dataset = make_dataset(pool)
    expected = run(dataset, num_workers=0, world_size=1)
    batches = run(dataset, num_workers=num_workers, world_size=world_size)
    assert {len(batch.rows) for batch in batches} == {8 // world_size}
    for name in ("images", "rows"):
        ours = torch.cat([getattr(batch, name) for batch in batches])
        assert torch.equal(ours, torch.cat([getattr(batch, name) for batch in expected]))
    faults = [fault for batch in batches for fault in batch.faults]
    assert faults == [fault for batch in expected for fault in batch.faults]
    shown = {row for batch in expected for row in batch.rows.tolist()}
    assert shown == set(range(12)) - {1, 6, 7, 11}
    assert len(faults) >= 8  # two passes meet each of the four, substitutes may be bad as well


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, None), (2, 1)])
def test_no_replacement_is_in_the_batch_already(
    spoilt_pool: Callable[..., Pool],
    make_dataset: MakeDataset,
    world_size: int,
    micro_batch: int | None,
) -> None:
    """Nor in another rank's part of it, nor in another micro-batch."""
    dataset = make_dataset(spoilt_pool({1: "not an image", 7: "cut image", 11: "not UTF-8"}))
    parts = run(
        dataset,
        num_workers=0,
        world_size=world_size,
        steps=24,
        global_batch=4,
        micro_batch=micro_batch,
    )
    rows = np.array([row for part in parts for row in part.rows.tolist()]).reshape(24, 4)
    assert sum(len(part.faults) for part in parts) > 20
    copies = [4 - len(set(batch)) for batch in rows.tolist()]
    # a second attempt has no place of its own where a selection has but three draws
    assert sum(copies) <= sum(len(part.faults) > 1 for part in parts)
    assert all(part.copies for part in parts)  # so that the losses look


def test_without_substitutes_bad_samples_are_marked(
    spoilt_pool: Callable[..., Pool], make_dataset: MakeDataset, tokenizer: Tokenizer
) -> None:
    pool = spoilt_pool({4: "cut image", 6: "empty caption"})
    dataset = make_dataset(pool, substitutes=None)
    batch = dataset.__getitems__([(i, i) for i in (3, 4, 5, 6)])
    assert batch.rows.tolist() == [3, 4, 5, 6]
    assert batch.valid.tolist() == [True, False, True, False]
    assert [place for _, place in batch.faults] == [
        "00000000.tar:000000004",
        "00000001.tar:000000006",
    ]
    assert not batch.images[[1, 3]].any()
    assert torch.equal(batch.tokens[[1, 3]], tokenizer(["", ""]))
    alone = dataset.__getitems__([(3, 3)])
    assert torch.equal(alone.images[0], batch.images[0])


def test_batch_of_bad_samples_alone_has_the_right_shape(
    spoilt_pool: Callable[..., Pool], make_dataset: MakeDataset
) -> None:
    pool = spoilt_pool({0: "cut image", 1: "not UTF-8"})
    batch = make_dataset(pool, substitutes=None).__getitems__([(0, 0), (1, 1)])
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.valid.tolist() == [False, False]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pool_of_bad_samples_alone_is_an_error(
    spoilt_pool: Callable[..., Pool], make_dataset: MakeDataset, num_workers: int
) -> None:
    dataset = make_dataset(spoilt_pool(dict.fromkeys(range(12), "not an image")))
    with pytest.raises(InputError, match=r"21 samples of the pool .* in a row are bad;.*decoded"):
        run(dataset, num_workers=num_workers, world_size=1, steps=1)


@pytest.fixture
def datamodule(
    spoilt_pool: Callable[..., Pool], transform: Transform, tokenizer: Tokenizer
) -> Callable[..., StreamDataModule]:
    def make(max_bad_fraction: float) -> StreamDataModule:
        return StreamDataModule(
            pool=spoilt_pool({}, count=2),
            rows=np.arange(2),
            transform=transform,
            tokenizer=tokenizer,
            seed=0,
            global_batch_size=10,
            total_steps=1,
            loader=LoaderOptions(num_workers=0),
            max_image_pixels=100,
            max_bad_fraction=max_bad_fraction,
        )

    return make


def make_batch(bad: int) -> Batch:
    faults = tuple(("torn", f"a.tar:{i}") for i in range(bad))
    empty = torch.zeros(10)
    return Batch(images=empty, tokens=empty, rows=empty, valid=empty, faults=faults)


def test_bad_samples_are_bounded_over_the_run(datamodule: Callable[..., StreamDataModule]) -> None:
    module = datamodule(0.01)
    for _ in range(200):  # 2,000 samples, of which 20 may be bad
        module.account(make_batch(0))
    for _ in range(20):
        module.account(make_batch(1))
    assert module.loaded_samples == 2200
    assert module.faults.counts == {"torn": 20}
    with pytest.raises(InputError, match=r"25 of 2235 samples are bad.*25 torn \(such as a.tar:0"):
        module.account(make_batch(5))


def test_few_bad_samples_at_the_start_do_not_stop_a_run(
    datamodule: Callable[..., StreamDataModule],
) -> None:
    module = datamodule(0.01)
    for _ in range(10):  # 10 of the first 1,000 may be bad, wherever they are
        module.account(make_batch(1))
    with pytest.raises(InputError, match=r"11 of 121 samples are bad"):
        module.account(make_batch(1))


def test_no_bad_sample_is_forgiven_when_none_is_allowed(
    datamodule: Callable[..., StreamDataModule],
) -> None:
    module = datamodule(0.0)
    module.account(make_batch(0))
    with pytest.raises(InputError, match=r"1 of 21 samples are bad"):
        module.account(make_batch(1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_pool_streams_full_batches_and_names_every_fault(
    make_samples: Make,
    write_pool: Make,
    write_tar: Make,
    load_pool: Callable[..., Pool],
    make_dataset: MakeDataset,
    num_workers: int,
) -> None:
    """All at once: bad images and captions, missing members, a cut tar, one deleted under way."""
    samples = make_samples(60)
    for row, defect in {1: "not an image", 2: "bomb", 3: "not UTF-8", 4: "cut image"}.items():
        spoil(samples[row], defect)
    samples[5].caption = None
    samples[6].image = None
    samples[7].record = b'{"uid": "not a uid"}'
    root = write_pool(samples, shards=5)
    cut = root / "shards" / "00000004.tar"
    cut.write_bytes(cut.read_bytes()[: -(10240 + 3000)])
    pool = load_pool(root, max_bad_fraction=0.5)
    assert pool.faults.counts["without caption"] == 1
    assert pool.faults.counts["without image"] == 1
    assert pool.faults.counts["with a uid that is not 32 hexadecimal digits"] == 1
    assert sum(count for cause, count in pool.faults.counts.items() if "cut" in cause) >= 1

    order = SampleOrder(rows=np.arange(len(pool)), seed=7, global_batch=8)
    sampler = OrderSampler(
        order=order, global_batch=8, start_step=0, total_steps=20, rank=0, world_size=1
    )
    dataset = make_dataset(pool)
    faults: list[tuple[str, str]] = []
    loader = make_loader(dataset, sampler, LoaderOptions(num_workers=num_workers), pin_memory=False)
    for step, batch in enumerate(loader):
        assert batch.valid.all()
        assert len(batch.rows) == 8
        assert not {pool.place(row) for row in batch.rows.tolist()} & {
            place for _, place in batch.faults
        }
        faults += batch.faults
        if step == 5:
            dataset.reader.close()
            Path(pool.shards[2].path).unlink()
    causes = {cause for cause, _ in faults}
    assert causes == {
        "whose image cannot be decoded",
        "with more pixels than Pillow decodes",
        "with a caption that is not UTF-8",
        "in a tar that cannot be opened (No such file or directory)",
    } or (num_workers and len(causes) == 3)  # a worker may keep the deleted file open
    for row in (1, 2, 3, 4):
        assert any(place.endswith(f":{row:09d}") for _, place in faults)


def test_rare_formats_are_decoded_and_counted(
    make_samples: Make,
    write_pool: Make,
    load_pool: Callable[..., Pool],
    make_dataset: MakeDataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = make_samples(12)
    for row, kind in {1: "GIF", 4: "BMP", 5: "TIFF", 9: "TIFF"}.items():
        buffer = io.BytesIO()
        Image.open(io.BytesIO(samples[row].image)).save(buffer, format=kind)
        samples[row].image = buffer.getvalue()
    dataset = make_dataset(load_pool(write_pool(samples)), substitutes=None)
    counts = LoadCounts(owner="pool", max_bad_fraction=0)
    for start in (0, 6):
        batch = dataset.__getitems__([(row, row) for row in range(start, start + 6)])
        assert batch.valid.all()
        counts.add(batch)
    restored = LoadCounts(owner="pool", max_bad_fraction=0)
    restored.load_state_dict(counts.state_dict())
    with caplog.at_level("INFO"):
        restored.say_at_end()
    expected = "training: 4 of 12 images are no JPEG, PNG or WEBP: 2 TIFF, 1 BMP, 1 GIF"
    assert caplog.messages == [expected]
    old = {name: value for name, value in counts.state_dict().items() if name != "formats"}
    restored.load_state_dict(old)  # of a checkpoint that was written before they were counted
    assert not restored.formats


def test_long_image_is_a_bad_sample_where_it_would_be_resized_as_a_whole(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], tokenizer: Tokenizer
) -> None:
    """As in embedding: 1 x 50,000 pixels whose shorter side becomes 224."""
    samples = make_samples(12)
    buffer = io.BytesIO()
    Image.new("RGB", (50_000, 1)).save(buffer, format="PNG")
    samples[3].image, samples[3].image_suffix = buffer.getvalue(), "png"
    dataset = SampleDataset(
        reader=SampleReader(pool=load_pool(write_pool(samples)), max_image_pixels=10**6),
        transform=image_transform_v2(PreprocessCfg(size=224), is_train=False),
        tokenizer=tokenizer,
        seed=0,
        substitutes=None,
    )
    batch = dataset.__getitems__([(2, 2), (3, 3)])
    assert batch.valid.tolist() == [True, False]
    cause = "with more pixels than max_image_pixels once its shorter side has 224"
    assert batch.faults == ((cause, "00000000.tar:000000003"),)
