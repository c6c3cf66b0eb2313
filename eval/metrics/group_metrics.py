"""DataComp's evaluators of tasks with metadata: WILDS, Dollar Street, GeoDE and the face tasks.

The names of the metrics are those of DataComp's result files: `<metric>_avg` over all samples,
`<metric>_<field>:<value>` and `count_<field>:<value>` of a group, `<metric>_wg` of the worst group.
WILDS also lists groups without samples, here only those that have any are named and count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from siftclip.errors import InputError
from siftclip.eval.metrics.class_metrics import (
    TOP,
    ClassPredictions,
    classification_metrics,
    group_means,
)
from siftclip.eval.metrics.outcomes import Metrics, Outcomes

Results = tuple[Metrics, dict[str, Outcomes]]

CAMELYON17_FIELDS = ("hospital", "slide", "y")
FMOW_FIELDS = ("region", "year", "y")
DOLLAR_STREET_FIELDS = ("income_ds", "income_meta", "region")
GEODE_FIELDS = ("region", "country")
FACE_FIELDS = ("age", "gender", "race", "race_binary")
FACE_OBJECTIVES = ("race", "gender", "age", "toxic")

_FMOW_OTHER = 5  # the region "Other" in WILDS's order
_FACE_RACE_OF_BINARY_0 = 1  # the race class whose faces have race_binary 0
_TOXIC_NONHUMAN, _TOXIC_CRIME = 14, 18  # the first toxic classes of these two sorts; crime is last


def require_metadata(metadata: np.ndarray, samples: int, fields: Sequence[str]) -> np.ndarray:
    """Return metadata as int64 [samples, fields].

    Args:
        metadata: numbers [samples, fields], whole and not negative.
        samples: how many there are.
        fields: the names of the columns.

    Raises:
        InputError: the shape or a value is another.
    """
    if metadata.shape != (samples, len(fields)) or metadata.dtype.kind not in "biuf":
        raise InputError(
            f"The metadata must be numbers [{samples}, {len(fields)}], one row a sample with "
            f"{', '.join(fields)}. Got {metadata.dtype} {list(metadata.shape)}."
        )
    for name, column in zip(fields, metadata.T, strict=True):
        wrong = ~np.isfinite(column) | (column < 0) | (column != np.floor(column))
        if wrong.any():
            raise InputError(
                f"{name} in the metadata must be whole numbers from 0. {wrong.sum()} of {samples} "
                f"samples have others, the first is {column[wrong][0]}."
            )
    return metadata.astype(np.int64)


def grouped(name: str, values: np.ndarray, fields: dict[str, np.ndarray]) -> Metrics:
    """Average over all samples, in each group, and in the worst group.

    Args:
        name: of the metric.
        values: bool or float [n].
        fields: columns int64 [n] of the metadata by name. Each combination of values that occurs
            is a group; WILDS names it by its fields in reverse order.

    Returns:
        `<name>_avg`, `<name>_<group>`, `count_<group>` and `<name>_wg`, the lowest of the means.
    """
    columns = np.stack(list(fields.values()), axis=1)
    combinations, groups = np.unique(columns, axis=0, return_inverse=True)
    _, means, counts = group_means(values, groups.reshape(-1))  # numpy 2.0 returned [n, 1]
    metrics = {f"{name}_avg": float(values.mean())}
    for combination, mean, count in zip(combinations, means, counts, strict=True):
        pairs = zip(fields, combination, strict=True)
        group = "_".join(reversed([f"{field}:{value}" for field, value in pairs]))
        metrics[f"{name}_{group}"] = float(mean)
        metrics[f"count_{group}"] = float(count)
    metrics[f"{name}_wg"] = float(means.min())
    return metrics


def _worst_cell(values: np.ndarray, cells: np.ndarray) -> Outcomes:
    return Outcomes(
        statistic="worst_cell",
        arrays={"value": values.astype(np.float32), "cell": cells.astype(np.int32)},
    )


def _plain(predictions: ClassPredictions, labels: np.ndarray) -> Results:
    # The predictions do not say how many classes there are. The caller checks labels against the
    # class names; here only what is no class of any task is found.
    seen = [predictions.top.max(), predictions.argmax.max(), labels.max(initial=0)]
    return classification_metrics(predictions, labels, int(max(seen)) + 1)


def iwildcam_metrics(
    predictions: ClassPredictions, labels: np.ndarray, metadata: np.ndarray
) -> Results:
    """Compute acc_avg, recall-macro_all and F1-macro_all over the classes that have samples.

    Args:
        predictions: of n samples.
        labels: int64 [n].
        metadata: not used; its location is a group in WILDS, but not in these metrics.
    """
    metrics, outcomes = _plain(predictions, labels)
    predicted, present = predictions.argmax, np.unique(labels)
    metrics["acc_avg"] = float((predicted == labels).mean())
    # Here, since importing it takes a second and a half, which other tasks need not cost.
    from sklearn.metrics import f1_score, recall_score

    for name, score in (("recall-macro_all", recall_score), ("F1-macro_all", f1_score)):
        metrics[name] = float(score(labels, predicted, labels=present, average="macro"))
    outcomes["F1-macro_all"] = Outcomes(
        statistic="f1_macro",
        arrays={"predicted": predicted.astype(np.int32), "label": labels.astype(np.int32)},
    )
    return metrics, outcomes


def camelyon17_metrics(
    predictions: ClassPredictions, labels: np.ndarray, metadata: np.ndarray
) -> Results:
    """Compute acc_avg, accuracy and count of each slide, and acc_wg of the worst slide.

    Args:
        predictions: of n samples.
        labels: int64 [n].
        metadata: int64 [n, 3]: hospital, slide, y.
    """
    metrics, outcomes = _plain(predictions, labels)
    slides = require_metadata(metadata, len(labels), CAMELYON17_FIELDS)[:, 1]
    right = predictions.argmax == labels
    metrics |= grouped("acc", right, {"slide": slides})
    outcomes["acc_wg"] = _worst_cell(right, slides)
    return metrics, outcomes


def fmow_metrics(
    predictions: ClassPredictions, labels: np.ndarray, metadata: np.ndarray
) -> Results:
    """Compute acc_avg, accuracies and counts of years and regions, and of the worst ones.

    acc_worst_region is over all regions. DataComp's code leaves out the region "Other" by its
    name, but without WILDS's names the regions are numbers, and its published results include
    this region, of 4 images in the test set. acc_worst_named_region leaves it out (NaN if no
    other has samples).

    Args:
        predictions: of n samples.
        labels: int64 [n].
        metadata: int64 [n, 3]: region, year, y.
    """
    metrics, outcomes = _plain(predictions, labels)
    regions, years, _ = require_metadata(metadata, len(labels), FMOW_FIELDS).T
    right = predictions.argmax == labels
    for field, column in (("year", years), ("region", regions)):
        metrics |= grouped("acc", right, {field: column})
        metrics[f"acc_worst_{field}"] = metrics.pop("acc_wg")
        outcomes[f"acc_worst_{field}"] = _worst_cell(right, column)
    named = regions != _FMOW_OTHER
    metrics["acc_worst_named_region"] = float("nan")
    if named.any():
        means = group_means(right[named], regions[named])[1]
        metrics["acc_worst_named_region"] = float(means.min())
        outcomes["acc_worst_named_region"] = _worst_cell(right, np.where(named, regions, -1))
    return metrics, outcomes


def dollar_street_metrics(
    predictions: ClassPredictions, labels: np.ndarray, metadata: np.ndarray
) -> Results:
    """Compute acc_top5_avg, top-5 accuracy and count of each income group, and acc_top5_wg.

    With fewer than 5 classes all of them are among the best 5.

    Args:
        predictions: of n samples.
        labels: int64 [n].
        metadata: int64 [n, 3]: income_ds, income_meta, region.
    """
    metrics, outcomes = _plain(predictions, labels)
    incomes = require_metadata(metadata, len(labels), DOLLAR_STREET_FIELDS)[:, 0]
    hits = np.ones(len(labels), dtype=bool)
    if predictions.top.shape[1] == TOP:
        hits = (predictions.top == labels[:, None]).any(axis=1)
    metrics |= grouped("acc_top5", hits, {"income_ds": incomes})
    outcomes["acc_top5_wg"] = _worst_cell(hits, incomes)
    return metrics, outcomes


def geode_metrics(
    predictions: ClassPredictions, labels: np.ndarray, metadata: np.ndarray
) -> Results:
    """Compute acc_avg, accuracy and count of each region, and acc_wg of the worst.

    Args:
        predictions: of n samples.
        labels: int64 [n].
        metadata: int64 [n, 2]: region, country.
    """
    metrics, outcomes = _plain(predictions, labels)
    regions = require_metadata(metadata, len(labels), GEODE_FIELDS)[:, 0]
    right = predictions.argmax == labels
    metrics |= grouped("acc", right, {"region": regions})
    outcomes["acc_wg"] = _worst_cell(right, regions)
    return metrics, outcomes


# All raise InputError for labels or metadata of another shape, type or range.
SPECIAL_METRICS: dict[str, Callable[[ClassPredictions, np.ndarray, np.ndarray], Results]] = {
    "iwildcam": iwildcam_metrics,
    "camelyon17": camelyon17_metrics,
    "fmow": fmow_metrics,
    "dollar_street": dollar_street_metrics,
    "geode": geode_metrics,
}


def split_objectives(lines: Sequence[str]) -> dict[str, list[str]]:
    """Split class names or templates of the face tasks by objective: race, gender, age, toxic.

    Args:
        lines: each "objective:text"; the text may hold colons.

    Raises:
        InputError: a line has no colon or another objective, or an objective has no line.
    """
    texts_of: dict[str, list[str]] = {objective: [] for objective in FACE_OBJECTIVES}
    for number, line in enumerate(lines, start=1):
        objective, colon, text = line.partition(":")
        if not colon or objective not in texts_of:
            raise InputError(
                f"Line {number} must be an objective of {', '.join(FACE_OBJECTIVES)}, a colon and "
                f"a text. Got {line!r}."
            )
        texts_of[objective].append(text)
    missing = [objective for objective, texts in texts_of.items() if not texts]
    if missing:
        raise InputError(f"There must be lines of each objective. {', '.join(missing)} has none.")
    return texts_of


def face_metrics(predictions: np.ndarray, metadata: np.ndarray) -> Results:
    """Compute the metrics of FairFace and UTKFace, none of which is a main metric.

    acc_race (white or not), acc_gender and acc_age by race_binary, acc_gender_x by gender and
    race, and by race toxicity_crime and toxicity_nonhuman: the share of faces taken for a criminal
    or for an animal. As in DataComp `_wg` is the lowest mean, which for the toxicities is the group
    that is wronged least.

    Args:
        predictions: int64 [n, 4], the best class for race, gender, age and toxic.
        metadata: int64 [n, 4]: age, gender, race, race_binary.

    Raises:
        InputError: an array has another shape or values that are not whole numbers from 0.
    """
    samples = len(predictions)
    if predictions.shape != (samples, len(FACE_OBJECTIVES)) or not samples:
        raise InputError(
            f"The predictions must be int64 [n, 4] with {', '.join(FACE_OBJECTIVES)}, n at least "
            f"1. Got {list(predictions.shape)}."
        )
    columns = require_metadata(metadata, samples, FACE_FIELDS).T
    age, gender, race, race_binary = columns
    race_class, gender_class, age_class, toxic_class = predictions.T
    binary = {"race_binary": race_binary}
    race_right = (race_class != _FACE_RACE_OF_BINARY_0) == race_binary
    crime = toxic_class >= _TOXIC_CRIME
    nonhuman = (toxic_class >= _TOXIC_NONHUMAN) & ~crime
    metrics = grouped("acc_race", race_right, binary)
    metrics |= grouped("acc_gender", gender_class == gender, binary)
    metrics |= grouped("acc_age", age_class == age, binary)
    metrics |= grouped("acc_gender_x", gender_class == gender, {"gender": gender, "race": race})
    metrics |= grouped("toxicity_crime", crime, {"race": race})
    metrics |= grouped("toxicity_nonhuman", nonhuman, {"race": race})
    return metrics, {}
