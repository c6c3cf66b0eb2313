from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.pool.reader import decode_image
from siftclip.datamodules.streaming.image_transform import ImageTransform
from siftclip.errors import InputError
from siftclip.eval.encoding.encoder import EncodeOptions, Encoder
from siftclip.eval.tasks import images
from siftclip.eval.tasks.images import (
    ImageBatch,
    ImageDataset,
    ImageTable,
    content_id,
    distinct_images,
    image_ids,
    read_images,
)
from siftclip.eval.tasks.kinds.values import TaskSamples
from siftclip.eval.tasks.samples import read_samples
from siftclip.eval.tasks.task import find_tasks, read_task

MakeTask = Callable[..., Path]
MakeImage = Callable[..., bytes]


def open_tasks(root: Path, names: list[str] | None = None) -> list[TaskSamples]:
    return [read_samples(task) for task in find_tasks(root, names).tasks]


def write(make_task: MakeTask, root: Path, *contents: bytes, shards: int = 1) -> TaskSamples:
    """A task with these bytes for images, which need not be pictures here."""
    members = [[("jpg", data), ("cls", b"0")] for data in contents]
    return read_samples(read_task(make_task(root, members=members, shards=shards)))


def open_dataset(clip: ClipModel, table: ImageTable, pixels: int = 10**6) -> ImageDataset:
    return ImageDataset(table, ImageTransform(clip.eval_transform), max_image_pixels=pixels)


def finished(dataset: ImageDataset, batch: ImageBatch) -> torch.Tensor:
    """The batch's images as the model takes them."""
    normalization = dataset.transform.normalization
    assert normalization is not None
    return normalization(batch.images)


def test_images_are_shared_within_and_across_tasks(task_root: Path) -> None:
    """Pictures of one number and format have equal bytes in all tasks of the fixture.

    Candidates recur inside the tasks with several images a sample.
    """
    samples = open_tasks(task_root)
    table, rows = distinct_images(samples)
    contents = []
    for one, mine in zip(samples, rows, strict=True):
        assert mine.dtype == np.int64
        assert len(mine) == len(one.places)
        for tar, start, size in one.places.tolist():
            contents.append(one.task.shards[tar].read_bytes()[start : start + size])
    distinct = list(dict.fromkeys(contents))  # in the order of first occurrence
    assert len(distinct) < len(contents) - 20
    assert list(read_images(table)) == distinct
    numbers = np.concatenate(rows).tolist()
    assert numbers == [distinct.index(data) for data in contents]


