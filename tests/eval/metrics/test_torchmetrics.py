"""Our metrics beside torchmetrics': equal where both define the same, and where they differ.

Ours stay because each is a mean over what single samples contribute, which intervals and paired
tests need and torchmetrics does not give; docs/conformance.md lists the differences.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multilabel_average_precision,
)
from torchmetrics.functional.retrieval import retrieval_hit_rate

from siftclip.eval.metrics.class_metrics import (
    average_precisions,
    classification_metrics,
    confusion_counts,
    rank_classes,
)
from siftclip.eval.metrics.retrieval_metrics import retrieval_metrics

CLASSES = 7


def scored(seed: int, samples: int, classes: int = CLASSES) -> tuple[torch.Tensor, np.ndarray]:
    """Logits without ties, float32 [n, C], and labels, int64 [n]."""
    generator = np.random.default_rng(seed)
    ranks = generator.permuted(np.tile(np.arange(classes), (samples, 1)), axis=1)
    return torch.from_numpy(ranks.astype(np.float32)), generator.integers(0, classes, samples)


@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_accuracies_are_equal_to_rounding(seed: int, samples: int) -> None:
    logits, labels = scored(seed, samples)
    metrics, _ = classification_metrics(rank_classes(logits), labels, CLASSES)
    for k, name in ((1, "acc1"), (5, "acc5")):
        expected = multiclass_accuracy(
            logits, torch.from_numpy(labels), CLASSES, average="micro", top_k=k
        )
        assert metrics[name] == pytest.approx(float(expected), abs=1e-6)


def test_recall_by_class_is_equal_where_every_class_has_samples() -> None:
    logits, labels = scored(0, 200)
    metrics, _ = classification_metrics(rank_classes(logits), labels, CLASSES)
    expected = multiclass_accuracy(logits, torch.from_numpy(labels), CLASSES, average="macro")
    assert metrics["mean_per_class_recall"] == pytest.approx(float(expected), abs=1e-6)


def test_a_class_without_samples_counts_there_and_not_here() -> None:
    logits = torch.eye(3)[[0, 1, 2]]  # the third is taken for class 2, which no sample has
    labels = np.array([0, 1, 1])
    metrics, _ = classification_metrics(rank_classes(logits), labels, 3)
    theirs = multiclass_accuracy(logits, torch.from_numpy(labels), 3, average="macro")
    assert metrics["mean_per_class_recall"] == pytest.approx((1 + 1 / 2) / 2)
    assert float(theirs) == pytest.approx((1 + 1 / 2 + 0) / 3)


@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_confusion_is_equal_to_the_bit(seed: int, samples: int) -> None:
    generator = np.random.default_rng(seed)
    predicted, labels = generator.integers(0, CLASSES, (2, samples))
    expected = multiclass_confusion_matrix(
        torch.from_numpy(predicted), torch.from_numpy(labels), CLASSES
    )
    assert np.array_equal(confusion_counts(predicted, labels, CLASSES), expected.numpy())


def multilabel(seed: int, samples: int) -> tuple[torch.Tensor, np.ndarray]:
    """Probabilities without ties, which torchmetrics takes as they are, and labels, bool [n, C]."""
    generator = np.random.default_rng(seed)
    ranks = generator.permuted(np.tile(np.arange(samples), (CLASSES, 1)), axis=1).T
    labels = generator.random((samples, CLASSES)) < 0.4
    labels[0] = True
    return torch.from_numpy(((ranks + 1) / (samples + 1)).astype(np.float32)), labels


@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(2, 60))
@settings(max_examples=30, deadline=None)
def test_average_precisions_are_equal_to_rounding(seed: int, samples: int) -> None:
    scores, labels = multilabel(seed, samples)
    expected = multilabel_average_precision(
        scores, torch.from_numpy(labels).long(), CLASSES, average="none"
    )
    torch.testing.assert_close(average_precisions(scores, labels), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:No positive samples found:UserWarning")
def test_a_class_without_positives_is_0_here_and_left_out_there() -> None:
    scores, labels = multilabel(0, 20)
    labels[:, 3] = False
    ours = average_precisions(scores, labels)
    theirs = multilabel_average_precision(
        scores, torch.from_numpy(labels).long(), CLASSES, average="none"
    )
    assert ours[3] == 0
    assert not float(theirs[3]) > 0  # NaN, or 0 with a warning


def test_recall_of_retrieval_is_the_hit_rate() -> None:
    generator = np.random.default_rng(1)
    images, texts = (torch.from_numpy(generator.standard_normal((n, 16))) for n in (20, 60))
    images, texts = (torch.nn.functional.normalize(x, dim=1).float() for x in (images, texts))
    owners = np.repeat(np.arange(20), 3)
    metrics, _ = retrieval_metrics(images, texts, np.arange(60), owners)
    scores = texts.double() @ images.double().T
    relevant = torch.from_numpy(owners[:, None] == np.arange(20))
    for k in (1, 5, 10):
        of_captions = [
            float(retrieval_hit_rate(s, r, top_k=k)) for s, r in zip(scores, relevant, strict=True)
        ]
        of_images = [
            float(retrieval_hit_rate(s, r, top_k=k))
            for s, r in zip(scores.T, relevant.T, strict=True)
        ]
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(of_captions))
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(of_images))
