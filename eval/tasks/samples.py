"""The samples of a task: where their images are, and labels, captions or metadata, read at once.

The tars are read by our own reader, not by clip_benchmark's `build_wds_dataset`, because that one
fails with more workers than tars and with spawned workers, unpickles members such as `.pyd` and
`.pth` with webdataset's default decoders, and hands addresses to a shell for `curl`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from siftclip.datamodules.index.tar_walk import (
    LocalTar,
    Member,
    TarSample,
    TruncatedTarError,
    walk_tar,
)
from siftclip.errors import InputError
from siftclip.eval.tasks.kinds.base import ImagesOfSample, TaskKind
from siftclip.eval.tasks.kinds.parts import load_array
from siftclip.eval.tasks.kinds.registry import BUILT_IN, find_kind
from siftclip.eval.tasks.kinds.values import Label, Task, TaskSamples
from siftclip.file_identity import FileIdentity

METADATA_SUFFIX = "npy"
CHANGED = "Evaluate again when nothing writes to it."
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # clip_benchmark's order of preference
_ONE = f"a .{' or .'.join(IMAGE_SUFFIXES)} member"
_NUMBERED = "images .0.jpg, .1.jpg and so on, without a gap"
_WANTED_IMAGES: Mapping[ImagesOfSample, str] = {
    "one": _ONE,
    "numbered": f"numbered {_NUMBERED}",
    "one_or_numbered": f"{_ONE}, or numbered {_NUMBERED}",
}

log = logging.getLogger(__name__)


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
    kind = find_kind(task.kind)
    keys: list[str] = []
    labels: list[Label] = []
    metadata: list[np.ndarray] = []
    places: list[tuple[int, int, int]] = []
    counts: list[int] = []
    identities: list[FileIdentity] = []
    for number, shard in enumerate(task.shards):
        before = len(keys)
        identities.append(FileIdentity.of(shard))
        with shard.open("rb") as file, LocalTar(shard) as tar:
            try:
                for sample in walk_tar(tar, content_of=kind.suffix, key_split=task.key_split):
                    place = f"{shard}: {sample.key}"
                    _require_one_sample(sample, kind, place)
                    images = _find_images(sample, kind, place)
                    if task.special is not None:
                        metadata.append(_read_metadata(file, sample, place))
                    if task.has_labels:
                        labels.append(_read_label(sample, kind, task, len(images), place))
                    keys.append(sample.key)
                    counts.append(len(images))
                    places += [(number, image.offset_bytes, image.size_bytes) for image in images]
            except TruncatedTarError as error:
                raise InputError(f"{error}. Copy this task again.") from None
        identities[-1].require(shard, CHANGED)
        if len(keys) == before:
            raise InputError(f"{shard} must hold samples. It has none. Copy this task again.")
    samples = TaskSamples(
        task=task,
        keys=np.asarray(keys, dtype=np.str_),
        places=np.asarray(places, dtype=np.int64),
        first_image=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        labels=_stack([label.value for label in labels if label.value is not None], task),
        captions=tuple(label.captions for label in labels if label.captions),
        associations=tuple(label.associated for label in labels if label.associated is not None),
        metadata=_stack_metadata(metadata, task),
        identities=tuple(identities),
    )
    _require_alike(samples)
    _warn_of_equal_classes(task)
    kind.check_samples(samples)
    if max_samples is None or len(samples) <= max_samples:
        return samples
    return samples.take(_lowest_hashes(keys, max_samples))


def _lowest_hashes(keys: Iterable[str], count: int) -> np.ndarray:
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    hashes = np.frombuffer(b"".join(digests), dtype="<u8")
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def _require_one_sample(sample: TarSample, kind: TaskKind, place: str) -> None:
    """Refuse members of several samples under one key, which would be evaluated as one."""
    names = sample.names()
    listed = f"{', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
    if sample.repeats():
        raise InputError(
            f"{place}: a sample of a task must have one member of each suffix. Here are {listed}: "
            "several samples share one name. Copy this task again with a name for each."
        )
    if sample.hidden_pairs(IMAGE_SUFFIXES, (kind.suffix,)):
        raise InputError(
            f"{place}: several samples have one key, which webdataset ends at the first dot: "
            f"{listed}. End it at the last dot: last_dot as the key split."
        )


def _find_images(sample: TarSample, kind: TaskKind, place: str) -> list[Member]:
    """Find the one image of a sample, or its numbered images in their order."""
    single = sample.find(*IMAGE_SUFFIXES)
    if single is not None and kind.images != "numbered":
        return [single]
    numbered = {}
    if kind.images != "one":
        for member in sample.members:
            number, _, suffix = member.suffix.partition(".")
            if suffix in IMAGE_SUFFIXES and number.isdecimal() and len(number) < 5:
                numbered[int(number)] = member
    if not numbered or sorted(numbered) != list(range(len(numbered))):
        raise InputError(
            f"{place}: a sample of the kind {kind.name} must have {_WANTED_IMAGES[kind.images]}. "
            f"It has {[member.suffix for member in sample.members]}.{_way_out(sample, kind)}"
        )
    return [numbered[number] for number in range(len(numbered))]


def _way_out(sample: TarSample, kind: TaskKind) -> str:
    """Say how the author of a kind declares the images that a sample has, if it has other ones."""
    if BUILT_IN.get(kind.name) is kind:
        return ""
    fitting: ImagesOfSample | None = None
    if kind.images == "numbered" and sample.find(*IMAGE_SUFFIXES):
        fitting = "one"
    elif kind.images == "one" and sample.find(*(f"0.{suffix}" for suffix in IMAGE_SUFFIXES)):
        fitting = "numbered"
    if fitting is None:
        return ""
    return f' If these are right, set images = "{fitting}" in the class {type(kind).__name__}.'


def _read_label(sample: TarSample, kind: TaskKind, task: Task, images: int, place: str) -> Label:
    member = sample.find(kind.suffix)
    if member is None:
        raise InputError(
            f"{place}: a sample of the kind {kind.name} must have a .{kind.suffix} member. "
            f"It has {[member.suffix for member in sample.members]}."
        )
    try:
        return kind.read_label(member.content or b"", task, images)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None


def _read_metadata(file: BinaryIO, sample: TarSample, place: str) -> np.ndarray:
    member = sample.find(METADATA_SUFFIX)
    values = None
    if member is not None:
        file.seek(member.offset_bytes)
        values = load_array(file.read(member.size_bytes))
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


def _stack(values: list[int | float | np.ndarray], task: Task) -> np.ndarray | None:
    """Stack the values of labels, where there are any, to numbers [n, ...]."""
    if not values:
        return None
    shapes = {np.shape(value) for value in values}
    labels = np.asarray(values) if len(shapes) == 1 else None
    if labels is None or labels.dtype.kind not in "biuf":
        raise InputError(
            f"{task.root / task.split}: the values of all labels must be numbers of one shape. "
            f"Their shapes are {sorted(shapes)}, the first is {values[0]!r}."
        )
    return labels


def _require_alike(samples: TaskSamples) -> None:
    """Refuse labels of which some samples have a part and others do not."""
    parts = {
        "a value": 0 if samples.labels is None else len(samples.labels),
        "captions": len(samples.captions),
        "associated images": len(samples.associations),
    }
    for name, count in parts.items():
        if count not in (0, len(samples)):
            raise InputError(
                f"{samples.task.root}: the labels of all samples must have {name}, or none. "
                f"{count} of {len(samples)} have."
            )


def _warn_of_equal_classes(task: Task) -> None:
    """Point out classes that no model can tell apart."""
    if not task.has_labels:  # then its lines name several objectives
        return
    equal = [name for name, count in Counter(task.classnames).items() if count > 1]
    if equal:
        log.warning(
            "%s: these class names stand in more than one line, and zero-shot takes the first of "
            "equal classes: %s",
            task.name, ", ".join(map(repr, equal)),
        )  # fmt: skip


def tar_of(samples: TaskSamples, image: int) -> Path:
    """Return the tar that holds an image of the task."""
    return samples.task.shards[int(samples.places[image, 0])]
