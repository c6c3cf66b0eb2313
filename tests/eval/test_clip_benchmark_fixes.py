"""A test for each fault of clip_benchmark that is worked around. Those that are avoided (2, 3, 4,
10, 14, 17) are in test_task_dataset, test_eval_tasks and test_evaluate."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval
from numpy.lib import NumpyVersion

from siftclip.eval.clip_benchmark_fixes import accuracy, none_for_nan, recall_at_k, repaired

NAMES = [
    (zeroshot_classification, "accuracy"),
    (linear_probe, "accuracy"),
    (zeroshot_retrieval, "recall_at_k"),
    (zeroshot_classification, "tqdm"),
    (zeroshot_retrieval, "tqdm"),
]


def test_accuracy_equals_a_loop() -> None:
    """Number 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 7, generator=generator)
    target = torch.randint(0, 7, (40,), generator=generator)
    expected = []
    for k in (1, 3, 5):
        hits = 0
        for row, label in zip(logits.tolist(), target.tolist(), strict=True):
            best = sorted(range(7), key=lambda c: -row[c])[:k]
            hits += label in best
        expected.append(hits / 40)
    assert accuracy(logits, target, topk=(1, 3, 5)) == expected
    with repaired():
        assert zeroshot_classification.accuracy(logits, target) == expected[:1]


@pytest.mark.skipif(NumpyVersion(np.__version__) < "2.4.0", reason="an error since numpy 2.4")
def test_accuracy_is_still_broken_without_us() -> None:
    """Number 1. When this fails, the replacement can go."""
    with pytest.raises(TypeError):
        zeroshot_classification.accuracy(torch.eye(5), torch.arange(5))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_recall_equals_clip_benchmark(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(30, 12, generator=generator)
    pairs = torch.rand(30, 12, generator=generator) < 0.3
    pairs[:, 0] = True
    expected = zeroshot_retrieval.recall_at_k(scores, pairs, k)
    assert torch.equal(recall_at_k(scores, pairs, k), expected)


def test_recall_with_fewer_candidates_than_k() -> None:
    """Number 9."""
    pairs = torch.eye(3, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        zeroshot_retrieval.recall_at_k(torch.zeros(3, 3), pairs, 5)
    assert recall_at_k(torch.zeros(3, 3), pairs, 5).tolist() == [1, 1, 1]


def test_nan_becomes_none() -> None:
    """Number 13."""
    metrics = none_for_nan({"acc1": 0.5, "acc5": math.nan, "recall": np.float64(0.25)})
    assert metrics == {"acc1": 0.5, "acc5": None, "recall": 0.25}
    assert [type(value) for value in metrics.values()] == [float, type(None), float]


def test_everything_is_put_back() -> None:
    before = [getattr(module, name) for module, name in NAMES]
    inside = []

    def fail() -> None:
        with repaired():
            inside.extend(getattr(module, name) for module, name in NAMES)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [getattr(module, name) for module, name in NAMES] == before
    assert all(new is not old for new, old in zip(inside, before, strict=True))


def test_no_bars(capfd: pytest.CaptureFixture[str]) -> None:
    class Model:
        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.float()

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 4)

    with repaired():
        zeroshot_classification.zero_shot_classifier(
            Model(), tokenizer, ["a", "b"], ["{c}"], "cpu", amp=False
        )
    assert capfd.readouterr() == ("", "")


def test_the_functions_that_we_compose_have_not_changed() -> None:
    """What `metrics` calls, with the names of the arguments it gives."""
    expected = {
        zeroshot_classification.zero_shot_classifier: (
            "model tokenizer classnames templates device amp"
        ),
        zeroshot_classification.run_classification: "model classifier dataloader device amp",
        zeroshot_classification.average_precision_per_class: "scores targets",
        zeroshot_retrieval.dataloader_with_indices: "dataloader",
        zeroshot_retrieval.batchify: "func X Y batch_size device args kwargs",
    }
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters) == names.split()
