from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.eval.metrics import RECALL_KS, classification_metrics, retrieval_metrics


def slow_recall(scores: np.ndarray, image_of_text: list[int], k: int) -> tuple[float, float]:
    """(image retrieval, text retrieval): the share of queries with a positive among the k best."""
    texts, images = scores.shape
    image_hits = 0
    for text in range(texts):
        ranked = sorted(range(images), key=lambda i: -scores[text, i])
        image_hits += image_of_text[text] in ranked[:k]
    text_hits = 0
    for image in range(images):
        ranked = sorted(range(texts), key=lambda t: -scores[t, image])
        text_hits += any(image_of_text[text] == image for text in ranked[:k])
    return image_hits / texts, text_hits / images


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=14), st.integers(1, 5), st.integers(0, 99))
def test_retrieval_equals_a_loop(captions: list[int], batch_size: int, seed: int) -> None:
    """Also with fewer images or captions than k (number 9 of clip_benchmark's faults)."""
    image_of_text = [image for image, count in enumerate(captions) for _ in range(count)]
    scores = np.random.default_rng(seed).permutation(len(image_of_text) * len(captions))
    scores = scores.reshape(-1, len(captions)).astype(np.float32)  # without ties
    metrics, hits = retrieval_metrics(
        torch.from_numpy(scores), torch.tensor(image_of_text), batch_size, "cpu"
    )
    for k in RECALL_KS:
        image, text = slow_recall(scores, image_of_text, k)
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(image)
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(text)
        if k < 10:
            assert metrics[f"mean_recall@{k}"] == pytest.approx((image + text) / 2)
    assert hits.dtype == np.bool_
    assert hits.shape == (len(captions),)
    assert hits.mean() == pytest.approx(metrics["text_retrieval_recall@1"])


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # sklearn, few samples
@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.integers(1, 30), st.integers(1, 3), st.integers(0, 99))
def test_correctness_averages_to_acc1(classes: int, samples: int, values: int, seed: int) -> None:
    """With few values there are ties in nearly every row; with one value all is a tie."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, values, (samples, classes), generator=generator).float()
    target = torch.randint(0, classes, (samples,), generator=generator)
    metrics, correct = classification_metrics(logits, target)
    assert correct.dtype == np.bool_
    assert correct.mean() == pytest.approx(metrics["acc1"])
    assert np.isnan(metrics["acc5"]) == (classes < 5)


def test_recall_averages_over_classes() -> None:
    # class 0: 3 of 4 right, class 1: 1 of 1 right -> acc1 4/5, mean recall (3/4 + 1) / 2 = 7/8
    logits = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    metrics, correct = classification_metrics(logits, torch.tensor([0, 0, 0, 0, 1]))
    assert metrics["acc1"] == pytest.approx(4 / 5)
    assert metrics["mean_per_class_recall"] == pytest.approx(7 / 8)
    assert correct.tolist() == [True, True, True, False, True]
