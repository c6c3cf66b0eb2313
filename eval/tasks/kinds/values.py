"""What kinds of tasks work on: a task, its samples and their labels, features, scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from siftclip.datamodules.index.tar_walk import KeySplit
from siftclip.eval.metrics.class_metrics import ClassPredictions
from siftclip.eval.metrics.outcomes import Metrics, Outcomes, mean_metrics
from siftclip.eval.tasks.known_tasks import METADATA_ONLY
from siftclip.file_identity import FileIdentity

Protocol = Literal["zero_shot", "linear_probe", "few_shot"]
OWN_FAMILY = "own"  # of tasks that are not DataComp's

Columns = dict[str, Any]  # arrays or lists with one value a sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: where its samples are, and what is needed to turn a model's answers into metrics.

    A task with another title or main metric is made with `dataclasses.replace`.
    """

    name: str  # DataComp's key, or the name of the folder without `wds_`
    title: str  # the name to show
    root: Path
    split: str
    kind: str  # the name of a `TaskKind`
    main_metric: str | None  # None: the task has none and is in no average
    shards: tuple[Path, ...]
    classnames: tuple[str, ...]  # the index is the label; empty where there are no classes
    templates: tuple[str, ...]  # each with {c}; empty where there are no classes
    special: str | None = None  # which metrics of DataComp's own it has, see `known_tasks`
    family: str = OWN_FAMILY
    protocol: Protocol = "zero_shot"
    shots: int | None = None  # of few_shot
    key_split: KeySplit = "first_dot"  # the dot that ends a sample's key in its members' names

    @property
    def has_classes(self) -> bool:
        """Whether it names classes, which prompts are made of."""
        return bool(self.classnames)

    @property
    def has_labels(self) -> bool:
        """Whether its samples have labels of their own; those of faces have metadata alone."""
        return self.special not in METADATA_ONLY


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What the label of one sample says. All samples of a task have the same of it."""

    value: int | float | np.ndarray | None = None  # an array has one shape in a task
    captions: tuple[str, ...] = ()  # texts of the sample: captions, a cue, a question
    associated: np.ndarray | None = None  # bool [images of the sample]: which ones are meant


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSamples:
    """What the tars of a task hold, in their order, but for the images themselves.

    n samples have m >= n images: those of sample i are `first_image[i]` to `first_image[i + 1]`.
    """

    task: Task
    keys: np.ndarray  # str [n]
    places: np.ndarray  # int64 [m, 3]: which of the task's tars, offset and size in bytes
    first_image: np.ndarray  # int64 [n + 1]
    labels: np.ndarray | None  # [n, ...], the values of the labels: int64 [n] of classification
    captions: tuple[tuple[str, ...], ...]  # of each sample
    associations: tuple[np.ndarray, ...]  # bool [images] of each sample
    metadata: np.ndarray | None  # int64 [n, fields], of tasks with special metrics
    identities: tuple[FileIdentity, ...] = ()  # of the task's tars when they were indexed

    def __len__(self) -> int:
        return len(self.keys)

    def require_labels(self) -> np.ndarray:
        """Return the labels, of a kind whose samples have them."""
        if self.labels is None:
            raise RuntimeError(f"samples of the kind {self.task.kind} have labels")
        return self.labels

    def require_metadata(self) -> np.ndarray:
        """Return the metadata, of a task with special metrics."""
        if self.metadata is None:
            raise RuntimeError("tasks with metrics of their own have metadata")
        return self.metadata

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What a model has reached on a task."""

    metrics: Metrics
    outcomes: dict[str, Outcomes]  # by the metrics that can be the main one
    predictions: ClassPredictions | None = None  # of one class a sample

    @classmethod
    def of_means(cls, values: Mapping[str, np.ndarray]) -> TaskScores:
        """Score by means over the samples.

        Args:
            values: by metric, float or bool [n] in [0, 1]; a sample whose value is NaN is left out.
        """
        metrics, outcomes = mean_metrics(values)
        return cls(metrics=metrics, outcomes=outcomes)
