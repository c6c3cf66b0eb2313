from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from siftclip.errors import InputError
from siftclip.eval.metrics.class_metrics import (
    ClassPredictions,
    class_logits,
    classification_metrics,
    confusion_counts,
    group_means,
    multilabel_metrics,
    per_class_table,
    predict_classes,
)


def upstream(images: torch.Tensor, texts: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """clip_benchmark's `evaluate`: images [n, d] and texts [C, d] are what the model gives."""

    class Loader(list[Any]):
        dataset = SimpleNamespace(classes=[str(c) for c in range(len(texts))])

    model = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda tokens: texts[tokens])
    with pytest.MonkeyPatch.context() as patch:
        # float() of an array of one element is an error since numpy 2.4
        number = lambda x: float(x) if isinstance(x, str) else x.item()  # noqa: E731
        patch.setattr(zeroshot_classification, "float", number, raising=False)
        return zeroshot_classification.evaluate(
            model,
            Loader([(images, target)]),
            lambda prompts: torch.tensor([int(prompt) for prompt in prompts]),
            Loader.dataset.classes,
            ["{c}"],
            "cpu",
            amp=False,
        )


def predictions_of(logits: torch.Tensor) -> ClassPredictions:
    """Of any logits: the features pick a row of the classifier, so that nothing is rounded."""
    return predict_classes(torch.eye(len(logits)), logits / 100)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.integers(1, 30), st.booleans(), st.integers(0, 999))
def test_equals_clip_benchmark(classes: int, samples: int, tied: bool, seed: int) -> None:
    """Also where nearly every row of logits is a tie, and where classes have no samples."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(classes, 16, generator=generator)
    images = torch.randn(samples, 16, generator=generator)
    if tied:  # logits are +-25 without rounding
        texts = texts.sign()
        images = torch.eye(16)[torch.randint(16, (samples,), generator=generator)]
    target = torch.randint(0, classes, (samples,), generator=generator)
    predictions = predict_classes(
        F.normalize(images, dim=-1), F.normalize(texts, dim=-1).T, chunk_samples=7
    )
    assert predictions.top.shape == (samples, 5 if classes >= 5 else 1)
    assert predictions.top.dtype == predictions.argmax.dtype == np.int64
    metrics, outcomes = classification_metrics(predictions, target.numpy(), classes)
    assert metrics == pytest.approx(upstream(images, texts, target), abs=1e-12, nan_ok=True)
    assert math.isnan(metrics["acc5"]) == ("acc5" not in outcomes) == (classes < 5)
    for name in {"acc1", "acc5"} & outcomes.keys():
        assert outcomes[name].statistic == "mean"
        value = outcomes[name].arrays["value"]
        assert value.dtype == np.float32
        assert value.mean(dtype=np.float64) == pytest.approx(metrics[name])
    recall = outcomes["mean_per_class_recall"]
    assert recall.statistic == "class_mean"
    value, cell = recall.arrays["value"], recall.arrays["cell"]
    assert (value.dtype, cell.dtype) == (np.float32, np.int32)
    means = [value[cell == c].mean() for c in np.unique(cell)]
    assert np.mean(means) == pytest.approx(metrics["mean_per_class_recall"])


def test_hand_computed() -> None:
    # labels 0 0 0 2; best 0 1 0 1; the second best of the last is 2, not 5
    logits = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5],
            [1.0, 9, 2, 3, 4, 5],  # label 0 is the last of six: not among five
            [9.0, 1, 2, 3, 4, 5],
            [0.0, 9, 8, 3, 4, 5],
        ]
    )
    metrics, _ = classification_metrics(predictions_of(logits), np.array([0, 0, 0, 2]), 6)
    assert metrics["acc1"] == pytest.approx(2 / 4)
    assert metrics["acc5"] == pytest.approx(3 / 4)
    assert metrics["mean_per_class_recall"] == pytest.approx((2 / 3 + 0) / 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 9), st.integers(0, 999))
def test_scores_and_ranks(classes: int, samples: int, chunk: int, seed: int) -> None:
    """Against a loop, with many ties, and in blocks of any size."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 4, (samples, classes)).astype(np.float32)
    labels = rng.integers(0, classes, samples)
    found = predict_classes(
        torch.eye(samples), torch.from_numpy(logits).double() / 100, labels, chunk_samples=chunk
    )
    assert found.label_score is not None
    assert found.label_rank is not None
    assert found.scores.dtype == found.label_score.dtype == np.float32
    assert found.label_rank.dtype == np.int64
    np.testing.assert_array_equal(found.scores, np.take_along_axis(logits, found.top, axis=1))
    for i in range(samples):
        own = logits[i, labels[i]]
        assert found.label_score[i] == own
        assert found.label_rank[i] == sum(other > own for other in logits[i])
        assert found.scores[i].tolist() == sorted(logits[i], reverse=True)[: len(found.top[i])]
    without = predict_classes(torch.eye(samples), torch.from_numpy(logits) / 100)
    assert without.label_score is without.label_rank is None
    np.testing.assert_array_equal(without.top, found.top)
    with pytest.raises(InputError, match=rf"from 0 to {classes - 1}"):
        predict_classes(torch.eye(samples), torch.from_numpy(logits), labels + classes)
    with pytest.raises(InputError, match=rf"int64 \[{samples}\]"):
        predict_classes(torch.eye(samples), torch.from_numpy(logits), labels[:-1])


def test_one_sample() -> None:
    metrics, outcomes = classification_metrics(
        predictions_of(torch.tensor([[0.0, 1.0]])), np.array([1]), 2
    )
    assert (metrics["acc1"], metrics["mean_per_class_recall"]) == (1, 1)
    assert outcomes["acc1"].units == 1


