"""The samples of a task: where their images are, and labels, captions or metadata, read at once.

The tars are read by our own reader, not by clip_benchmark's `build_wds_dataset`, because that one
fails with more workers than tars and with spawned workers, unpickles members such as `.pyd` and
`.pth` with webdataset's default decoders, and hands addresses to a shell for `curl`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siftclip.datamodules.index.tar_walk import (
    LocalTar,
    Member,
    TarSample,
    TruncatedTarError,
    walk_tar,
)
from siftclip.errors import InputError
from siftclip.eval.tasks.task import CLASSNAMES_FILE, Task, TaskKind
from siftclip.file_identity import FileIdentity

LABEL_SUFFIXES: dict[TaskKind, str] = {
    "classification": "cls",
    "multilabel": "npy",
    "retrieval": "txt",
    "image_caption_selection": "txt",
    "association": "json",
}
METADATA_SUFFIX = "npy"
CHANGED = "Evaluate again when nothing writes to it."
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # clip_benchmark's order of preference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSamples:
    """What the tars of a task hold, in their order, but for the images themselves.

    n samples have m >= n images: those of sample i are `first_image[i]` to `first_image[i + 1]`.
    """

    task: Task
    keys: np.ndarray  # str [n]
    places: np.ndarray  # int64 [m, 3]: which of the task's tars, offset and size in bytes
    first_image: np.ndarray  # int64 [n + 1]
    labels: np.ndarray | None  # int64 [n], or bool [n, classes] of a multilabel task
    captions: tuple[tuple[str, ...], ...]  # of each sample; the cue of an association task
    associations: tuple[np.ndarray, ...]  # bool [candidates] of each sample; association tasks
    metadata: np.ndarray | None  # int64 [n, fields], of tasks with special metrics
    identities: tuple[FileIdentity, ...] = ()  # of the task's tars when they were indexed

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> TaskSamples:
        """Take some of the samples, by ascending int64 rows."""
        counts = np.diff(self.first_image)[rows]
        starts = self.first_image[rows]
        first = np.concatenate([[0], np.cumsum(counts)])
        images = np.repeat(starts - first[:-1], counts) + np.arange(first[-1])
        return replace(
            self,
            keys=self.keys[rows],
            places=self.places[images],
            first_image=first,
            labels=None if self.labels is None else self.labels[rows],
            captions=tuple(self.captions[row] for row in rows) if self.captions else (),
            associations=tuple(self.associations[row] for row in rows) if self.associations else (),
            metadata=None if self.metadata is None else self.metadata[rows],
        )


def read_samples(task: Task, *, max_samples: int | None = None) -> TaskSamples:
    """Index the tars of a task.

    Args:
        task: where they are.
        max_samples: keep this many, the same ones at each call: those whose keys hash lowest.

    Raises:
        InputError: a tar is damaged or empty, or changes meanwhile, a sample lacks its image or
            label, a label is wrong, or several samples have one name. Evaluation tolerates no bad
            sample: the metrics would not be those of the task.
    """
    keys: list[str] = []
    rows: list[_Label] = []
    places: list[tuple[int, int, int]] = []
    counts: list[int] = []
    identities: list[FileIdentity] = []
    for number, shard in enumerate(task.shards):
        before = len(keys)
        identities.append(FileIdentity.of(shard))
        with shard.open("rb") as file, LocalTar(shard) as tar:
            try:
                for sample in walk_tar(
                    tar, content_of=LABEL_SUFFIXES[task.kind], key_split=task.key_split
                ):
                    place = f"{shard}: {sample.key}"
                    _require_one_sample(sample, task, place)
                    images = _find_images(sample, task.kind, place)
                    rows.append(_read_label(file, sample, task, len(images), place))
                    keys.append(sample.key)
                    counts.append(len(images))
                    places += [(number, image.offset_bytes, image.size_bytes) for image in images]
            except TruncatedTarError as error:
                raise InputError(f"{error}. Copy this task again.") from None
        identities[-1].require(shard, CHANGED)
        if len(keys) == before:
            raise InputError(f"{shard} must hold samples. It has none. Copy this task again.")
    values = [row.value for row in rows if row.value is not None]
    metadata = [row.metadata for row in rows if row.metadata is not None]
    samples = TaskSamples(
        task=task,
        keys=np.asarray(keys, dtype=np.str_),
        places=np.asarray(places, dtype=np.int64),
        first_image=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        labels=np.asarray(values) if values else None,
        captions=tuple(row.captions for row in rows if row.captions),
        associations=tuple(row.associated for row in rows if row.associated is not None),
        metadata=_stack_metadata(metadata, task),
        identities=tuple(identities),
    )
    _check_counts(samples)
    _warn_of_classes(samples)
    if max_samples is None or len(samples) <= max_samples:
        return samples
    return samples.take(_lowest_hashes(keys, max_samples))


def _lowest_hashes(keys: Iterable[str], count: int) -> np.ndarray:
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    hashes = np.frombuffer(b"".join(digests), dtype="<u8")
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def _require_one_sample(sample: TarSample, task: Task, place: str) -> None:
    """Refuse members of several samples under one key, which would be evaluated as one."""
    names = sample.names()
    listed = f"{', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
    if sample.repeats():
        raise InputError(
            f"{place}: a sample of a task must have one member of each suffix. Here are {listed}: "
            "several samples share one name. Copy this task again with a name for each."
        )
    if sample.hidden_pairs(IMAGE_SUFFIXES, (LABEL_SUFFIXES[task.kind],)):
        raise InputError(
            f"{place}: several samples have one key, which webdataset ends at the first dot: "
            f"{listed}. End it at the last dot: last_dot as the key split."
        )


def _find_images(sample: TarSample, kind: TaskKind, place: str) -> list[Member]:
    """Find the one image of a sample, or its numbered images in their order."""
    single = sample.find(*IMAGE_SUFFIXES)
    if single is not None and kind != "association":
        return [single]
    numbered = {}
    if kind in ("association", "image_caption_selection"):
        for member in sample.members:
            number, _, suffix = member.suffix.partition(".")
            if suffix in IMAGE_SUFFIXES and number.isdecimal() and len(number) < 5:
                numbered[int(number)] = member
    if not numbered or sorted(numbered) != list(range(len(numbered))):
        wanted = " or .".join(IMAGE_SUFFIXES)
        if kind in ("association", "image_caption_selection"):
            wanted += ", or images .0.jpg, .1.jpg and so on,"
        raise InputError(
            f"{place}: a sample of a {kind} task must have a .{wanted} member. "
            f"It has {[member.suffix for member in sample.members]}."
        )
    return [numbered[number] for number in range(len(numbered))]


class _Label(NamedTuple):
    value: int | np.ndarray | None = None
    captions: tuple[str, ...] = ()
    associated: np.ndarray | None = None
    metadata: np.ndarray | None = None


def _read_label(file: Any, sample: TarSample, task: Task, images: int, place: str) -> _Label:
    suffix = LABEL_SUFFIXES[task.kind]
    member = sample.find(suffix)
    metadata = None
    if task.special is not None:
        metadata = _read_metadata(file, sample, place)
    if task.special == "faces":  # what is to be told stands in the metadata
        return _Label(metadata=metadata)
    if member is None:
        raise InputError(
            f"{place}: a sample of a {task.kind} task must have a .{suffix} member. "
            f"It has {[member.suffix for member in sample.members]}."
        )
    data = member.content or b""
    if task.kind == "classification":
        return _Label(value=_class_number(data, task, place), metadata=metadata)
    if task.kind == "multilabel":
        return _Label(value=_multi_hot(data, task, place))
    if task.kind == "association":
        return _association(data, images, place)
    return _Label(captions=_captions(data, place))


def _captions(data: bytes, place: str) -> tuple[str, ...]:
    try:
        captions = tuple(data.decode("utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: the captions must be UTF-8 text: {error}.") from None
    if not captions:
        raise InputError(f"{place}: there must be at least one caption. The .txt member is empty.")
    for number, caption in enumerate(captions, start=1):
        if not caption.strip():
            raise InputError(f"{place}: a caption must not be blank. Line {number} of .txt is.")
    return captions


def _class_number(data: bytes, task: Task, place: str) -> int:
    classes = len(task.classnames)
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


def _load_array(data: bytes) -> np.ndarray | None:
    try:
        # np.load is safe without pickles, and a damaged array raises anything, MemoryError too
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    except Exception:
        return None


def _multi_hot(data: bytes, task: Task, place: str) -> np.ndarray:
    classes = len(task.classnames)
    hot = _load_array(data)
    if hot is None or hot.shape != (classes,) or not np.isin(hot, (0, 1)).all():
        raise InputError(
            f"{place}: the label must be an npy array of {classes} zeros and ones, as "
            f"{CLASSNAMES_FILE} has {classes} lines."
        )
    return hot.astype(np.bool_)


def _read_metadata(file: Any, sample: TarSample, place: str) -> np.ndarray:
    member = sample.find(METADATA_SUFFIX)
    values = None
    if member is not None:
        file.seek(member.offset_bytes)
        values = _load_array(file.read(member.size_bytes))
    if values is None or values.ndim != 1 or values.dtype.kind not in "iufb":
        raise InputError(
            f"{place}: a sample of this task must have a .{METADATA_SUFFIX} member with an array "
            "of numbers, such as region and year, which its metrics are by."
        )
    if not np.array_equal(values, np.trunc(values)):  # NaN too
        raise InputError(f"{place}: the metadata must be whole numbers. Got {values.tolist()}.")
    return values.astype(np.int64)


def _stack_metadata(rows: list[np.ndarray], task: Task) -> np.ndarray | None:
    if not rows:
        return None
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InputError(
            f"{task.root / task.split}: all samples must have as many fields of metadata. They "
            f"have {sorted(lengths)}."
        )
    return np.stack(rows)


def _association(data: bytes, images: int, place: str) -> _Label:
    try:
        record = json.loads(data)
        cue, chosen = record["cue"], np.asarray(record["associations"])
        valid = isinstance(cue, str) and cue.strip() and chosen.ndim == 1 and chosen.dtype == int
        valid = valid and len(chosen) > 0 and set(chosen.tolist()) <= set(range(images))
    except (KeyError, TypeError, ValueError, RecursionError):  # the last of a thousand brackets
        valid = False
    if not valid:
        raise InputError(
            f'{place}: the .json member must be {{"cue": a text, "associations": [numbers of '
            f"images from 0 to {images - 1}]}}. Got {data[:80]!r}."
        )
    return _Label(captions=(cue,), associated=np.isin(np.arange(images), chosen))


def _check_counts(samples: TaskSamples) -> None:
    """Check that samples of a selection between captions have equally many images and captions."""
    if samples.task.kind != "image_caption_selection":
        return
    images, captions = np.diff(samples.first_image), np.asarray([*map(len, samples.captions)])
    for name, counts in (("images", images), ("captions", captions)):
        odd = np.flatnonzero(counts != counts[0])
        if len(odd):
            raise InputError(
                f"{samples.task.root}: every sample must have as many {name} as the first, "
                f"{counts[0]}. {samples.keys[odd[0]]} has {counts[odd[0]]}."
            )


def _warn_of_classes(samples: TaskSamples) -> None:
    """Point out classes that no model can tell apart, and those that nothing is asked about."""
    task = samples.task
    if not task.has_classes or task.special == "faces":  # whose lines name several objectives
        return
    equal = [name for name, count in Counter(task.classnames).items() if count > 1]
    if equal:
        log.warning(
            "%s: these class names stand in more than one line, and zero-shot takes the first of "
            "equal classes: %s",
            task.name, ", ".join(map(repr, equal)),
        )  # fmt: skip
    # DataComp's tasks with metrics of their own do have classes without samples.
    if task.kind == "classification" and task.special is None and samples.labels is not None:
        classes = len(task.classnames)
        empty = classes - len(np.unique(samples.labels))
        if empty:
            log.warning(
                "%s: %d of %d classes have no sample in the split %r: do the class names belong "
                "to these labels?",
                task.name, empty, classes, task.split,
            )  # fmt: skip


def tar_of(samples: TaskSamples, image: int) -> Path:
    """Return the tar that holds an image of the task."""
    return samples.task.shards[int(samples.places[image, 0])]
