from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.datasets.builder import build_wds_dataset
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from siftclip.datamodules.clip_models import ClipModel
from siftclip.eval.task_dataset import TaskDataset, collate_captions
from siftclip.eval.tasks import find_tasks, read_task
from siftclip.selectors.errors import InputError

MakeTask = Callable[..., Path]
MakeImage = Callable[..., bytes]


def open_task(root: Path, transform: Callable[..., Any] = pil_to_tensor) -> TaskDataset:
    return TaskDataset(read_task(root), transform)


@pytest.mark.parametrize("name", ["things", "few", "many_labels", "captions"])
@pytest.mark.filterwarnings("ignore:.*shardshuffle")  # clip_benchmark's, number 14
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tars open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the same, later
def test_samples_are_those_of_clip_benchmark(task_root: Path, name: str) -> None:
    theirs = build_wds_dataset(name, pil_to_tensor, data_dir=str(task_root / f"wds_{name}"))
    ours = open_task(task_root / f"wds_{name}")
    expected = list(theirs)
    assert len(ours) == len(expected) > 5
    assert ours.classes == theirs.classes
    assert ours.templates == theirs.templates
    for i, (image, label) in enumerate(expected):
        assert torch.equal(ours[i][0], image)
        assert ours[i][0].shape == (3, 33, 36)
        if name == "many_labels":
            assert ours[i][1].dtype == np.float32
            np.testing.assert_array_equal(ours[i][1], label)
        else:
            assert ours[i][1] == label


def test_the_preferred_image_is_that_of_clip_benchmark(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage
) -> None:
    images = {"jpg": make_image(1, "JPEG"), "png": make_image(2)}
    root = make_task(tmp_path / "x", members=[[*images.items(), ("cls", b"0")]], shards=1)
    dataset = open_task(root)
    other = make_task(tmp_path / "y", members=[[("png", images["png"]), ("cls", b"0")]], shards=1)
    assert torch.equal(dataset[0][0], open_task(other)[0][0])


def test_spawned_worker(task_root: Path) -> None:
    """Number 10 of clip_benchmark's faults."""
    dataset = open_task(task_root / "wds_few", np.asarray)  # without torchvision it starts sooner
    loader = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    images, labels = zip(*loader, strict=True)
    np.testing.assert_array_equal(torch.cat(images), [dataset[i][0] for i in range(7)])
    assert torch.cat(labels).tolist() == [i % 3 for i in range(7)]


def test_captions_collate_to_lists(task_root: Path) -> None:
    dataset = open_task(task_root / "wds_captions")
    images, captions = next(iter(DataLoader(dataset, batch_size=3, collate_fn=collate_captions)))
    assert images.shape == (3, 3, 33, 36)
    assert captions == [
        ["picture 0"],
        ["picture 1", "größer than 1"],
        ["picture 2", "größer than 2", "a photo"],
    ]