@pytest.mark.parametrize("chunk", [1, 3, 64, 5000])
def test_blocks_and_autocast_change_nothing(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(130, 257, generator=generator), dim=-1)
    classifier = F.normalize(torch.randn(257, 37, generator=generator), dim=0)
    expected = class_logits(features, classifier)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected, 100 * features @ classifier, atol=1e-4, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = class_logits(features, classifier, chunk_samples=chunk)
        predictions = predict_classes(features, classifier, chunk_samples=chunk)
    torch.testing.assert_close(logits, expected, atol=4e-6, rtol=0)  # the last bit at most
    assert np.array_equal(predictions.top, expected.topk(5).indices.numpy())
    assert np.array_equal(predictions.argmax, expected.argmax(dim=1).numpy())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_features_are_counted(value: float) -> None:
    features = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    features[[1, 5, 8], 2] = value
    with pytest.raises(InputError, match="Those of 3 of 9 samples"):
        predict_classes(features, torch.eye(4), chunk_samples=2)


def test_one_broken_prompt_breaks_all_samples() -> None:
    features = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    classifier = torch.eye(4)
    classifier[:, 1] = math.nan
    with pytest.raises(InputError, match="Those of 9 of 9 samples"):
        predict_classes(features, classifier, chunk_samples=2)


def test_no_samples() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        predict_classes(torch.empty(0, 4), torch.eye(4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 3]), r"from 0 to 2.* 1 of 2 are not, the first is 3"),
        (np.array([-1, 0]), r"the first is -1"),
        (np.array([0]), r"int64 \[2\]"),
        (np.array([0.0, 1.0]), r"Got float64"),
    ],
)
def test_wrong_labels(labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        classification_metrics(predictions_of(torch.eye(3)[:2]), labels, 3)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 999))
def test_average_precision_equals_the_oracles(classes: int, samples: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.permutation(samples * classes).reshape(samples, classes)
    labels = generator.random((samples, classes)) < 0.3
    scores = torch.from_numpy(scores.astype(np.float32))
    metrics, outcomes = multilabel_metrics(scores, labels)
    expected = [
        average_precision_score(labels[:, c], scores[:, c]) if labels[:, c].any() else 0.0
        for c in range(classes)
    ]
    assert metrics["mean_average_precision"] == pytest.approx(np.mean(expected), abs=1e-6)
    theirs = zeroshot_classification.average_precision_per_class(scores, torch.from_numpy(labels))
    assert metrics["mean_average_precision"] == theirs.mean().item()
    outcome = outcomes["mean_average_precision"]
    assert outcome.statistic == "average_precision"
    assert outcome.units == samples
    assert np.array_equal(outcome.arrays["scores"], scores)
    assert outcome.arrays["scores"].dtype == np.float32
    assert outcome.arrays["labels"].dtype == np.bool_
    assert np.array_equal(outcome.arrays["labels"], labels)


@pytest.mark.parametrize("labels", [np.zeros((3, 2)), np.zeros((3, 3), bool), np.zeros(3, bool)])
def test_wrong_multilabels(labels: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"must be bool \[3, 2\]"):
        multilabel_metrics(torch.zeros(3, 2), labels)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 30), st.integers(0, 999))
def test_confusions_equal_sklearns(classes: int, samples: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels, predicted = generator.integers(0, classes, (2, samples))
    counts = confusion_counts(predicted, labels, classes)
    assert counts.dtype == np.int64
    assert np.array_equal(counts, confusion_matrix(labels, predicted, labels=range(classes)))
    table = per_class_table(counts, [f"c{i}" for i in range(classes)])
    precisions, recalls, _, supports = precision_recall_fscore_support(
        labels, predicted, labels=range(classes), zero_division=np.nan
    )
    assert [record["samples"] for record in table] == supports.tolist()
    assert [record["recall"] for record in table] == pytest.approx(recalls, nan_ok=True)
    assert [record["precision"] for record in table] == pytest.approx(precisions, nan_ok=True)
    for c, record in enumerate(table):
        others = [name for name in predicted[labels == c] if name != c]
        assert record["times"] == max((others.count(name) for name in others), default=0)


def test_table() -> None:
    """Of equal confusions the first class is named; no sample and no prediction are not 0."""
    counts = np.array([[2, 1, 1, 0], [0, 3, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0]])
    table = per_class_table(counts, ["cat", "dog", "owl", "fox"])
    assert table[0] == {
        "class": "cat",
        "samples": 4,
        "recall": 0.5,
        "precision": 1.0,
        "most_confused_with": "dog",
        "times": 1,
    }
    assert (table[1]["precision"], table[1]["most_confused_with"], table[1]["times"]) == (
        0.5,
        "",
        0,
    )
    assert (table[2]["samples"], table[2]["precision"]) == (0, 0.0)
    assert math.isnan(float(table[2]["recall"]))
    assert math.isnan(float(table[3]["precision"]))
    assert (table[3]["most_confused_with"], table[3]["times"]) == ("dog", 2)
    with pytest.raises(InputError, match=r"each of 4 classes. Got 1"):
        per_class_table(counts, ["cat"])


def test_group_means_name_only_groups_that_occur() -> None:
    names, means, counts = group_means(np.array([1.0, 0.0, 0.5]), np.array([7, 2, 7]))
    assert (names.tolist(), means.tolist(), counts.tolist()) == ([2, 7], [0.0, 0.75], [1, 2])
