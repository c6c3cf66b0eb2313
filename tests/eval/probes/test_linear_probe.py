from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.eval.probes.linear_probe import (
    L2_EXPONENTS,
    MIN_VALIDATION,
    STEPS_PER_DECADE,
    ProbeOptions,
    choose_l2,
    few_shot,
    few_shot_l2,
    few_shot_rows,
    linear_probe,
    validation_rows,
)
from siftclip.eval.probes.logistic_fit import fit_logistic

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def make_split(
    n: int = 400, n_test: int = 300, dim: int = 12, classes: int = 5, noise: float = 1.5
) -> Split:
    generator = np.random.default_rng([n, n_test, dim, classes])
    centres = generator.standard_normal((classes, dim))
    labels = generator.permutation(np.arange(n + n_test) % classes).astype(np.int64)
    features = centres[labels] + noise * generator.standard_normal((n + n_test, dim)) + 0.5
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    return features[:n], labels[:n], features[n:], labels[n:]


@pytest.fixture(scope="module")
def split() -> Split:
    return make_split()


label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(
    lambda values: np.asarray(values, dtype=np.int64)
)


@settings(deadline=None, max_examples=40)
@given(label_lists, st.integers(1, 8), st.integers(0, 5))
def test_shots_are_so_many_of_each_class(labels: np.ndarray, shots: int, seed: int) -> None:
    rows = few_shot_rows(labels, shots, seed=seed)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(labels)
    np.testing.assert_array_equal(
        np.bincount(labels[rows], minlength=len(counts)), np.minimum(counts, shots)
    )
    np.testing.assert_array_equal(rows, few_shot_rows(labels, shots, seed=seed))
    assert set(rows) <= set(few_shot_rows(labels, shots + 1, seed=seed))


@settings(deadline=None, max_examples=40)
@given(label_lists, st.integers(1, 4), st.integers(0, 5), st.randoms(use_true_random=False))
def test_other_classes_do_not_matter(
    labels: np.ndarray, shots: int, seed: int, random: object
) -> None:
    """A class draws the same of its samples alone, and wherever the others stand."""
    rows = few_shot_rows(labels, shots, seed=seed)
    drawn = {
        label: np.searchsorted(np.flatnonzero(labels == label), rows[labels[rows] == label])
        for label in set(labels.tolist())
    }
    shuffled = labels.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    moved = few_shot_rows(shuffled, shots, seed=seed)
    for label, positions in drawn.items():
        alone = few_shot_rows(np.full((labels == label).sum(), label), shots, seed=seed)
        np.testing.assert_array_equal(alone, positions)
        of_label = np.searchsorted(
            np.flatnonzero(shuffled == label), moved[shuffled[moved] == label]
        )
        np.testing.assert_array_equal(of_label, positions)


def test_seeds_and_classes_draw_differently_and_evenly() -> None:
    labels = np.repeat(np.arange(3), 10)
    draws = np.stack([few_shot_rows(labels, 2, seed=seed) for seed in range(600)])
    places = draws.reshape(600, 3, 2) - 10 * np.arange(3)[:, None]
    assert (places[:, 0] != places[:, 1]).any(axis=1).mean() > 0.9  # alike by chance: 1 in 45
    counts = np.bincount(draws.ravel(), minlength=30)  # each 600 * 2 / 10 = 120, deviation 10
    assert np.abs(counts - 120).max() < 45


@settings(deadline=None, max_examples=40)
@given(label_lists, st.floats(0.05, 1), st.integers(0, 5))
def test_validation_is_stratified(labels: np.ndarray, fraction: float, seed: int) -> None:
    counts = np.bincount(labels)
    expected = [max(min(int(fraction * count + 0.5), count - 1), 0) for count in counts.tolist()]
    if sum(expected) < MIN_VALIDATION:
        with pytest.raises(InputError, match=r"hold out at least 10.*Give a larger"):
            validation_rows(labels, fraction, seed=seed)
        return
    rows = validation_rows(labels, fraction, seed=seed)
    assert (np.diff(rows) > 0).all()
    assert np.bincount(labels[rows], minlength=len(counts)).tolist() == expected
    np.testing.assert_array_equal(rows, validation_rows(labels, fraction, seed=seed))


def test_validation_depends_on_the_seed_and_is_not_the_shots() -> None:
    labels = np.repeat(np.arange(4), 50)
    first = validation_rows(labels, 0.2, seed=0)
    assert not np.array_equal(first, validation_rows(labels, 0.2, seed=1))
    assert not np.array_equal(first, few_shot_rows(labels, 10, seed=0))


