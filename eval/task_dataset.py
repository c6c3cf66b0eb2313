"""The samples of a task, read from its tars.

The tars are read by our own reader, not by clip_benchmark's `build_wds_dataset`, because that one
fails with more workers than tars and with spawned workers, warns on each use (numbers 2, 10 and 14
in `clip_benchmark_fixes`), unpickles members such as `.pyd` and `.pth` with webdataset's default
decoders, and hands addresses to a shell for `curl`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from siftclip.datamodules.tar_walk import (
    LocalTar,
    Member,
    TarSample,
    TruncatedTarError,
    walk_tar,
)
from siftclip.eval.tasks import CLASSNAMES_FILE, Task, TaskKind
from siftclip.selectors.errors import InputError

LABEL_SUFFIXES: dict[TaskKind, str] = {
    "classification": "cls",
    "multilabel": "npy",
    "retrieval": "txt",
}
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # clip_benchmark's order of preference
# What Pillow may take the bytes for. Left to itself it tries all it knows, and some of its
# decoders, EPS for one, start another program. MPO is a JPEG with a second picture inside.
IMAGE_FORMATS = ("WEBP", "PNG", "JPEG", "MPO")


class TaskDataset(Dataset[tuple[Any, Any]]):
    """The samples of a task in the order of its tars: (transformed image, label).

    A label is an int (classification), float32 [classes] of 0 and 1 (multilabel) or a list of
    captions (retrieval). Labels are read at once, images on demand. `classes` and `templates`
    are what clip_benchmark looks for: lists, or None for retrieval.
    """

    def __init__(self, task: Task, transform: Callable[[Image.Image], Any]) -> None:
        """Index the tars.

        Raises:
            InputError: a tar is damaged, a sample lacks its image or label, or a label is wrong.
                Evaluation tolerates no bad sample: the metrics would not be those of the task.
        """
        self.task = task
        self.transform = transform
        self.classes = list(task.classnames) or None
        self.templates = list(task.templates) or None
        self.labels: list[Any] = []
        keys: list[str] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(task.shards):
            with shard.open("rb") as file, LocalTar(shard) as tar:
                try:
                    for sample in walk_tar(tar):
                        image, label = _find_members(shard, sample, task.kind)
                        self.labels.append(_read_label(file, label, task, f"{shard}: {sample.key}"))
                        keys.append(sample.key)
                        places.append((number, image.offset_bytes, image.size_bytes))
                except TruncatedTarError as error:
                    raise InputError(f"{error}. Copy this task again.") from None
        if not keys:
            raise InputError(f"{task.root / task.split} must hold samples. Its tars are empty.")
        self._keys = np.asarray(keys, dtype=np.str_)
        self._places = np.asarray(places, dtype=np.int64)  # [n, 3]: tar, offset, size

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One sample.

        Raises:
            InputError: the image cannot be decoded.
        """
        shard_number, offset_bytes, size_bytes = self._places[index].tolist()
        shard = self.task.shards[shard_number]
        with shard.open("rb") as file:
            file.seek(offset_bytes)
            data = file.read(size_bytes)
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).convert("RGB")
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            raise InputError(
                f"{shard}: {self._keys[index]}: the image cannot be decoded: {error}. "
                "Copy this task again."
            ) from None
        return self.transform(image), self.labels[index]


def _find_members(shard: Path, sample: TarSample, kind: TaskKind) -> tuple[Member, Member]:
    found = [sample.find(suffix) for suffix in IMAGE_SUFFIXES]
    image = next((member for member in found if member is not None), None)
    label = sample.find(LABEL_SUFFIXES[kind])
    if image is None or label is None:
        wanted = " or .".join(IMAGE_SUFFIXES) if image is None else LABEL_SUFFIXES[kind]
        raise InputError(
            f"{shard}: {sample.key}: a sample of a {kind} task must have a .{wanted} member. "
            f"It has {[member.suffix for member in sample.members]}."
        )
    return image, label


def _read_label(
    file: BinaryIO, member: Member, task: Task, place: str
) -> int | np.ndarray | list[str]:
    file.seek(member.offset_bytes)
    data = file.read(member.size_bytes)
    classes = len(task.classnames)
    if task.kind == "classification":
        try:
            label = int(data)
        except ValueError:
            label = -1
        if not 0 <= label < classes:
            raise InputError(
                f"{place}: the label must be a number from 0 to {classes - 1}, as "
                f"{CLASSNAMES_FILE} has {classes} lines. Got {data[:20]!r}."
            )
        return label
    if task.kind == "multilabel":
        try:
            # np.load is safe without pickles, and a damaged array raises anything, MemoryError too
            hot = np.load(io.BytesIO(data), allow_pickle=False)
            valid = hot.shape == (classes,) and bool(np.isin(hot, (0, 1)).all())
        except Exception:
            valid = False
        if not valid:
            raise InputError(
                f"{place}: the label must be an npy array of {classes} zeros and ones, as "
                f"{CLASSNAMES_FILE} has {classes} lines."
            )
        return hot.astype(np.float32)
    try:
        captions = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: the captions must be UTF-8 text: {error}.") from None
    if not captions:
        raise InputError(f"{place}: there must be at least one caption. The .txt member is empty.")
    return captions


def collate_captions(
    batch: Sequence[tuple[torch.Tensor, list[str]]],
) -> tuple[torch.Tensor, list[list[str]]]:
    """A batch of a retrieval task: images float32 [n, 3, size, size], and n lists of captions."""
    images, captions = zip(*batch, strict=True)
    return torch.stack(images), list(captions)
