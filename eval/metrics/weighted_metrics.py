"""Main metrics of tasks on many resamples at once: the units keep their places and have weights.

A weight says how often a resample holds a unit. The sums over units are products of a sparse
matrix, a row a group of equal units, with the matrix of all weights. A task of 20,000 units that
are right or wrong takes 65 ms for 1,000 resamples on one core, half of it to draw the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from siftclip.eval.metrics.outcomes import Statistic

Arrays = Mapping[str, np.ndarray]
WeightedMetric = Callable[[Arrays, np.ndarray], np.ndarray]


def weighted_mean(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
    """Compute the mean of `value`; a unit whose value is NaN is left out.

    Args:
        arrays: value float [n].
        weights: uint8 or float32 [R, n], at least 0. The weights of a resample add up to less
            than 2^24, so that whole ones are added without error.

    Returns:
        float64 [R], NaN where no unit has weight. So in all functions here.
    """
    value = arrays["value"]
    (distinct,), drawn = _distinct(weights, ~np.isnan(value), value)
    return _ratio(distinct.astype(np.float64) @ drawn, drawn.sum(axis=0))


def weighted_class_mean(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
    """Average the mean `value` of each cell over the cells; cells without weight are left out.

    With hits as values and labels as cells, this is scikit-learn's balanced_accuracy_score.

    Args:
        arrays: value float [n], NaN is left out; cell int [n], a unit of cell -1 is in none.
        weights: as for `weighted_mean`.
    """
    return _mean_of_defined(_cell_means(arrays, weights))


def weighted_worst_cell(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
    """Find the lowest of the cells' means of `value`, as for worst groups in WILDS and DataComp.

    On a resample it is a minimum over noisier means, so that it lies below the value of the task
    on average, as that lies below the lowest of the true means; where one cell is clearly the
    lowest, neither does. `resampling` takes off the first difference, and nothing the second.

    Args:
        arrays: as for `weighted_class_mean`.
        weights: as for `weighted_mean`.
    """
    lowest: np.ndarray = np.fmin.reduce(_cell_means(arrays, weights), axis=0, initial=np.nan)
    return lowest


def weighted_f1_macro(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
    """Compute the mean of F1 over the labels that units with weight have.

    scikit-learn's f1_score(average="macro") with `labels` as those that occur in y_true.

    Args:
        arrays: predicted int [n], label int [n].
        weights: as for `weighted_mean`.
    """
    predicted, label = arrays["predicted"], arrays["label"]
    everywhere = np.ones(len(label), dtype=bool)
    (predicted, label), drawn = _distinct(weights, everywhere, predicted, label)
    labels, numbers = np.unique(label, return_inverse=True)
    places = np.searchsorted(labels, predicted)
    is_label = np.isin(predicted, labels)  # a prediction of another label is a miss, no more
    hit = predicted == label
    of_label = _sums(numbers, np.arange(len(label)), len(labels), drawn)
    of_predicted = _sums(places[is_label], np.flatnonzero(is_label), len(labels), drawn)
    hits = _sums(numbers[hit], np.flatnonzero(hit), len(labels), drawn)
    f1 = _ratio(2 * hits, of_label + of_predicted)
    return _mean_of_defined(np.where(of_label > 0, f1, np.nan))


def weighted_two_means(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
    """Compute (mean of `value` + sum of `hits` / sum of `queries`) / 2, for two-way retrieval.

    Args:
        arrays: value float [n], NaN is left out of the first mean; hits and queries float [n].
        weights: as for `weighted_mean`.
    """
    names = ("value", "hits", "queries")
    everywhere = np.ones(len(arrays["value"]), dtype=bool)
    keys, drawn = _distinct(weights, everywhere, *(arrays[name] for name in names))
    value, hits, queries = (key.astype(np.float64) for key in keys)
    known = ~np.isnan(value)
    mean = _ratio(value[known] @ drawn[known], drawn[known].sum(axis=0))
    both: np.ndarray = (mean + _ratio(hits @ drawn, queries @ drawn)) / 2
    return both


def weighted_average_precision(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
    """Compute the mean over the classes of the average precision.

    Units of equal score share one precision, as in scikit-learn; clip_benchmark ranks them as the
    sort leaves them, which is the same where scores differ. As in clip_benchmark, a class without
    a positive counts as 0. A class whose positives have no weight is left out. NaN if a score is.

    Args:
        arrays: scores float [n, C], labels bool [n, C].
        weights: as for `weighted_mean`.
    """
    scores, labels = arrays["scores"], arrays["labels"].astype(bool)
    precisions = np.full((scores.shape[1], len(weights)), np.nan)
    if np.isnan(scores).any():
        return _mean_of_defined(precisions)
    by_unit = _by_unit(weights)
    some_weight = by_unit.any(axis=0)
    for precision, score, label in zip(precisions, scores.T, labels.T, strict=True):
        thresholds = np.unique(score[label])
        # group 0 is at or above the highest threshold; units below the lowest cannot count
        groups = len(thresholds) - np.searchsorted(thresholds, score, side="right")
        above = np.flatnonzero(groups < len(thresholds))
        positives = np.flatnonzero(label)
        retrieved = _sums(groups[above], above, len(thresholds), by_unit).cumsum(axis=0)
        hits = _sums(groups[positives], positives, len(thresholds), by_unit)
        shares = _ratio(hits.cumsum(axis=0), retrieved)
        products = np.where(hits > 0, shares, 0.0) * hits
        total = hits.sum(axis=0)
        precision[:] = _ratio(products.sum(axis=0), total)
        if not label.any():
            precision[some_weight] = 0.0
    return _mean_of_defined(precisions)


STATISTICS: dict[Statistic, WeightedMetric] = {
    "mean": weighted_mean,
    "class_mean": weighted_class_mean,
    "worst_cell": weighted_worst_cell,
    "f1_macro": weighted_f1_macro,
    "two_means": weighted_two_means,
    "average_precision": weighted_average_precision,
}


def _cell_means(arrays: Arrays, weights: np.ndarray) -> np.ndarray:
    """Compute the mean value of each cell, float64 [cells, R]; NaN where it has no weight."""
    value, cell = arrays["value"], arrays["cell"]
    (value, cell), drawn = _distinct(weights, ~np.isnan(value) & (cell != -1), value, cell)
    cells, numbers = np.unique(cell, return_inverse=True)
    rows = np.arange(len(cell))
    sums = _sums(numbers, rows, len(cells), drawn, value.astype(np.float64))
    return _ratio(sums, _sums(numbers, rows, len(cells), drawn))


def _distinct(
    weights: np.ndarray, kept: np.ndarray, *keys: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Find the distinct rows of the keys over the kept units, and the weight of each.

    Few rows are distinct as a rule, and all that follows works on them in float64.

    Args:
        weights: [R, n].
        kept: bool [n].
        keys: arrays [n].

    Returns:
        The keys of the G distinct rows, each [G], and float64 [G, R].
    """
    units = np.flatnonzero(kept)
    codes = np.zeros(len(units), dtype=np.int64)
    for key in keys:
        values, inverse = np.unique(key[units], return_inverse=True)
        codes = codes * len(values) + inverse
    _, first, groups = np.unique(codes, return_index=True, return_inverse=True)
    drawn = _sums(groups, units, len(first), _by_unit(weights))
    return [key[units[first]] for key in keys], drawn


def _by_unit(weights: np.ndarray) -> np.ndarray:
    return weights.T.astype(np.float32, order="C")


def _sums(
    groups: np.ndarray,
    rows: np.ndarray,
    count: int,
    matrix: np.ndarray,
    factors: np.ndarray | None = None,
) -> np.ndarray:
    """Sum rows of a matrix [m, R] times their factors by group: float64 [count, R]."""
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    if factors is None:
        factors = np.ones(len(rows), dtype=matrix.dtype)
    product: np.ndarray = csr_matrix((factors, (groups, rows)), shape=(count, len(matrix))) @ matrix
    return product.astype(np.float64, copy=False)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    ratio = np.full_like(top, np.nan)
    np.divide(top, bottom, out=ratio, where=bottom > 0)
    return ratio


def _mean_of_defined(rows: np.ndarray) -> np.ndarray:
    """Average over the first axis without NaN; NaN where nothing else is there."""
    defined = ~np.isnan(rows)
    return _ratio(np.where(defined, rows, 0.0).sum(axis=0), defined.sum(axis=0))