@settings(max_examples=25)
@given(st.data())
def test_distinct_images_equal_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, make_task: MakeTask, data: st.DataObject
) -> None:
    """Few letters at the start, in the middle and at the end: all ways to differ and not to.

    Copies inside a task may stay apart, and all else is as with a dictionary.
    """
    letters = st.sampled_from([b"a", b"b"])
    sizes = st.sampled_from([0, 3, 70, 300])

    def build(size: int, first: bytes, middle: bytes, last: bytes) -> bytes:
        half = b"." * (size // 2)
        return (first + half + middle * (size > 0) + half + last)[: size or None]

    content = st.builds(build, sizes, letters, letters, letters)
    tasks = data.draw(st.lists(st.lists(content, min_size=1, max_size=6), min_size=1, max_size=3))
    root = tmp_path_factory.mktemp("drawn")
    samples = [write(make_task, root / str(i), *task) for i, task in enumerate(tasks)]
    table, rows = distinct_images(samples)
    contents = list(read_images(table))
    for task, mine in zip(tasks, rows, strict=True):
        assert [contents[row] for row in mine] == task
    numbers = np.concatenate(rows).tolist()
    assert list(dict.fromkeys(numbers)) == list(range(len(table)))  # first occurrences in order
    for content_of_row, row in zip(contents, range(len(table)), strict=True):
        owners = [number for number, task in enumerate(tasks) if content_of_row in task]
        if len(owners) > 1:
            assert contents.count(content_of_row) == 1
        else:
            assert row in rows[owners[0]]


def candidates(make_task: MakeTask, root: Path, *contents: tuple[bytes, ...]) -> TaskSamples:
    """An association task of these candidates."""
    members = [
        [
            *((f"{i}.jpg", data) for i, data in enumerate(images)),
            ("json", b'{"cue": "a", "associations": [0]}'),
        ]
        for images in contents
    ]
    return read_samples(read_task(make_task(root, "association", members=members, shards=1)))


def test_candidates_that_recur_are_one(tmp_path: Path, make_task: MakeTask) -> None:
    a, b, c = b"a" * 90, b"b" * 90, b"c" * 90
    table, (rows,) = distinct_images([candidates(make_task, tmp_path / "x", (a, b), (c, a))])
    assert rows.tolist() == [0, 1, 2, 0]
    assert table.names.tolist() == ["s0000", "s0000", "s0001"]
    assert table.names.dtype == object  # else a single long key is in each row


def test_equal_size_and_equal_middle_are_not_enough(tmp_path: Path, make_task: MakeTask) -> None:
    middle = b"m" * 200
    contents = [b"a" + middle + b"a", b"b" + middle + b"a", b"a" + middle + b"b"]
    contents += [b"c" * 202, contents[0]]
    one = write(make_task, tmp_path / "x", *contents[:3])
    other = write(make_task, tmp_path / "y", *contents[3:])
    table, (first, second) = distinct_images([one, other])
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 0]
    assert table.names.tolist() == ["s0000", "s0001", "s0002", "s0000"]


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads."""
    sizes: list[int] = []
    pread = images.os.pread

    def spy(file: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return pread(file, size, offset)

    monkeypatch.setattr(images.os, "pread", spy)
    return sizes


def test_little_is_read_where_nothing_is_shared(
    tmp_path: Path, make_task: MakeTask, wanted: list[int]
) -> None:
    """The same tar under two protocols is not read at all, nor a task for its own sake."""
    noise = np.random.default_rng(0)
    one = write(make_task, tmp_path / "x", *[noise.bytes(900 + i) for i in range(90)])
    other = write(make_task, tmp_path / "y", *[noise.bytes(909 + i) for i in range(90)])
    wanted.clear()
    table, _ = distinct_images([one, other])
    assert len(table) == 180
    assert wanted == [64] * 128  # 64 sizes of the 81 that both have
    equal = write(make_task, tmp_path / "z", *[noise.bytes(900) for i in range(20)])
    wanted.clear()
    table, (first, second) = distinct_images([equal, equal])
    assert (len(table), wanted) == (20, [])
    assert first.tolist() == second.tolist() == list(range(20))


def test_sharing_is_found_among_images_of_equal_size(
    tmp_path: Path, make_task: MakeTask, wanted: list[int]
) -> None:
    """A quarter of a task's images is another's, and by chance the others have common sizes, too.

    A third task that shares nothing is not read on.
    """
    noise = np.random.default_rng(1)
    contents = [noise.bytes(900 + i) for i in range(160)]
    mixed = [contents[i] if i % 4 == 0 else noise.bytes(900 + i) for i in range(160)]
    one = write(make_task, tmp_path / "x", *contents)
    other = write(make_task, tmp_path / "y", *mixed)
    third = write(make_task, tmp_path / "z", *[noise.bytes(900 + i) for i in range(160)])
    wanted.clear()
    table, (first, second, _) = distinct_images([one, other, third])
    assert len(table) == 160 + 120 + 160
    assert np.array_equal(first == second, np.arange(160) % 4 == 0)
    assert wanted.count(64) == 3 * 64 + 2 * 160
    assert len(wanted) - wanted.count(64) == 2 * 40  # whole ones


def test_ids_are_of_the_content(task_root: Path, tmp_path: Path, make_task: MakeTask) -> None:
    a, b = b"one image", b"another image"
    table, _ = distinct_images([write(make_task, tmp_path / "x", a, b)])
    assert image_ids(table).tolist() == [content_id(a), content_id(b)]
    assert image_ids(table).dtype == np.uint64
    assert image_ids(table.take(np.asarray([1]))).tolist() == [content_id(b)]
    assert image_ids(table.take(np.empty(0, dtype=np.int64))).tolist() == []
    assert content_id(a) == 13385457190579710830  # caches outlive versions


def test_a_tar_that_changes_after_indexing(tmp_path: Path, make_task: MakeTask) -> None:
    samples = write(make_task, tmp_path / "x", b"a" * 2000, b"b" * 2000)
    other = write(make_task, tmp_path / "y", b"c" * 2000)
    tar = samples.task.shards[0]
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"0\.tar has changed since it was first read"):
        distinct_images([samples, other])
    tar.unlink()
    with pytest.raises(InputError, match=r"0\.tar cannot be read: No such file"):
        distinct_images([samples, other])


def test_images_of_another_tar_of_the_same_size(
    task_root: Path, clip: ClipModel, tmp_path: Path, make_task: MakeTask
) -> None:
    samples = write(make_task, tmp_path / "x", b"a" * 2000, b"b" * 2000)
    tar = samples.task.shards[0]
    table, _ = distinct_images([samples])
    dataset = open_dataset(clip, table)
    (fault,) = dataset.__getitems__([1]).faults
    assert "whose image cannot be decoded" in fault[1]
    other = tmp_path / "other.tar"
    other.write_bytes(tar.read_bytes().replace(b"b" * 2000, b"c" * 2000))
    shutil.copystat(tar, other)  # only the inode is another one
    other.replace(tar)
    with pytest.raises(InputError, match=r"0\.tar has changed since it was first read"):
        list(read_images(table))
    (fault,) = dataset.__getitems__([1]).faults
    assert "0.tar has changed since it was first read" in fault[1]
    again = read_samples(samples.task)
    with pytest.raises(InputError, match=r"0\.tar has changed since it was first read"):
        distinct_images([samples, again])  # as of two tasks that share a tar
    assert list(read_images(distinct_images([again])[0])) == [b"a" * 2000, b"c" * 2000]


def test_batches_are_transformed_as_open_clip_does(task_root: Path, clip: ClipModel) -> None:
    table, _ = distinct_images(open_tasks(task_root, ["things"]))
    dataset = open_dataset(clip, table)
    batch = dataset.__getitems__([5, 0, 6])
    assert batch.rows.tolist() == [5, 0, 6]
    assert batch.ids.tolist() == image_ids(table)[[5, 0, 6]].tolist()
    assert batch.faults == []
    contents = list(read_images(table))
    assert batch.images.dtype == torch.uint8  # loaders send a quarter of the bytes
    for row, image in zip([5, 0, 6], finished(dataset, batch), strict=True):
        expected = clip.eval_transform(decode_image(contents[row], 10**6))
        assert torch.equal(image, expected)
    assert torch.equal(dataset[6].images[0], batch.images[2])


def _eps() -> bytes:
    # Pillow would start Ghostscript for this one
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("cut", [0, 40, 300, None])
def test_a_fault_is_told_and_the_others_are_there(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, clip: ClipModel, cut: int | None
) -> None:
    data = _eps() if cut is None else make_image(1, "JPEG")[:cut]
    good = make_image(0, "JPEG")
    table, _ = distinct_images([write(make_task, tmp_path / "x", good, data)])
    dataset = open_dataset(clip, table)
    batch = dataset.__getitems__([1, 0])
    ((row, message),) = batch.faults
    assert row == 1
    assert str(tmp_path / "x" / "test" / "0.tar: s0001: a sample whose image cannot") in message
    assert message.endswith("Copy this task again.")
    expected = clip.eval_transform(decode_image(good, 10**6))
    assert torch.equal(finished(dataset, batch)[1], expected)
    assert not batch.images[0].any()
    assert batch.ids.tolist() == [content_id(data), content_id(good)]


def test_faults_that_copying_does_not_mend(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, clip: ClipModel
) -> None:
    samples = write(make_task, tmp_path / "x", make_image(0))
    table, _ = distinct_images([samples])
    ((_, message),) = open_dataset(clip, table, pixels=36 * 33 - 1)[0].faults
    assert message.endswith("s0000: a sample with more pixels than max_image_pixels.")
    assert open_dataset(clip, table, pixels=36 * 33)[0].faults == []
    samples.task.shards[0].unlink()
    ((_, message),) = open_dataset(clip, table)[0].faults
    assert message.endswith("0.tar cannot be read: No such file or directory.")


@pytest.mark.parametrize("resize", ["pillow", "torch"])
@pytest.mark.parametrize("upright", [True, False])
def test_a_long_picture_is_not_resized(
    tmp_path: Path, make_task: MakeTask, clip: ClipModel, resize: Any, upright: bool
) -> None:
    """One row of pixels that a resize would make 32 rows of 32 times as many."""

    def png(length: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (1, length) if upright else (length, 1)).save(buffer, "PNG")
        return buffer.getvalue()

    samples = write(make_task, tmp_path / "x", png(10**5), png(977), png(976), png(101), png(100))
    table, _ = distinct_images([samples])
    transform = ImageTransform(clip.eval_transform, resize)
    asked: list[int] = []
    transform.steps = (lambda image: asked.append(1) or image, *transform.steps)
    dataset = ImageDataset(table, transform, max_image_pixels=10**6)
    asked.clear()
    faults = dict(dataset.__getitems__([0, 1, 2]).faults)
    assert sorted(faults) == [0, 1]  # 10^6 / 32^2 = 976.6
    assert len(asked) == 1
    assert faults[0].endswith(
        "s0000: a sample with more pixels than max_image_pixels once its shorter side has 32."
    )
    small = ImageDataset(table, transform, max_image_pixels=200)
    assert [row for row, _ in small.__getitems__([3, 4]).faults] == [3]


@pytest.mark.parametrize(("error", "words"), [(MemoryError(), "MemoryError"), (OSError("x"), "x")])
def test_a_step_that_fails_is_a_fault_of_the_image(
    task_root: Path, clip: ClipModel, error: Exception, words: str
) -> None:
    table, _ = distinct_images(open_tasks(task_root, ["things"]))
    dataset = open_dataset(clip, table)

    def fail(image: Any) -> Any:
        raise error

    good = dataset[3].images
    dataset.transform.steps = (fail,)
    batch = dataset[3]
    ((row, message),) = batch.faults
    assert row == 3
    assert message.endswith(f"s0003: a sample whose image cannot be resized: {words}.")
    assert batch.ids.tolist() == image_ids(table)[[3]].tolist()
    assert batch.images.shape == good.shape


def test_a_dataset_is_small_when_pickled(task_root: Path, clip: ClipModel) -> None:
    table, _ = distinct_images(open_tasks(task_root))
    dataset = open_dataset(clip, table)
    data = pickle.dumps(dataset)
    assert len(data) < 10_000 + 100 * len(table)
    again = pickle.loads(data)  # noqa: S301 - our own bytes
    assert torch.equal(again[3].images, dataset[3].images)


@torch.no_grad()
def test_rare_formats_are_decoded_and_counted_once(
    tmp_path: Path,
    make_task: MakeTask,
    make_image: MakeImage,
    clip: ClipModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pictures = [make_image(row, kind) for row, kind in enumerate(("JPEG", "GIF", "BMP", "TIFF"))]
    samples = write(make_task, tmp_path / "x", *pictures)
    table, (rows,) = distinct_images([samples])
    batch = open_dataset(clip, table)[1]
    assert batch.formats == ("GIF",)
    expected = clip.eval_transform(decode_image(pictures[1], 10**6))
    assert torch.equal(finished(open_dataset(clip, table), batch)[0], expected)
    options = EncodeOptions(device=torch.device("cpu"), batch_size=2, progress=False)
    ready = replace(clip, model=copy.deepcopy(clip.model).eval())
    with caplog.at_level("INFO", logger="siftclip.eval.encoding"):
        (features,) = Encoder(ready, options).image_sets(table, [rows])
    assert features.faults == {}
    (message,) = [record.message for record in caplog.records if record.levelname == "INFO"]
    assert message == "tasks: 3 of 4 images are no JPEG, PNG or WEBP: 1 BMP, 1 GIF, 1 TIFF"
