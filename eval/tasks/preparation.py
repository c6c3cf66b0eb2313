"""What is known of tasks before a model is there: their samples, and which images they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from siftclip.errors import InputError
from siftclip.eval.tasks.images import ImageTable, distinct_images
from siftclip.eval.tasks.kinds.registry import find_kind
from siftclip.eval.tasks.kinds.values import Task, TaskSamples
from siftclip.eval.tasks.samples import read_samples
from siftclip.eval.tasks.task import read_task


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailure:
    """Why there is no result of a task."""

    key: str
    message: str
    model: str | None = None  # identities.model_identity of what was evaluated, where it is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """The samples of a task, and where their images are in a table."""

    task: Task
    samples: TaskSamples
    images: np.ndarray  # int64 [m], rows of the table
    train: TaskSamples | None  # of linear probes and few-shot
    train_images: np.ndarray | None

    def rows(self) -> np.ndarray:
        """Return all rows of the table that the task needs, each once."""
        needed = [self.images, *([] if self.train_images is None else [self.train_images])]
        return np.unique(np.concatenate(needed))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTasks:
    """Tasks whose tars are indexed; good for any number of models."""

    data: tuple[TaskData, ...]
    table: ImageTable | None  # None without tasks
    failures: tuple[TaskFailure, ...]

    def without(self, names: set[str]) -> PreparedTasks:
        """Return the tasks that are left without some."""
        return replace(self, data=tuple(data for data in self.data if data.task.name not in names))

    def groups(self) -> list[list[TaskData]]:
        """Group the tasks that share images, in the order of their first tasks."""
        parents = list(range(len(self.data)))

        def root(number: int) -> int:
            while parents[number] != number:
                number = parents[number]
            return number

        owner = np.full(0 if self.table is None else len(self.table), -1)
        for number, data in enumerate(self.data):
            rows = data.rows()
            for other in np.unique(owner[rows]).tolist():
                if other >= 0 and root(other) != root(number):
                    low, high = sorted((root(other), root(number)))
                    parents[high] = low
            owner[rows] = number
        groups: dict[int, list[TaskData]] = {}
        for number, data in enumerate(self.data):
            groups.setdefault(root(number), []).append(data)
        return [*groups.values()]


def prepare_tasks(
    tasks: Sequence[Task], *, max_samples: int | None = None, train_split: str = "train"
) -> PreparedTasks:
    """Index the tars of tasks. What cannot be read becomes a failure; the others continue.

    Args:
        tasks: each name once. The tars of several protocols of one task are read once.
        max_samples: of a task's test split, see `read_samples`.
        train_split: the folder beside a task's split that probes are fitted on.

    Raises:
        InputError: a name is there twice, or a tar that was indexed cannot be read any more.
    """
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise InputError(f"Tasks must have names of their own. {twice} are there more than once.")
    read: list[tuple[TaskSamples, TaskSamples | None]] = []
    failures = []
    index = _Index()
    for task in tasks:
        try:
            train = None
            if task.protocol != "zero_shot":
                train = index.samples(_train_task(task, train_split), None)
            read.append((index.samples(task, max_samples), train))
        except (InputError, OSError) as error:
            failures.append(TaskFailure(key=task.name, message=str(error)))
    flat = [samples for pair in read for samples in pair if samples is not None]
    if not flat:
        return PreparedTasks(data=(), table=None, failures=tuple(failures))
    table, rows = distinct_images(flat)
    data, numbers = [], iter(rows)
    for samples, train in read:
        images = next(numbers)
        data.append(
            TaskData(
                task=samples.task,
                samples=samples,
                images=images,
                train=train,
                train_images=None if train is None else next(numbers),
            )
        )
    return PreparedTasks(data=tuple(data), table=table, failures=tuple(failures))


class _Index:
    """Samples of tasks, with one reading of the tars for all tasks that read them alike."""

    def __init__(self) -> None:
        self._known: dict[Hashable, TaskSamples] = {}

    def samples(self, task: Task, max_samples: int | None) -> TaskSamples:
        key = (
            task.shards,
            task.key_split,
            task.kind,
            task.special,
            len(task.classnames),
            max_samples,
        )
        if key not in self._known:
            self._known[key] = read_samples(task, max_samples=max_samples)
        return replace(self._known[key], task=task)


def _train_task(task: Task, split: str) -> Task:
    if not find_kind(task.kind).one_class:
        raise InputError(
            f"{task.root}: a {task.protocol} needs a task with one class an image. This is a task "
            f"of the kind {task.kind}."
        )
    if not (task.root / split).is_dir():
        raise InputError(
            f"{task.root} must have the split {split!r} for a {task.protocol}. Download or export "
            "it, or name another one to fit on (train_split)."
        )
    train = replace(read_task(task.root, split=split, key_split=task.key_split), special=None)
    tested = {_file_id(shard) for shard in task.shards}
    shared = [shard for shard in train.shards if _file_id(shard) in tested]
    if shared:
        raise InputError(
            f"{task.root}: a {task.protocol} must not be fitted on what it is tested on. "
            f"{shared[0]} is in the split {task.split!r}, too ({len(shared)} of "
            f"{len(train.shards)} tars are). Name another split to fit on (train_split)."
        )
    return train


def _file_id(path: Path) -> tuple[int, int]:
    """Return an id that is equal for all links to a file."""
    status = path.stat()
    return status.st_dev, status.st_ino
