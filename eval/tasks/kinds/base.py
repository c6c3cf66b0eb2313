"""The contract of a kind of task."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from siftclip.eval.tasks.kinds.parts import caption_lists
from siftclip.eval.tasks.kinds.values import (
    Columns,
    Label,
    Task,
    TaskSamples,
    TaskScores,
)

ImagesOfSample = Literal["one", "numbered", "one_or_numbered"]


class TextFeatures(Protocol):
    """Where the features of texts come from; equal ones are computed once."""

    def classifier(self, classnames: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """Build the zero-shot classifier of these names, float32 [d, C], unit vectors."""
        ...

    def distinct(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode the distinct texts, [U, d], and find which one each text is, int64 [n]."""
        ...


class TaskKind(ABC):
    """A kind of task: what a sample is, how its label is read, and how a model is scored on it.

    A task says its kind by name, in `dataset_type.txt`. Other distributions add kinds through the
    entry-point group `siftclip.task_kinds`, name = class. A kind is built without arguments and
    holds nothing: all that it knows of a task is handed to its methods. `check_task_kind` checks
    the contract.

    Class attributes:
        name: what `dataset_type.txt` says, in lower case.
        suffix: of the member that holds a sample's label, without the dot.
        main_metric: the metric that a task of this kind is reported and compared by, in [0, 1].
        images: what images a sample has: "one" (`key.png`, or another suffix of images),
            "numbered" (`key.0.png`, `key.1.png`, ...) or "one_or_numbered".
        chance: what guessing scores on the main metric, in [0, 1], where that is the same for all
            tasks of the kind, see `chances`; the table of results shows it.
        has_classes: whether the task folder has class names and templates for prompts.
        one_class: whether a label is the number of a class, int64 [n], so that linear probes and
            few-shot can be fitted. They give the metrics of classification, and the main metric
            must be one of these.
        is_target: whether images with class names, or with their first captions, can be targets
            that selectors select for (`siftclip target`); each sample then has one image.
        loaded_ns: when the class was defined, since the epoch: what its file says later is not
            what runs.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    main_metric: ClassVar[str]
    images: ClassVar[ImagesOfSample] = "one"
    chance: ClassVar[float | None] = None
    has_classes: ClassVar[bool] = False
    one_class: ClassVar[bool] = False
    is_target: ClassVar[bool] = False
    loaded_ns: ClassVar[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.loaded_ns = time.time_ns()

    @abstractmethod
    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        """Read the label of a sample. Data are someone else's: they are never unpickled or run.

        Args:
            data: the member's bytes.
            task: of the sample, with its class names.
            images: how many the sample has.

        Raises:
            ValueError: says what is wrong; an InputError is one. Who reads the tar adds its name
                and that of the sample.
        """

    @abstractmethod
    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        """Compute metrics, and what each sample contributes to them.

        The answer depends on nothing but the arguments, and not on the order of the samples.

        Args:
            samples: n of them.
            images: float32 [m, d], unit vectors, in the order of the samples' images.
            texts: gives unit vectors of texts, on the device of the images.

        Returns:
            Metrics by name, NaN where one is not defined; `count_*` are whole numbers, and what is
            named as a share, as by `acc` or `recall`, lies in [0, 1]. Outcomes of the main metric
            have a row per sample and make the metric; intervals and comparisons need them.

        Raises:
            InputError: labels or features are wrong.
        """

    def chances(self, samples: TaskSamples) -> Mapping[str, float]:
        """Return what guessing scores on these samples, by metric, where that is known.

        Unless overridden: `chance` for the main metric.
        """
        return {} if self.chance is None else {self.main_metric: self.chance}

    def check_samples(self, samples: TaskSamples) -> None:  # noqa: B027 - most have nothing
        """Check what no sample shows by itself, once all are read; may warn.

        Raises:
            InputError: the samples do not make a task.
        """

    def columns(self, samples: TaskSamples, scores: TaskScores) -> Columns | None:
        """Return what the predictions file says of each sample, beside its key and its tar.

        Unless overridden: the captions, where there are any, and what each sample contributes to
        the metrics that are means.

        Returns:
            Columns of n values by name; None of samples without labels.
        """
        captions = {"captions": caption_lists(samples)} if samples.captions else {}
        values = {
            name: outcomes.arrays["value"]
            for name, outcomes in scores.outcomes.items()
            if outcomes.statistic == "mean"
        }
        return {**captions, **values}

    def class_table(self, samples: TaskSamples, scores: TaskScores) -> list[dict[str, Any]] | None:
        """Return one row per class, with equal keys; None where classes have no rows."""
        return None
