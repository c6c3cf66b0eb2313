from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
)

from siftclip.eval.metrics.weighted_metrics import STATISTICS

Arrays = dict[str, np.ndarray]


def make_arrays(n: int, seed: int) -> dict[str, Arrays]:
    """Random arrays for each statistic, with ties, NaN, cells of no name and labels never seen."""
    rng = np.random.default_rng(seed)
    value = rng.choice(np.array([0, 1, 1, 0.3, np.nan], np.float32), n)
    label = rng.integers(0, 5, n).astype(np.int32)
    return {
        "mean": {"value": value},
        "class_mean": {"value": value, "cell": label},
        "worst_cell": {"value": value, "cell": rng.integers(-1, 3, n).astype(np.int32)},
        "f1_macro": {
            "predicted": np.where(rng.random(n) < 0.5, label, rng.integers(0, 9, n)),
            "label": label,
        },
        "two_means": {
            "value": value,
            "hits": rng.integers(0, 3, n).astype(np.float32),
            "queries": rng.integers(2, 4, n).astype(np.float32),
        },
        "average_precision": {
            "scores": rng.integers(0, 6, (n, 4)).astype(np.float32),
            "labels": rng.random((n, 4)) < 0.3,
        },
    }


def mean_or_nan(values: list[float] | np.ndarray) -> float:
    return sum(float(v) for v in values) / len(values) if len(values) else float("nan")


def slow_cells(arrays: Arrays) -> list[float]:
    value, cell = arrays["value"], arrays["cell"]
    inside = [value[(cell == c) & ~np.isnan(value)] for c in sorted(set(cell.tolist()) - {-1})]
    return [mean_or_nan(values) for values in inside if len(values)]


def slow_f1(arrays: Arrays) -> float:
    label, predicted = arrays["label"], arrays["predicted"]
    if not len(label):
        return float("nan")
    return f1_score(label, predicted, average="macro", labels=np.unique(label), zero_division=0)


def slow_two_means(arrays: Arrays) -> float:
    value, queries = arrays["value"], arrays["queries"].sum()
    share = arrays["hits"].sum() / queries if queries else float("nan")
    return (mean_or_nan(value[~np.isnan(value)]) + share) / 2


# The plain metric of the units that are there, each as often as it is there.
SLOW: dict[str, Callable[[Arrays], float]] = {
    "mean": lambda arrays: mean_or_nan(arrays["value"][~np.isnan(arrays["value"])]),
    "class_mean": lambda arrays: mean_or_nan(slow_cells(arrays)),
    "worst_cell": lambda arrays: min(slow_cells(arrays), default=float("nan")),
    "f1_macro": slow_f1,
    "two_means": slow_two_means,
}


def slow_average_precision(arrays: Arrays, weights: np.ndarray) -> float:
    if not weights.any():
        return float("nan")
    found = []
    for score, label in zip(arrays["scores"].T, arrays["labels"].T, strict=True):
        if not label.any():
            found.append(0.0)
        elif weights[label].any():
            held = np.repeat(np.arange(len(score)), weights)
            found.append(average_precision_score(label[held], score[held]))
    return mean_or_nan(found)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 2**32), share=st.floats(0, 1))
@pytest.mark.parametrize("statistic", sorted(STATISTICS))
def test_a_weight_is_a_number_of_copies(statistic: str, n: int, seed: int, share: float) -> None:
    arrays = make_arrays(n, seed)[statistic]
    weights = np.random.default_rng(seed).binomial(3, share, (3, n)).astype(np.uint8)
    weights[-1] = 0
    expected = [
        slow_average_precision(arrays, row)
        if statistic == "average_precision"
        else SLOW[statistic]({name: np.repeat(a, row, axis=0) for name, a in arrays.items()})
        for row in weights
    ]
    got = STATISTICS[statistic](arrays, weights)  # type: ignore[index]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    as_float = STATISTICS[statistic](arrays, weights.astype(np.float32))  # type: ignore[index]
    np.testing.assert_array_equal(got, as_float)


def test_weights_of_ones_give_the_plain_metrics() -> None:
    rng = np.random.default_rng(3)
    n = 700
    label = rng.integers(0, 7, n)
    predicted = np.where(rng.random(n) < 0.6, label, rng.integers(0, 10, n))
    hit = (label == predicted).astype(np.float32)
    scores, labels = rng.random((n, 5), dtype=np.float32), rng.random((n, 5)) < 0.2
    labels[:, 2] = False  # clip_benchmark counts such a class as 0
    ones = np.ones((2, n), dtype=np.uint8)
    expected = {
        "mean": (accuracy_score(label, predicted), {"value": hit}),
        "class_mean": (balanced_accuracy_score(label, predicted), {"value": hit, "cell": label}),
        "f1_macro": (
            f1_score(label, predicted, average="macro", labels=np.unique(label)),
            {"predicted": predicted, "label": label},
        ),
        "average_precision": (
            average_precision_per_class(torch.tensor(scores), torch.tensor(labels)).mean().item(),
            {"scores": scores, "labels": labels},
        ),
    }
    for statistic, (value, arrays) in expected.items():
        got = STATISTICS[statistic](arrays, ones)  # type: ignore[index]
        tolerance = 1e-6 if statistic == "average_precision" else 1e-12  # theirs is in float32
        assert got == pytest.approx([value, value], abs=tolerance), statistic


def test_average_precision_does_not_depend_on_the_order_of_tied_units() -> None:
    arrays = {"scores": np.ones((4, 1), np.float32), "labels": np.array([[1], [0], [0], [1]])}
    turned = {name: array[[1, 0, 3, 2]] for name, array in arrays.items()}
    ones = np.ones((1, 4), dtype=np.uint8)
    for one in (arrays, turned):
        assert STATISTICS["average_precision"](one, ones) == 0.5


def test_average_precision_of_nan_is_nan() -> None:
    arrays = {"scores": np.array([[1.0], [np.nan]]), "labels": np.array([[True], [False]])}
    assert np.isnan(STATISTICS["average_precision"](arrays, np.ones((2, 2), np.uint8))).all()


@pytest.mark.parametrize("statistic", ["mean", "class_mean", "worst_cell", "two_means"])
def test_nothing_but_nan_is_nan(statistic: str) -> None:
    arrays = {
        "value": np.full(3, np.nan, np.float32),
        "cell": np.arange(3, dtype=np.int32),
        "hits": np.ones(3, np.float32),
        "queries": np.ones(3, np.float32),
    }
    got = STATISTICS[statistic](arrays, np.ones((2, 3), np.uint8))  # type: ignore[index]
    assert np.isnan(got).all()


def test_large_counts_are_exact() -> None:
    value = np.r_[np.ones(99_999), 0].astype(np.float32)
    weights = np.full((1, 100_000), 8, dtype=np.uint8)
    assert STATISTICS["mean"]({"value": value}, weights)[0] == 0.99999
