"""Chance levels against guesses that are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from siftclip.eval.metrics.chance import class_chances, retrieval_chances
from siftclip.eval.metrics.retrieval_metrics import retrieval_metrics
from siftclip.eval.tasks.known_tasks import KNOWN_TASKS


def test_guesses_by_the_frequency_of_the_classes() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], [50, 30, 20])
    guesses = generator.permuted(np.tile(labels, (4000, 1)), axis=1)
    right = guesses == labels
    found = class_chances(labels, 5)
    assert found["acc1"] == pytest.approx(right.mean(), abs=2e-3)
    recalls = [right[:, labels == label].mean() for label in (0, 1, 3)]
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(recalls), abs=2e-3)


def test_as_datacomp_lists_it() -> None:
    mnist = np.repeat(np.arange(10), [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    assert class_chances(mnist, 10)["acc1"] == pytest.approx(KNOWN_TASKS["mnist"].chance, abs=5e-6)


def test_retrieval_in_random_order() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = np.asarray([1, 3, 2, 1, 5, 1])
    image_of = np.repeat(np.arange(len(captions)), captions)
    expected = retrieval_chances(captions)
    sums = dict.fromkeys(expected, 0.0)
    draws = 1500
    for _ in range(draws):
        images, texts = (
            torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1)
            for n in (len(captions), len(image_of))
        )
        metrics, _ = retrieval_metrics(images, texts, np.arange(len(image_of)), image_of)
        for name in sums:
            sums[name] += metrics[name] / draws
    assert sums == pytest.approx(expected, abs=0.02)
    assert expected["image_retrieval_recall@10"] == 1.0