def test_it_warns_of_nothing(task_root: Path) -> None:
    """Number 14 of clip_benchmark's faults."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in find_tasks(task_root):
            dataset = TaskDataset(task, pil_to_tensor)
            assert len([dataset[i] for i in range(len(dataset))]) == len(dataset)


class Bomb:
    exploded = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return setattr, (Bomb, "exploded", True)


def test_pickles_are_never_loaded(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, make_npy: Callable[..., bytes]
) -> None:
    bomb = make_npy(np.array([Bomb()], dtype=object))
    root = make_task(
        tmp_path / "multi", "multilabel", classes=1, shards=1,
        members=[[("png", make_image(0)), ("npy", bomb)]],
    )  # fmt: skip
    with pytest.raises(InputError, match="s0000: the label must be an npy array of 1 zeros"):
        open_task(root)
    members = [[("png", make_image(0)), ("pyd", pickle.dumps(Bomb())), ("cls", b"0")]]
    assert open_task(make_task(tmp_path / "single", members=members, shards=1))[0][1] == 0
    assert not Bomb.exploded


@pytest.mark.parametrize("label", [b"6", b"-1", b"cat", b"", b"1.0"])
def test_label_out_of_range(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, label: bytes
) -> None:
    root = make_task(tmp_path / "x", members=[[("png", make_image(0)), ("cls", label)]], shards=1)
    message = (
        rf"0\.tar: s0000: the label must be a number from 0 to 5, .* Got {re.escape(repr(label))}"
    )
    with pytest.raises(InputError, match=message):
        open_task(root)


@pytest.mark.parametrize(
    "label", [np.ones(5), np.ones((1, 6)), np.full(6, 2), np.full(6, np.nan), np.array(["a"] * 6)]
)
def test_multi_hot_label_of_another_form(
    tmp_path: Path,
    make_task: MakeTask,
    make_image: MakeImage,
    make_npy: Callable[..., bytes],
    label: np.ndarray,
) -> None:
    members = [[("png", make_image(0)), ("npy", make_npy(label))]]
    root = make_task(tmp_path / "x", "multilabel", members=members, shards=1)
    with pytest.raises(InputError, match=r"0\.tar: s0000: the label must be an npy array of 6"):
        open_task(root)


@pytest.mark.parametrize(
    ("captions", "message"), [(b"", "at least one caption"), (b"\xff", "must be UTF-8")]
)
def test_captions_that_are_none(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, captions: bytes, message: str
) -> None:
    members = [[("png", make_image(0)), ("txt", captions)]]
    root = make_task(tmp_path / "x", "retrieval", members=members, shards=1)
    with pytest.raises(InputError, match=rf"0\.tar: s0000: .*{message}"):
        open_task(root)


def test_members_are_missing(tmp_path: Path, make_task: MakeTask, make_image: MakeImage) -> None:
    only_label = make_task(tmp_path / "a", members=[[("cls", b"0")]], shards=1)
    with pytest.raises(InputError, match=r"s0000: .* a \.webp or \.png .* It has \['cls'\]"):
        open_task(only_label)
    only_image = make_task(tmp_path / "b", members=[[("png", make_image(0))]], shards=1)
    with pytest.raises(InputError, match=r"s0000: .* a \.cls member. It has \['png'\]"):
        open_task(only_image)


def test_no_samples(tmp_path: Path, make_task: MakeTask) -> None:
    with pytest.raises(InputError, match=r"x/test must hold samples"):
        open_task(make_task(tmp_path / "x", members=[]))


def test_truncated_tar(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "x")
    tar = root / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"1\.tar ends after 5000 bytes.*Copy this task again"):
        open_task(root)
    tar.write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"1\.tar"):
        open_task(root)


def _eps() -> bytes:
    # Pillow would start Ghostscript for this one
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("cut", [0, 40, 300, None])
def test_undecodable_image(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, cut: int | None
) -> None:
    data = _eps() if cut is None else make_image(1, "JPEG")[:cut]
    members = [[("jpg", image), ("cls", b"0")] for image in (make_image(0, "JPEG"), data)]
    dataset = open_task(make_task(tmp_path / "x", members=members, shards=1))
    dataset[0]
    with pytest.raises(InputError, match=r"0\.tar: s0001: the image cannot be decoded: .*Copy"):
        dataset[1]


def test_a_worker_passes_the_error_on(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "x", members=[[("png", b"?"), ("cls", b"0")]], shards=1)
    iterator = iter(DataLoader(open_task(root), num_workers=1))
    with pytest.raises(InputError, match="s0000: the image cannot be decoded"):
        next(iterator)
    iterator._shutdown_workers()  # left to the garbage collector, this waits for five seconds


def test_the_transform_gets_rgb(task_root: Path) -> None:
    modes: list[str] = []
    dataset = open_task(task_root / "wds_things", lambda image: modes.append(image.mode))
    for i in range(len(dataset)):
        dataset[i]
    assert set(modes) == {"RGB"}


def test_the_transform_of_open_clip_travels_to_workers(task_root: Path, clip: ClipModel) -> None:
    dataset = TaskDataset(read_task(task_root / "wds_things"), clip.eval_transform)
    data = pickle.dumps(dataset)
    assert len(data) < 20_000
    assert torch.equal(pickle.loads(data)[3][0], dataset[3][0])  # noqa: S301 - our own bytes