def test_the_search_finds_the_best_of_its_grid(split: Split) -> None:
    """Against fits from zero of every value of the grid: none may be better by much."""
    features, labels = torch.from_numpy(split[0]), torch.from_numpy(split[1])
    choice = choose_l2(features, labels, 5, seed=3, validation_fraction=0.3)
    held = np.zeros(len(labels), dtype=bool)
    held[validation_rows(split[1], 0.3, seed=3)] = True
    assert choice.samples == held.sum() == 120
    accuracies = {}
    for step in range(STEPS_PER_DECADE * L2_EXPONENTS[0], STEPS_PER_DECADE * L2_EXPONENTS[1] + 1):
        l2 = 10 ** (step / STEPS_PER_DECADE)
        probe = fit_logistic(features[~held], labels[~held], 5, l2=l2)
        predicted = probe.scores(features[held]).argmax(dim=1)
        accuracies[l2] = float((predicted == labels[held]).double().mean())
    assert choice.l2 in accuracies
    assert len(choice.tried) <= 17
    assert set(choice.tried) <= set(accuracies)
    for l2, accuracy in choice.tried.items():
        assert accuracy == pytest.approx(accuracies[l2], abs=1.01 / 120)
    assert choice.validation_accuracy == max(choice.tried.values())
    assert choice.validation_accuracy >= max(accuracies.values()) - 2.01 / 120
    equal = [l2 for l2, accuracy in choice.tried.items() if accuracy == choice.validation_accuracy]
    assert choice.l2 == max(equal)
    neighbours = [choice.l2 * 10 ** (sign / STEPS_PER_DECADE) for sign in (-1, 1)]
    for neighbour in neighbours:
        assert min(abs(np.log(neighbour / l2)) for l2 in choice.tried) < 1e-6


def test_equal_accuracies_go_to_the_strongest_penalty() -> None:
    """Classes so far apart that all penalties separate them."""
    labels = np.tile(np.arange(3), 20)
    features = torch.from_numpy(np.eye(3, dtype=np.float32)[labels])
    choice = choose_l2(features, torch.from_numpy(labels), 3)
    assert choice.validation_accuracy == 1.0
    assert choice.l2 == 10.0 ** L2_EXPONENTS[1]


def test_a_probe_is_the_fit_on_all_of_train(split: Split) -> None:
    train, labels, test, test_labels = split
    result = linear_probe(train, labels, test, 5)
    assert result.validation_accuracy is not None
    choice = choose_l2(torch.from_numpy(train), torch.from_numpy(labels), 5)
    assert (result.l2, result.validation_accuracy) == (choice.l2, choice.validation_accuracy)
    probe = fit_logistic(torch.from_numpy(train), torch.from_numpy(labels), 5, l2=choice.l2)
    np.testing.assert_array_equal(result.scores, probe.scores(torch.from_numpy(test)).numpy())
    assert result.scores.dtype == np.float32
    assert (result.iterations, result.converged) == (probe.iterations, True)
    assert (result.scores.argmax(axis=1) == test_labels).mean() > 0.55  # chance: 0.2
    again = linear_probe(train, labels, test, 5)
    np.testing.assert_array_equal(result.scores, again.scores)


def test_a_given_penalty_is_used(split: Split) -> None:
    train, labels, test, _ = split
    result = linear_probe(train, labels, test, 5, options=ProbeOptions(l2=1e-2))
    assert result.l2 == 1e-2
    assert result.validation_accuracy is None
    with pytest.raises(InputError, match=r"linear_probe\.l2 must be above 0"):
        linear_probe(train, labels, test, 5, options=ProbeOptions(l2=-1.0))


def test_a_limit_of_iterations_is_told(split: Split) -> None:
    train, labels, test, _ = split
    options = ProbeOptions(l2=1e-6, max_iterations=2)
    result = linear_probe(train, labels, test, 5, options=options)
    assert (result.iterations, result.converged) == (2, False)


def test_arrays_mapped_read_only(split: Split, tmp_path: Path) -> None:
    """As cached features are; a test split of one sample."""
    np.save(tmp_path / "train.npy", split[0])
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    options = ProbeOptions(l2=1e-2)
    result = linear_probe(mapped, split[1], split[2][:1], 5, options=options)
    expected = linear_probe(*split[:3], 5, options=options)
    np.testing.assert_allclose(result.scores, expected.scores[:1], rtol=1e-5, atol=1e-5)


