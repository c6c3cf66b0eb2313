"""Built-in kinds keep the contract, and a kind that breaks a clause of it fails that check."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from siftclip.eval import (
    Label,
    Outcomes,
    Task,
    TaskKind,
    TaskSamples,
    TaskScores,
    TextFeatures,
    check_task_kind,
    example_image,
)
from siftclip.eval.conformance import checks
from siftclip.eval.conformance.example import KindExample
from siftclip.eval.tasks.kinds.base import ImagesOfSample
from siftclip.eval.tasks.kinds.classification import Classification
from siftclip.eval.tasks.kinds.registry import BUILT_IN
from siftclip.eval.tasks.kinds.values import Columns

Samples = Sequence[dict[str, bytes]]
CLASSNAMES = tuple(f"thing {i}" for i in range(6))


def numbered(count: int, first: int) -> dict[str, bytes]:
    return {f"{i}.png": example_image(first + i) for i in range(count)}


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pairs() -> Samples:
    return [
        {**numbered(2, 2 * i), "txt": f"thing {i} here\na photo of thing {i + 1}".encode()}
        for i in range(6)
    ]


def cues() -> Samples:
    return [
        {
            **numbered(10 + i, 20 * i),
            "json": json.dumps({"cue": f"Thing {i}", "associations": [0, 2 + i]}).encode(),
        }
        for i in range(5)
    ]


BUILT_IN_SAMPLES: dict[str, Callable[[], Samples]] = {
    "classification": lambda: [{"cls": b"%d" % (i % 6)} for i in range(12)],
    "multilabel": lambda: [
        {"npy": encode_npy((np.arange(6) % 3 == i % 3).astype(np.int64))} for i in range(9)
    ],
    "retrieval": lambda: [{"txt": f"thing {i}\nas {i} seen".encode()} for i in range(7)],
    "image_caption_selection": pairs,
    "association": cues,
}


def test_there_are_samples_of_all_built_in_kinds() -> None:
    assert BUILT_IN_SAMPLES.keys() == BUILT_IN.keys()


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_kinds_keep_the_contract(name: str) -> None:
    classes = CLASSNAMES if BUILT_IN[name].has_classes else ()
    check_task_kind(type(BUILT_IN[name]), BUILT_IN_SAMPLES[name], classnames=classes)


class Sound(TaskKind):
    """Which of two texts an image goes with; the bad ones below break one clause each."""

    name: ClassVar[str] = "sound"
    suffix: ClassVar[str] = "json"
    main_metric: ClassVar[str] = "choice_acc"

    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        try:
            record = json.loads(data)
            return Label(value=int(record["right"]), captions=tuple(record["texts"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"the .json member must have right and texts: {error!r}") from None

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        features, rows = texts.distinct([text for pair in samples.captions for text in pair])
        of_samples = features[rows].unflatten(0, (len(samples), 2))
        scores = (images[:, None] * of_samples).sum(dim=2)
        hits = scores.argmax(dim=1).cpu().numpy() == samples.require_labels()
        return TaskScores.of_means({"choice_acc": hits})


EXAMPLES: Samples = [
    {"json": json.dumps({"right": i % 2, "texts": [f"a {i}", f"b {i}"]}).encode()} for i in range(8)
]


def example(kind: type[TaskKind]) -> KindExample:
    """Samples of `Sound`, or those that a kind needs to come as far as its fault."""
    if issubclass(kind, Classification):
        classified = tuple(BUILT_IN_SAMPLES["classification"]())
        return KindExample(
            kind=kind, samples=classified, classnames=CLASSNAMES, templates=("a {c}",)
        )
    images = numbered(2, 0) if kind.is_target else {}
    return KindExample(kind=kind, samples=tuple({**images, **sample} for sample in EXAMPLES))


def test_a_sound_kind_passes() -> None:
    check_task_kind(Sound, EXAMPLES)


class Changed(Sound):
    """Spoils the scores of a sound kind."""

    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        raise NotImplementedError

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        return self.change(super().score(samples, images, texts), samples)


class UpperCaseName(Sound):
    name = "Sound"


class NameOfABuiltIn(Sound):
    name = "retrieval"


class DottedSuffix(Sound):
    suffix = ".json"


class SuffixOfAnImage(Sound):
    suffix = "jpg"


class ChanceInPercent(Sound):
    chance = 25


class ProbesWithoutClasses(Sound):
    one_class = True


class AssociatesTooFew(Sound):
    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        label = super().read_label(data, task, images)
        return Label(value=label.value, captions=label.captions, associated=np.ones(3, bool))


class TakesDamagedLabels(Sound):
    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        try:
            return super().read_label(data, task, images)
        except ValueError:
            return Label(value=0, captions=("", ""))


class RaisesKeyError(Sound):
    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        if not data.startswith(b"{"):
            raise KeyError("right")
        return super().read_label(data, task, images)


class Unpickles(Sound):
    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        if data.startswith(b"\x80\x04"):
            pickle.loads(data)  # noqa: S301 - what must be noticed
        return super().read_label(data, task, images)


class Percentages(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        return TaskScores(metrics={"choice_acc": 50.0}, outcomes=scores.outcomes)


class Infinite(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        return TaskScores(metrics={**scores.metrics, "loss": np.inf}, outcomes=scores.outcomes)


class NoMainMetric(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        return TaskScores.of_means({"other_acc": scores.outcomes["choice_acc"].arrays["value"]})


class NamedLikeACount(Sound):
    main_metric = "count_acc"

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        hits = super().score(samples, images, texts).outcomes["choice_acc"].arrays["value"]
        return TaskScores.of_means({"count_acc": np.ones_like(hits)})


class Undefined(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        return TaskScores.of_means({"choice_acc": np.full(len(samples), np.nan)})


class NoOutcomes(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        return TaskScores(metrics=scores.metrics, outcomes={})


class OutcomesLeaveOneOut(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        return TaskScores.of_means(
            {"choice_acc": scores.outcomes["choice_acc"].arrays["value"][1:]}
        )


class OutcomesOfAnotherMetric(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        value = 1 - scores.metrics["choice_acc"] / 2
        return TaskScores(metrics={"choice_acc": value}, outcomes=scores.outcomes)


class UnknownStatistic(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        outcomes: Any = Outcomes(
            statistic="median",  # type: ignore[arg-type]
            arrays=scores.outcomes["choice_acc"].arrays,
        )
        return TaskScores(metrics=scores.metrics, outcomes={"choice_acc": outcomes})


class Threefold(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        return TaskScores.of_means({"choice_acc": np.full(len(samples), 1.5)})


class CountsTheFirst(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        hits = scores.outcomes["choice_acc"].arrays["value"].copy()
        hits[: len(hits) // 2] = 1
        return TaskScores.of_means({"choice_acc": hits})


class CountsTheFirstTar(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        hits = scores.outcomes["choice_acc"].arrays["value"]
        return TaskScores.of_means({"choice_acc": np.where(samples.places[:, 0] == 0, hits, 0)})


class UsesPythonsRandom(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        random.random()
        return scores


class UsesTorchsRandom(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        torch.rand(1)
        return scores


class Remembers(Changed):
    seen: ClassVar[list[int]] = []

    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        self.seen.append(1)
        return TaskScores.of_means({"choice_acc": np.full(len(samples), len(self.seen) % 2)})


class NormalisesInPlace(Sound):
    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        scores = super().score(samples, images, texts)
        images.mul_(2)
        return scores


class ChangesLabels(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        samples.require_labels()[:] = 0
        return scores


class NeedsThree(Changed):
    def change(self, scores: TaskScores, samples: TaskSamples) -> TaskScores:
        assert len(samples) > 2, "there must be three samples"
        return scores


class ShortColumn(Sound):
    def columns(self, samples: TaskSamples, scores: TaskScores) -> dict[str, Any]:
        return {"right": samples.require_labels()[1:]}


class ColumnOfKeys(Sound):
    def columns(self, samples: TaskSamples, scores: TaskScores) -> dict[str, Any]:
        return {"key": samples.keys.tolist()}


class NoColumns(Sound):
    def columns(self, samples: TaskSamples, scores: TaskScores) -> None:
        return None


class RaggedClassTable(Sound):
    def class_table(self, samples: TaskSamples, scores: TaskScores) -> list[dict[str, Any]]:
        return [{"class": "a", "recall": 1.0}, {"class": "b", "precision": 1.0}]


class FailsOnRealModels(Sound):
    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        if images.shape[1] != 16:
            raise ValueError("features must have 16 numbers")
        return super().score(samples, images, texts)


class ProbedByAnotherMetric(Classification):
    name = "probed"
    main_metric = "accuracy"


class ProbesWithoutColumns(Classification):
    name = "probed"

    def columns(self, samples: TaskSamples, scores: TaskScores) -> Columns | None:
        return super().columns(samples, scores) if scores.predictions is not None else None


class TargetOfTwoImages(Sound):
    images: ClassVar[ImagesOfSample] = "numbered"
    is_target = True


class NumberedImages(Sound):
    images: ClassVar[ImagesOfSample] = "numbered"


BAD: list[tuple[Callable[[KindExample], None], type[TaskKind], str]] = [
    (checks.check_declaration, UpperCaseName, "name must be in lower case"),
    (checks.check_declaration, NameOfABuiltIn, "name of a built-in kind"),
    (checks.check_declaration, DottedSuffix, "without a dot"),
    (checks.check_declaration, SuffixOfAnImage, "not be that of an image"),
    (checks.check_declaration, ProbesWithoutClasses, "one_class needs has_classes"),
    (checks.check_declaration, ChanceInPercent, r"chance must be a share in \[0, 1\]. It is 25"),
    (checks.check_reading, AssociatesTooFew, "one for each image"),
    (
        checks.check_reading,
        NumberedImages,
        r'must have numbered images .*set images = "one" in the cla',
    ),
    (checks.check_damaged_labels, TakesDamagedLabels, "an empty label must be refused"),
    (checks.check_damaged_labels, RaisesKeyError, "refused by a ValueError. Got KeyError: 'right'"),
    (checks.check_damaged_labels, Unpickles, "a pickle in place of a label was unpickled"),
    (checks.check_metrics, Percentages, "must be a share"),
    (checks.check_metrics, Infinite, "loss must be finite"),
    (checks.check_metrics, NoMainMetric, "'choice_acc' must be one of .'other_acc'"),
    (checks.check_metrics, NamedLikeACount, "count_acc is no count"),
    (checks.check_metrics, Undefined, "must be defined"),
    (checks.check_outcomes, NoOutcomes, "must have outcomes"),
    (checks.check_outcomes, OutcomesLeaveOneOut, "value must be floats for 8 units"),
    (checks.check_outcomes, OutcomesOfAnotherMetric, "and the metric is"),
    (checks.check_outcomes, UnknownStatistic, "statistic must be one of"),
    (checks.check_resampling, UnknownStatistic, "KeyError: 'median'"),
    (checks.check_resampling, Threefold, "the interval is .*, 1.5"),
    (checks.check_sample_order, CountsTheFirst, "in another order"),
    (checks.check_tars, CountsTheFirstTar, "in 3 tars"),
    (checks.check_deterministic, UsesPythonsRandom, "Python's global random state"),
    (checks.check_deterministic, UsesTorchsRandom, "torch's global random state"),
    (checks.check_deterministic, Remembers, "the second time"),
    (checks.check_input_untouched, NormalisesInPlace, "features of the images were changed"),
    (checks.check_input_untouched, ChangesLabels, "labels were changed"),
    (checks.check_few_samples, NeedsThree, "there must be three samples"),
    (checks.check_columns, ShortColumn, "ArrowInvalid"),
    (checks.check_columns, ColumnOfKeys, "key and tar are columns of every file"),
    (checks.check_columns, NoColumns, "must not be None"),
    (checks.check_columns, RaggedClassTable, "rows of the class table must have equal keys"),
    (checks.check_evaluation, FailsOnRealModels, "features must have 16 numbers"),
    (checks.check_probes, ProbedByAnotherMetric, "'accuracy' must be one of .'acc1'"),
    (checks.check_probes, ProbesWithoutColumns, "few_shot must have columns"),
    (checks.check_targets, TargetOfTwoImages, "one image in each sample"),
]


@pytest.mark.parametrize(
    ("check", "kind", "message"), BAD, ids=lambda item: getattr(item, "__name__", "")
)
def test_a_kind_that_breaks_a_clause_fails(
    check: Callable[[KindExample], None], kind: type[TaskKind], message: str
) -> None:
    check(example(Sound))
    with pytest.raises(AssertionError, match=rf"^{check.__name__}: .*{message}"):
        check(example(kind))


def test_each_check_is_failed_by_a_kind() -> None:
    assert {check for check, _, _ in BAD} == set(checks.CHECKS)


def test_the_first_check_that_fails_is_named() -> None:
    with pytest.raises(AssertionError, match=r"^check_metrics: "):
        check_task_kind(Percentages, lambda: EXAMPLES)


@pytest.mark.parametrize(
    ("samples", "message"),
    [(EXAMPLES[:3], "at least 4 samples"), ([*EXAMPLES, {}], "must have its label, 'json'")],
)
def test_too_few_examples_are_named(samples: Samples, message: str) -> None:
    with pytest.raises(AssertionError, match=f"^check_declaration: .*{message}"):
        check_task_kind(Sound, samples)


class TakesArguments(Sound):
    def __init__(self, size: int) -> None:
        self.size = size


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TakesArguments, "without arguments"),
        (TaskKind, "must set name, suffix"),
        (dict, "subclass"),
    ],
)
def test_what_is_no_kind(kind: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=f"^check_declaration: InputError: .*{message}"):
        check_task_kind(kind, EXAMPLES)
