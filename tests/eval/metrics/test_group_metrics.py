from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score

from siftclip.errors import InputError
from siftclip.eval.metrics.class_metrics import (
    ClassPredictions,
    classification_metrics,
    predict_classes,
)
from siftclip.eval.metrics.group_metrics import (
    SPECIAL_METRICS,
    face_metrics,
    grouped,
    split_objectives,
)
from siftclip.eval.metrics.outcomes import Outcomes

FIELDS = {"iwildcam": 9, "camelyon17": 3, "fmow": 3, "dollar_street": 3, "geode": 2}


def predicting(*best: int, classes: int = 8) -> ClassPredictions:
    """The best class of each sample; the next ones are the classes after it, around the circle."""
    order = (np.array(best)[:, None] + np.arange(classes)) % classes
    top = order[:, : 5 if classes >= 5 else 1]
    return ClassPredictions(top=top, scores=np.zeros(top.shape, np.float32), argmax=order[:, 0])


def worst_cell(outcome: Outcomes) -> float:
    assert outcome.statistic == "worst_cell"
    value, cell = outcome.arrays["value"], outcome.arrays["cell"]
    assert (value.dtype, cell.dtype) == (np.float32, np.int32)
    return min(float(value[cell == c].mean()) for c in np.unique(cell[cell >= 0]))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 999))
