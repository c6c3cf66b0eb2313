"""A task of a kind, written from a few example samples, and what all checks of one share."""

from __future__ import annotations

import functools
import io
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from siftclip.eval.encoding.task_scores import TaskTexts, score_task
from siftclip.eval.tasks.kinds.base import TaskKind
from siftclip.eval.tasks.kinds.registry import build_kind, offered
from siftclip.eval.tasks.kinds.values import Task, TaskSamples, TaskScores
from siftclip.eval.tasks.samples import IMAGE_SUFFIXES, read_samples
from siftclip.eval.tasks.task import (
    CLASSNAMES_FILE,
    NSHARDS_FILE,
    TEMPLATES_FILE,
    TEST_SPLIT,
    TYPE_FILE,
    read_task,
)
from siftclip.files import write_tar

WIDTH = 16  # of the made-up features
_SIDE_PIXELS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class KindExample:
    """A kind, and what a task of it is written from."""

    kind: type[TaskKind]
    samples: tuple[Mapping[str, bytes], ...]  # of each sample its members' bytes by suffix
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def write(
        self,
        root: Path,
        *,
        order: Sequence[int] | None = None,
        tars: int = 2,
        labels: Mapping[int, bytes] | None = None,
    ) -> Path:
        """Write the task's folder, and return it.

        Args:
            root: the folder, which is made.
            order: of the samples in the tars; each has its key wherever it stands.
            tars: over how many the samples are spread.
            labels: bytes in place of the labels of some samples, by their numbers.
        """
        (root / TEST_SPLIT).mkdir(parents=True)
        (root / TYPE_FILE).write_text(f"{self.kind.name}\n", encoding="utf-8")
        (root / TEST_SPLIT / NSHARDS_FILE).write_text(f"{tars}\n", encoding="utf-8")
        if self.kind.has_classes:
            texts = {CLASSNAMES_FILE: self.classnames, TEMPLATES_FILE: self.templates}
            for name, lines in texts.items():
                (root / name).write_text("\n".join(lines), encoding="utf-8")
        numbers = range(len(self.samples)) if order is None else order
        for tar, part in enumerate(np.array_split(np.asarray(numbers), tars)):
            members = []
            for number in part.tolist():
                of_sample = self._members(number)
                if labels is not None and number in labels:
                    of_sample[self.kind.suffix] = labels[number]
                key = key_of(number)
                members += [(f"{key}.{suffix}", data) for suffix, data in of_sample.items()]
            write_tar(root / TEST_SPLIT / f"{tar}.tar", members)
        return root

    def _members(self, number: int) -> dict[str, bytes]:
        """Return the members of a sample; one without an image gets one."""
        members = dict(self.samples[number])
        if any(suffix.rpartition(".")[2] in IMAGE_SUFFIXES for suffix in members):
            return members
        return {"png": example_image(number), **members}

    @contextmanager
    def task(self, *, tars: int = 2) -> Iterator[Task]:
        """Write the task to a folder that is there inside a `with`."""
        with tempfile.TemporaryDirectory() as folder:
            yield read_task(self.write(Path(folder) / "wds_example", tars=tars))

    def read(
        self,
        *,
        order: Sequence[int] | None = None,
        tars: int = 2,
        labels: Mapping[int, bytes] | None = None,
    ) -> TaskSamples:
        """Write the task, see `write`, and read its samples back."""
        with tempfile.TemporaryDirectory() as folder:
            root = self.write(Path(folder) / "wds_example", order=order, tars=tars, labels=labels)
            return read_samples(read_task(root))


Check = Callable[[KindExample], None]


def named_check(check: Check) -> Check:
    """Let tasks name the example's kind during a check, and say in all its errors which it is."""

    @functools.wraps(check)
    def run(example: KindExample) -> None:
        try:
            with offered(build_kind(example.kind, str(example.kind))):
                check(example)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
        except Exception as error:  # of the kind, or of what refuses its answers
            problem = f"{check.__name__}: {type(error).__name__}: {error}"
            raise AssertionError(problem) from error

    return run


def key_of(number: int) -> str:
    """Return the key of a sample in the tars."""
    return f"s{number:04d}"


def example_image(seed: int) -> bytes:
    """Draw a PNG of random pixels, for example samples of several images.

    Example:
        >>> from siftclip.eval import example_image
        >>> example_image(0) == example_image(0), example_image(0) == example_image(1)
        (True, False)
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (_SIDE_PIXELS, _SIDE_PIXELS, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def image_features(samples: TaskSamples, *, model: int = 0) -> Tensor:
    """Draw a unit vector for each image, float32 [m, d], by the sample's key and the model."""
    counts = np.diff(samples.first_image).tolist()
    names = [
        f"{key} {image}"
        for key, count in zip(samples.keys.tolist(), counts, strict=True)
        for image in range(count)
    ]
    return _unit_vectors(names, model)


def text_features(*, model: int = 0) -> TaskTexts:
    """Return what draws a unit vector for each text, by the text and the model."""
    return TaskTexts(lambda texts: _unit_vectors(texts, model))


def made_up_scores(samples: TaskSamples, *, model: int = 0) -> TaskScores:
    """Score samples by made-up features, which depend on keys and texts and the model alone."""
    return score_task(samples, image_features(samples, model=model), text_features(model=model))


def _unit_vectors(names: Sequence[str], model: int) -> Tensor:
    rows = [
        np.random.default_rng([model, zlib.crc32(name.encode())]).standard_normal(WIDTH)
        for name in names
    ]
    return F.normalize(torch.tensor(np.array(rows), dtype=torch.float32), dim=-1)