def test_few_shot_is_a_fit_on_the_rows(split: Split) -> None:
    train, labels, test, test_labels = split
    results = list(few_shot(train, labels, test, 5, shots=[1, 8], seeds=[0, 7]))
    assert [(result.shots, result.seed) for result in results] == [(1, 0), (1, 7), (8, 0), (8, 7)]
    for result in results:
        rows = few_shot_rows(labels, result.shots, seed=result.seed)
        np.testing.assert_array_equal(result.rows, rows)
        assert result.short_classes == ()
        assert result.probe.l2 == few_shot_l2(len(rows)) == 0.1 / (5 * result.shots)
        assert result.probe.validation_accuracy is None
        probe = fit_logistic(
            torch.from_numpy(train[rows]), torch.from_numpy(labels[rows]), 5, l2=result.probe.l2
        )
        expected = probe.scores(torch.from_numpy(test)).numpy()
        np.testing.assert_array_equal(result.probe.scores, expected)
    accuracies = [(result.probe.scores.argmax(axis=1) == test_labels).mean() for result in results]
    assert np.mean(accuracies[2:]) > np.mean(accuracies[:2])


def test_classes_with_fewer_samples_than_shots_are_told(
    split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    train, labels, test, _ = split
    keep = np.flatnonzero(labels != 3)
    keep = np.sort(np.r_[keep, np.flatnonzero(labels == 3)[:2]])
    with caplog.at_level(logging.WARNING):
        results = list(few_shot(train[keep], labels[keep], test, 7, shots=[2, 4], seeds=[0, 1]))
    assert [result.short_classes for result in results] == [(5, 6), (5, 6), (3, 5, 6), (3, 5, 6)]
    assert [len(result.rows) for result in results] == [10, 10, 18, 18]
    assert "4 shots: 3 of 7 classes have fewer" in caplog.text
    assert len(caplog.records) == 2
    assert set(results[0].probe.scores.argmax(axis=1)) <= set(range(5))


def test_few_shot_takes_a_given_penalty(split: Split) -> None:
    train, labels, test, _ = split
    options = ProbeOptions(l2=0.3)
    (result,) = few_shot(train, labels, test, 5, shots=[2], seeds=[0], options=options)
    assert result.probe.l2 == 0.3


BROKEN = [
    ("train_labels", lambda a: np.where(np.arange(len(a)) == 4, 5, a), "from 0 to 4.*Got 5"),
    ("train_labels", lambda a: a - 1, "from 0 to 4.*Got -1"),
    ("train_labels", np.zeros_like, "at least 2 classes.*Got 1"),
    ("train_labels", lambda a: a[1:], r"int64 \[400\].*\[399\]"),
    ("train_labels", lambda a: a.astype(np.int32), "int64"),
    ("train_features", lambda a: a[:0], "train: features must be float32.*not empty"),
    ("train_features", lambda a: a[:, :3], "3 numbers a sample in train and 12 in test"),
    ("train_features", lambda a: np.where(a == a[7, 2], np.nan, a), "train: .*Row 7 holds NaN"),
    ("train_features", lambda a: a * 10, "train: .*unit length.*has length 10"),
    ("test_features", lambda a: a[:0], "test: features must be float32.*not empty"),
    ("test_features", lambda a: np.where(a == a[9, 0], np.inf, a), "test: .*Row 9 holds NaN, inf"),
    ("test_features", lambda a: a * 10, "test: .*unit length.*has length 10"),
    ("test_features", lambda a: a.astype(np.float16), "test: features must be float32"),
    ("classes", lambda classes: 1, "classes must be an integer of at least 2"),
]


@pytest.mark.parametrize(("name", "change", "words"), BROKEN)
@pytest.mark.parametrize("function", [linear_probe, few_shot])
def test_bad_input(function: object, name: str, change: object, words: str, split: Split) -> None:
    arguments = {
        "train_features": split[0],
        "train_labels": split[1],
        "test_features": split[2],
        "classes": 5,
    }
    arguments[name] = change(arguments[name])  # type: ignore[operator]
    with pytest.raises(InputError, match=words):
        list(function(**arguments))  # type: ignore[operator]


def test_bad_options(split: Split) -> None:
    train, labels, test, _ = split
    for options, words in [
        (ProbeOptions(validation_fraction=0.0), "validation_fraction must be a number"),
        (ProbeOptions(validation_fraction=0.001), "holds out 0 of 400"),
        (ProbeOptions(seed=-1), r"linear_probe\.seed must be an integer of at least 0"),
        (ProbeOptions(max_iterations=0), "max_iterations must be an integer"),
    ]:
        with pytest.raises(InputError, match=words):
            linear_probe(train, labels, test, 5, options=options)
    with pytest.raises(InputError, match=r"few_shot\.shots must be an integer of at least 1"):
        few_shot_rows(labels, 0, seed=0)
    for wrong, words in [
        ({"shots": [4, 0]}, r"few_shot\.shots must be an integer of at least 1. Got 0"),
        ({"shots": []}, "must not be empty"),
        ({"seeds": []}, "must not be empty"),
        ({"seeds": [-1]}, r"few_shot\.seeds must be an integer of at least 0"),
    ]:
        with pytest.raises(InputError, match=words):
            list(few_shot(train, labels, test, 5, **wrong))