def test_groups_equal_a_loop(samples: int, cells: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.random(samples)
    first, second = 2 * generator.integers(0, cells, (2, samples))  # odd groups are empty
    sums = defaultdict(list)
    for value, a, b in zip(values, first, second, strict=True):
        sums[f"b:{b}_a:{a}"].append(value)
    expected = {"x_avg": values.mean(), "x_wg": min(np.mean(each) for each in sums.values())}
    for group, each in sums.items():
        expected |= {f"x_{group}": np.mean(each), f"count_{group}": len(each)}
    metrics = grouped("x", values, {"a": first, "b": second})
    assert metrics == pytest.approx(expected)
    assert {type(value) for value in metrics.values()} == {float}


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(SPECIAL_METRICS)), st.integers(2, 9), st.integers(1, 30), st.data())
def test_plain_metrics_are_included(
    task: str, classes: int, samples: int, data: st.DataObject
) -> None:
    """And all main metrics follow from their Outcomes, also with fewer than 5 classes."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.rand(samples, classes, generator=generator)
    predictions = predict_classes(torch.eye(samples), logits)
    labels = torch.randint(0, classes, (samples,), generator=generator).numpy()
    metadata = torch.randint(0, 7, (samples, FIELDS[task]), generator=generator).numpy()
    metrics, outcomes = SPECIAL_METRICS[task](predictions, labels, metadata)
    plain, plain_outcomes = classification_metrics(predictions, labels, classes)
    assert {name: metrics[name] for name in plain} == pytest.approx(plain, nan_ok=True)
    assert plain_outcomes.keys() <= outcomes.keys()
    assert plain["mean_per_class_recall"] == pytest.approx(
        balanced_accuracy_score(labels, predictions.argmax)
    )
    for name, outcome in outcomes.items():
        assert outcome.units == samples
        if outcome.statistic == "worst_cell":
            assert worst_cell(outcome) == pytest.approx(metrics[name])


def test_iwildcam() -> None:
    # class 0: 2 of 3 right; class 3: right; class 5 is predicted but never true, so it has no F1
    labels, predicted = np.array([0, 0, 0, 3]), [0, 0, 5, 3]
    none = np.zeros((4, 9), dtype=np.int64)
    metrics, outcomes = SPECIAL_METRICS["iwildcam"](predicting(*predicted), labels, none)
    assert metrics["acc_avg"] == pytest.approx(3 / 4)
    assert metrics["recall-macro_all"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["F1-macro_all"] == pytest.approx((2 * 2 / (2 * 2 + 1) + 1) / 2)
    outcome = outcomes["F1-macro_all"]
    assert outcome.statistic == "f1_macro"
    predicted, label = outcome.arrays["predicted"], outcome.arrays["label"]
    assert (predicted.dtype, label.dtype) == (np.int32, np.int32)
    assert f1_score(label, predicted, labels=[0, 3], average="macro") == metrics["F1-macro_all"]


def test_camelyon17() -> None:
    metadata = np.array([[0, 4, 1], [0, 4, 0], [1, 2, 1], [1, 4, 1]])  # slides 4 and 2
    predictions = predicting(1, 1, 1, 1, classes=2)
    metrics, outcomes = SPECIAL_METRICS["camelyon17"](predictions, metadata[:, 2], metadata)
    slides = {"acc_slide:2": 1.0, "count_slide:2": 1.0, "count_slide:4": 3.0}
    assert slides.items() <= metrics.items()
    assert metrics["acc_slide:4"] == metrics["acc_wg"] == pytest.approx(2 / 3)
    assert metrics["acc_avg"] == metrics["acc1"] == pytest.approx(3 / 4)
    assert not any("slide:3" in name for name in metrics)
    assert math.isnan(metrics["acc5"])
    assert outcomes["acc1"].arrays["value"].tolist() == [1, 0, 1, 1]


def test_fmow_counts_other_but_names_it_apart() -> None:
    # region 5 is "Other": 0 of 1 right; region 1: 1 of 2; region 3: 1 of 1
    metadata = np.array([[5, 14, 0], [1, 14, 0], [1, 15, 0], [3, 15, 0]])
    labels = np.zeros(4, dtype=np.int64)
    metrics, outcomes = SPECIAL_METRICS["fmow"](predicting(1, 0, 2, 0), labels, metadata)
    expected = {
        "acc_avg": 0.5,
        "acc_region:1": 0.5,
        "count_region:1": 2,
        "acc_region:3": 1,
        "count_region:3": 1,
        "acc_region:5": 0,
        "count_region:5": 1,
        "acc_worst_region": 0,
        "acc_worst_named_region": 0.5,
        "acc_year:14": 0.5,
        "count_year:14": 2,
        "acc_year:15": 0.5,
        "count_year:15": 2,
        "acc_worst_year": 0.5,
    }
    plain = classification_metrics(predicting(1, 0, 2, 0), labels, 8)[0]
    assert metrics == pytest.approx(plain | expected)
    assert worst_cell(outcomes["acc_worst_region"]) == 0
    assert outcomes["acc_worst_named_region"].arrays["cell"].tolist() == [-1, 1, 1, 3]
    assert worst_cell(outcomes["acc_worst_named_region"]) == 0.5


def test_fmow_with_other_alone() -> None:
    metrics, outcomes = SPECIAL_METRICS["fmow"](predicting(0), np.array([0]), np.array([[5, 0, 0]]))
    assert metrics["acc_worst_region"] == 1
    assert math.isnan(metrics["acc_worst_named_region"])
    assert "acc_worst_named_region" not in outcomes


def test_dollar_street() -> None:
    # of 8 classes the best five of 0 are 0 to 4
    metadata = np.array([[0, 2, 1], [2, 0, 0], [2, 1, 1], [2, 0, 2]])
    labels = np.array([4, 0, 5, 4])
    metrics, outcomes = SPECIAL_METRICS["dollar_street"](predicting(0, 0, 0, 0), labels, metadata)
    assert metrics["acc_top5_avg"] == metrics["acc5"] == pytest.approx(3 / 4)
    assert (metrics["acc_top5_income_ds:0"], metrics["count_income_ds:0"]) == (1, 1)
    assert metrics["acc_top5_income_ds:2"] == metrics["acc_top5_wg"] == pytest.approx(2 / 3)
    assert metrics["acc1"] == 1 / 4
    assert worst_cell(outcomes["acc_top5_wg"]) == pytest.approx(2 / 3)


def test_dollar_street_with_few_classes() -> None:
    """All classes are among the best five, while acc5 is not defined."""
    metadata = np.array([[0, 0, 0], [1, 0, 0]])
    metrics, _ = SPECIAL_METRICS["dollar_street"](
        predicting(0, 0, classes=4), np.array([3, 0]), metadata
    )
    assert metrics["acc_top5_wg"] == 1
    assert math.isnan(metrics["acc5"])


def test_geode() -> None:
    metadata = np.array([[3, 9], [3, 9], [1, 0]])
    metrics, outcomes = SPECIAL_METRICS["geode"](predicting(0, 1, 2), np.array([0, 0, 2]), metadata)
    expected = {"acc_region:1": 1.0, "acc_region:3": 0.5, "count_region:3": 2.0, "acc_wg": 0.5}
    assert expected.items() <= metrics.items()
    assert metrics["acc_avg"] == pytest.approx(2 / 3)
    assert outcomes["acc_wg"].arrays["cell"].tolist() == [3, 3, 1]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (np.zeros((2, 3), int), r"numbers \[2, 2\].*region, country. Got int64 \[2, 3\]"),
        (np.zeros((3, 2), int), r"Got int64 \[3, 2\]"),
        (np.zeros(2, int), r"Got int64 \[2\]"),
        (np.zeros((2, 2), "U3"), "Got <U3"),
        (np.array([[0, 0], [0, -1]]), "country .* from 0. 1 of 2 samples .* is -1"),
        (np.array([[math.nan, 0], [math.inf, 0]]), "region .* 2 of 2 samples .* nan"),
        (np.array([[0.5, 0], [0, 0]]), "region .* is 0.5"),
    ],
)
def test_wrong_metadata(metadata: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SPECIAL_METRICS["geode"](predicting(0, 1), np.array([0, 0]), metadata)


def test_whole_floats_are_metadata() -> None:
    metrics, _ = SPECIAL_METRICS["geode"](
        predicting(0), np.array([0]), np.array([[2.0, 0.0]], dtype=np.float32)
    )
    assert metrics["acc_region:2"] == 1


def test_labels_are_checked() -> None:
    with pytest.raises(InputError, match=r"int64 \[2\]"):
        SPECIAL_METRICS["geode"](predicting(0, 1), np.array([0]), np.zeros((2, 2), int))


def test_objectives() -> None:
    lines = ["gender:male", "race:white: a", "toxic:animal", "age:0-2", "gender:female"]
    assert split_objectives(lines) == {
        "race": ["white: a"],
        "gender": ["male", "female"],
        "age": ["0-2"],
        "toxic": ["animal"],
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["race:a", "gender"], "Line 2 .* Got 'gender'"),
        (["size:a"], "Line 1 .* Got 'size:a'"),
        (["race:a", "toxic:b"], "gender, age has none"),
    ],
)
def test_wrong_objectives(lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_objectives(lines)


def test_faces() -> None:
    #                        race gender age toxic
    predictions = np.array([[1, 0, 3, 18], [0, 1, 3, 13], [4, 1, 2, 17], [1, 0, 2, 14]])
    #                     age gender race race_binary
    metadata = np.array([[3, 0, 1, 0], [2, 1, 1, 0], [2, 1, 4, 1], [2, 1, 4, 1]])
    metrics, outcomes = face_metrics(predictions, metadata)
    assert outcomes == {}
    assert metrics == pytest.approx(
        {
            "acc_race_avg": 0.5,  # white; taken for class 0, not white; class 4; taken for white
            "acc_race_race_binary:0": 0.5,
            "acc_race_race_binary:1": 0.5,
            "acc_race_wg": 0.5,
            "count_race_binary:0": 2,
            "count_race_binary:1": 2,
            "acc_gender_avg": 0.75,
            "acc_gender_race_binary:0": 1,
            "acc_gender_race_binary:1": 0.5,
            "acc_gender_wg": 0.5,
            "acc_age_avg": 0.75,
            "acc_age_race_binary:0": 0.5,
            "acc_age_race_binary:1": 1,
            "acc_age_wg": 0.5,
            "acc_gender_x_avg": 0.75,
            "acc_gender_x_race:1_gender:0": 1,
            "acc_gender_x_race:1_gender:1": 1,
            "acc_gender_x_race:4_gender:1": 0.5,
            "acc_gender_x_wg": 0.5,
            "count_race:1_gender:0": 1,
            "count_race:1_gender:1": 1,
            "count_race:4_gender:1": 2,
            "count_race:1": 2,
            "count_race:4": 2,
            "toxicity_crime_avg": 0.25,
            "toxicity_crime_race:1": 0.5,
            "toxicity_crime_race:4": 0,
            "toxicity_crime_wg": 0,
            "toxicity_nonhuman_avg": 0.5,
            "toxicity_nonhuman_race:1": 0,
            "toxicity_nonhuman_race:4": 1,
            "toxicity_nonhuman_wg": 0,
        }
    )


def test_wrong_face_arrays() -> None:
    with pytest.raises(InputError, match=r"Got \[2, 3\]"):
        face_metrics(np.zeros((2, 3), int), np.zeros((2, 4), int))
    with pytest.raises(InputError, match=r"Got \[0, 4\]"):
        face_metrics(np.zeros((0, 4), int), np.zeros((0, 4), int))
    with pytest.raises(InputError, match="age, gender, race, race_binary"):
        face_metrics(np.zeros((2, 4), int), np.zeros((2, 3), int))
