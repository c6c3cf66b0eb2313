"""What numbers in a file of results can be: checks for whatever is read back from disk.

Each check raises ValueError with the name of the number, the rule and the value; who reads the file
adds where it stands.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from siftclip.eval.metrics.outcomes import Outcomes, Statistic
from siftclip.records import is_unicode

# Metrics that are shares, by a word of their names in all tools; others only have to be finite.
_SHARE = re.compile(
    r"acc|recall|precision|jaccard|f1|toxicity|main_metric|auc|auroc|fraction|share", re.IGNORECASE
)
_LARGEST = 1e100  # of any number: sums and squares of such stay finite
_LARGEST_COUNT = 2**53  # whole numbers up to here are exact as floats
COUNT_PREFIX = "count_"  # of the names of metrics that are whole numbers
_ROUNDING = 1e-6
_HITS_ROUNDING = 1e-3  # sums of float32 probabilities over the captions of an image

# The arrays of each statistic, see `outcomes`, with the kind of their dtype.
_ARRAYS: dict[Statistic, dict[str, str]] = {
    "mean": {"value": "f"},
    "class_mean": {"value": "f", "cell": "i"},
    "worst_cell": {"value": "f", "cell": "i"},
    "f1_macro": {"predicted": "i", "label": "i"},
    "two_means": {"value": "f", "hits": "f", "queries": "f"},
    "average_precision": {"scores": "f", "labels": "b"},
}
_KINDS = {"f": "floats", "i": "integers", "b": "booleans"}
_LEAST = {"cell": -1, "label": 0, "predicted": 0}


def require_number(name: str, value: object, *, least: float = -math.inf) -> float:
    """Return `value`, a number of at least `least` whose absolute value is at most 1e100."""
    number = _finite(name, value, least)
    if not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name} must lie in [-1e100, 1e100]. Got {reprlib.repr(number)}")
    return number


def _finite(name: str, value: object, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number. Got {reprlib.repr(value)}")
    if not least <= value < math.inf or value == -math.inf:
        rule = "finite" if least == -math.inf else f"finite and at least {least:g}"
        raise ValueError(f"{name} must be {rule}. Got {reprlib.repr(value)}")
    return value


def require_share(name: str, value: object) -> float:
    """Return `value`, a number in [0, 1]."""
    number = _finite(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(
            f"{name} must be a share in [0, 1], not a percentage. Got {reprlib.repr(number)}"
        )
    return number


def require_count(name: str, value: object, *, least: int = 0) -> int:
    """Return `value`, a whole number from `least` to 2**53, as an int."""
    number = require_number(name, value, least=least)
    if number != int(number) or number > _LARGEST_COUNT:
        raise ValueError(
            f"{name} must be a whole number of at most 2**53. Got {reprlib.repr(number)}"
        )
    return int(number)


def require_text(name: str, value: object) -> str:
    """Return `value`, a text that is not empty."""
    if not isinstance(value, str) or not value or not is_unicode(value):
        raise ValueError(f"{name} must be a text that is not empty. Got {reprlib.repr(value)}")
    return value


def check_metrics(metrics: object) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Check the metrics of a task: NaN becomes None, and the names of those are returned too.

    Args:
        metrics: numbers by name, or None where a metric is not defined. What is named as a share
            lies in [0, 1], `count_*` are whole numbers from 0, others are finite.
    """
    if not isinstance(metrics, Mapping):
        raise ValueError(f"metrics must be numbers by name. Got {reprlib.repr(metrics)}")
    values: dict[str, float | None] = {}
    undefined = []
    for name, value in metrics.items():
        label = f"metrics.{require_text('the name of a metric', name)}"
        if isinstance(value, float) and math.isnan(value):
            undefined.append(name)
            values[name] = None
        elif value is None:
            values[name] = None
        elif name.startswith(COUNT_PREFIX):
            values[name] = float(require_count(label, value))
        else:
            check = require_share if _SHARE.search(name) else require_number
            values[name] = float(check(label, value))
    return values, tuple(undefined)


def check_interval(interval: object, value: float | None) -> tuple[float, float] | None:
    """Check an interval of a main metric: two ends in [0, 1], in order, the metric between them."""
    if interval is None:
        return None
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        raise ValueError(f"interval must be two numbers or null. Got {reprlib.repr(interval)}")
    low, high = (float(require_share("interval", end)) for end in interval)
    if low > high:
        raise ValueError(f"interval must begin with its lower end. Got [{low}, {high}]")
    if value is None or not low - _ROUNDING <= value <= high + _ROUNDING:
        raise ValueError(f"interval must hold the main metric {value}. Got [{low}, {high}]")
    return low, high


def check_outcomes(statistic: object, arrays: Mapping[str, np.ndarray], units: Any) -> Outcomes:
    """Check what a main metric is made of: the arrays of its statistic, with one row per unit.

    Args:
        statistic: one of `outcomes.Statistic`.
        arrays: by name.
        units: uint64 [n], n at least 1.
    """
    known: Statistic | None = next(
        (name for name in get_args(Statistic) if name == statistic), None
    )
    if known is None:
        raise ValueError(f"statistic must be one of {[*get_args(Statistic)]}. Got {statistic!r}")
    if units.dtype != np.uint64 or units.ndim != 1 or not len(units):
        raise ValueError(f"units must be uint64 [n]. Got {units.dtype} {list(units.shape)}")
    wanted = _ARRAYS[known]
    if arrays.keys() != wanted.keys():
        raise ValueError(f"{known} needs the arrays {sorted(wanted)}. Got {sorted(arrays)}")
    for name, kind in wanted.items():
        array = arrays[name]
        shape = (len(units),) if name not in ("scores", "labels") else arrays["scores"].shape
        if array.dtype.kind != kind or array.shape != shape or len(array) != len(units):
            raise ValueError(
                f"{name} must be {_KINDS[kind]} for {len(units)} units. "
                f"Got {array.dtype} {list(array.shape)}"
            )
        _check_values(name, array)
    if known == "two_means" and (arrays["hits"] > arrays["queries"] + _HITS_ROUNDING).any():
        raise ValueError("hits must not be more than queries")
    return Outcomes(statistic=known, arrays=dict(arrays))


def _check_values(name: str, array: np.ndarray) -> None:
    if name == "value":
        fine = np.isnan(array) | ((array >= 0) & (array <= 1))  # NaN: a unit that does not count
        rule = "shares in [0, 1] or NaN"
    elif array.dtype.kind == "f":
        fine = np.isfinite(array) & ((array >= 0) | (name == "scores"))
        rule = "finite" if name == "scores" else "finite and not negative"
    else:
        least = _LEAST.get(name, 0)
        fine, rule = array >= least, f"at least {least}"
    if not fine.all():
        raise ValueError(f"{name} must be {rule}. Got {array[~fine].flat[0]!r}")
