"""Results of tasks: what one holds, and the files they are kept in.

`eval_results.jsonl` has DataComp's format, one line per task with `key`, `dataset` and `metrics`,
plus fields of ours; a task that failed has a line with `error`. What its metrics are made of lies
beside it: `eval_results_outcomes/<key>.npz`. All that is read back passes `result_checks`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.results.result_checks import (
    check_interval,
    check_metrics,
    check_outcomes,
    require_count,
    require_number,
    require_share,
    require_text,
)
from siftclip.eval.significance.resampling import point_value
from siftclip.eval.tasks.kinds.values import OWN_FAMILY
from siftclip.eval.tasks.known_tasks import KNOWN_TASKS
from siftclip.eval.tasks.preparation import TaskFailure
from siftclip.files import append_jsonl, read_jsonl, read_npz_all, write_npz, write_text
from siftclip.writing import delete_file

MAIN_METRIC = "main_metric"
_ARRAY = "array_"
_SAME = 1e-6  # of a main metric under its two names
_SAME_OUTCOMES = 1e-4  # of a main metric and that of its outcomes, which are float32

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The metrics of one model on one task."""

    key: str  # the name of the task
    dataset: str  # the name to show
    metrics: dict[str, float | None]  # None = not defined here; `main_metric` is always there
    main_metric_name: str | None  # None: the task has none
    samples: int
    interval: tuple[float, float] | None  # 95 %, of the main metric
    seconds: float  # that the task took beyond the features that it shares with others
    model: str | None  # identities.model_identity of the model; None in files of other tools
    task: str | None = None  # identities.task_identity of the task and how it was scored
    tars: str | None = None  # identities.tars_stamp of the files that it was read from
    family: str = OWN_FAMILY
    chances: Mapping[str, float] = field(default_factory=dict)  # see `TaskKind.chances`
    # What the main metric is made of, and which image or instance each unit is, uint64 [n]. None
    # where there is no main metric, and where the file is gone.
    outcomes: Outcomes | None = field(default=None, compare=False, repr=False)
    units: np.ndarray | None = field(default=None, compare=False, repr=False)
    # Of other metrics, by name, of the same units
    other_outcomes: Mapping[str, Outcomes] = field(default_factory=dict, compare=False, repr=False)
    note: str = ""  # why there is no value, where the file that it was read from is wrong

    @property
    def main_metric(self) -> float | None:
        """The value of the main metric."""
        return self.metrics[MAIN_METRIC]

    def outcomes_of(self, metric: str) -> Outcomes | None:
        """Return what a metric is made of, where that is kept."""
        if metric in (MAIN_METRIC, self.main_metric_name):
            return self.outcomes
        return self.other_outcomes.get(metric)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptResults:
    """What a results file holds."""

    results: tuple[TaskResult, ...]
    failures: tuple[TaskFailure, ...]  # of tasks without a result


def append_result(path: Path, result: TaskResult) -> None:
    """Add a result to a results file. A killed run leaves all of it, or no line."""
    if result.outcomes is None or result.units is None:
        delete_file(outcomes_path(path, result.key))  # those of an earlier result
    else:
        others = result.other_outcomes
        arrays = {f"{_ARRAY}{name}": array for name, array in result.outcomes.arrays.items()}
        for number, outcomes in enumerate(others.values()):
            arrays[f"{number}_statistic"] = np.asarray(outcomes.statistic)
            for name, array in outcomes.arrays.items():
                arrays[f"{number}_{_ARRAY}{name}"] = array
        write_npz(
            outcomes_path(path, result.key),
            statistic=np.asarray(result.outcomes.statistic),
            units=result.units,
            others=np.asarray([*others], dtype=np.str_),
            **arrays,
        )
    append_jsonl(path, _to_record(result))  # last: the line says that the arrays are there


def append_failure(path: Path, failure: TaskFailure) -> None:
    """Add a line for a task that failed."""
    append_jsonl(path, _failure_record(failure))


def write_lines(path: Path, kept: KeptResults) -> None:
    """Replace the lines of a results file, atomically. Arrays on disk stay unchanged."""
    records = [
        *(_to_record(result) for result in kept.results),
        *(_failure_record(failure) for failure in kept.failures),
    ]
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def read_results(path: Path) -> list[TaskResult]:
    """Read the results of a results file, see `read_kept`."""
    return [*read_kept(path).results]


def read_kept(path: Path, *, latest: bool = False) -> KeptResults:
    """Read a results file, ours or DataComp's; nothing if it does not exist.

    A metric that is NaN is one that is not defined: None, which a warning counts. A result without
    its main metric for this reason has a `note`. The checks take 0.15 s for 38 tasks of 20,000
    units each.

    Args:
        path: of the file.
        latest: of several results of a task, the last one counts, instead of an error.

    Raises:
        InputError: a line is not JSON or not a result, a number in it cannot be, an array is
            damaged or not that of the result, or a task has two results.
    """
    results: dict[str, TaskResult] = {}
    failures = []
    undefined = 0
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            if "error" in record:
                failures.append(_failure_from_record(record))
                continue
            result, names = _from_record(path, record)
        except (KeyError, OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            problem = str(error)
            if isinstance(error, KeyError):
                problem += " is missing"
            elif isinstance(error, OSError):
                problem = f"key makes no name of a file: {error.strerror}"
            raise InputError(
                f"{path}, line {number}, must be a result with key, dataset and metrics: "
                f"{problem}. Delete the line, and siftclip eval evaluates the task again."
            ) from None
        undefined += len(names)
        if result.key in results and not latest:
            raise InputError(
                f"{path}, line {number}: each task must have one result. {result.key!r} has two. "
                "Delete one of the lines."
            )
        results[result.key] = result
    if undefined:
        log.warning("%s: %d metrics are NaN and count as missing", path, undefined)
    return KeptResults(
        results=tuple(results.values()),
        failures=tuple(failure for failure in failures if failure.key not in results),
    )


def outcomes_path(path: Path, key: str) -> Path:
    """Return where the outcomes of a task are kept."""
    # DataComp's keys have slashes; replaced, no key leads out of the folder either
    return path.with_name(f"{path.stem}_outcomes") / f"{key.replace('/', '-')}.npz"


def _to_record(result: TaskResult) -> dict[str, Any]:
    return {
        "key": result.key,
        "dataset": result.dataset,
        "metrics": result.metrics,
        "main_metric_name": result.main_metric_name,
        "samples": result.samples,
        "interval": None if result.interval is None else list(result.interval),
        "family": result.family,
        "seconds": round(result.seconds, 3),
        "model": result.model,
        "task": result.task,
        "tars": result.tars,
        **({"chances": dict(result.chances)} if result.chances else {}),
    }


def _failure_record(failure: TaskFailure) -> dict[str, Any]:
    known = KNOWN_TASKS.get(failure.key)
    return {
        "key": failure.key,
        "dataset": known.title if known else failure.key,
        "metrics": {MAIN_METRIC: None},
        "model": failure.model,
        "error": failure.message,
    }


def _failure_from_record(record: dict[str, Any]) -> TaskFailure:
    return TaskFailure(
        key=require_text("key", record["key"]),
        message=require_text("error", record["error"]),
        model=_optional_text("model", record),
    )


def _optional_text(name: str, record: dict[str, Any], missing: str | None = None) -> str | None:
    value = record.get(name, missing)
    return None if value is None else require_text(name, value)


def _from_record(path: Path, record: dict[str, Any]) -> tuple[TaskResult, tuple[str, ...]]:
    """Parse a result, and the names of its metrics that are NaN."""
    key, dataset = (require_text(name, record[name]) for name in ("key", "dataset"))
    metrics, undefined = check_metrics(record["metrics"])
    metrics.setdefault(MAIN_METRIC, None)  # DataComp's tasks outside its average have none
    main, name = metrics[MAIN_METRIC], _optional_text("main_metric_name", record, MAIN_METRIC)
    note = "the main metric is NaN" if MAIN_METRIC in undefined or name in undefined else ""
    if note:
        main = metrics[MAIN_METRIC] = None
    elif name in metrics and not _same(main, metrics[name], _SAME):
        raise ValueError(f"main_metric is {main}, but {name} is {metrics[name]}")
    kept = _NO_OUTCOMES if note else _read_outcomes(outcomes_path(path, key), main, metrics)
    samples = require_count("samples", record.get("samples", 0))
    if kept.units is not None and samples != len(kept.units):
        raise ValueError(f"samples is {samples}, but its outcomes are of {len(kept.units)}")
    known = KNOWN_TASKS.get(key)  # files of DataComp's do not say
    result = TaskResult(
        key=key,
        dataset=dataset,
        metrics=metrics,
        main_metric_name=name,
        samples=samples,
        interval=None if note else check_interval(record.get("interval"), main),
        seconds=require_number("seconds", record.get("seconds", 0.0), least=0),
        model=_optional_text("model", record),
        task=_optional_text("task", record),
        tars=_optional_text("tars", record),
        family=_optional_text("family", record) or (known.family if known else OWN_FAMILY),
        chances=_chances(record, name),
        outcomes=kept.main,
        units=kept.units,
        other_outcomes=kept.others,
        note=note,
    )
    return result, undefined


def _chances(record: dict[str, Any], main_name: str | None) -> dict[str, float]:
    earlier = record.get("chance")  # an earlier version kept the main metric's alone
    chances = record.get("chances", {} if earlier is None else {str(main_name): earlier})
    if not isinstance(chances, dict):
        raise ValueError("chances must be numbers by metric")
    return {name: float(require_share(f"chances.{name}", at)) for name, at in chances.items()}


def _same(value: float | None, other: float | None, tolerance: float) -> bool:
    if value is None or other is None:
        return value is other
    return abs(value - other) <= tolerance


class _KeptOutcomes(NamedTuple):
    main: Outcomes | None = None
    units: np.ndarray | None = None
    others: Mapping[str, Outcomes] = {}


_NO_OUTCOMES = _KeptOutcomes()


def _read_outcomes(
    path: Path, main_metric: float | None, metrics: Mapping[str, float | None]
) -> _KeptOutcomes:
    if not path.exists() and not path.is_symlink():
        return _NO_OUTCOMES
    try:
        arrays = read_npz_all(path)
    except InputError as error:
        raise InputError(f"{error} Delete it: the task keeps its result.") from None
    if not {"statistic", "units"} <= arrays.keys():
        raise InputError(f"{path} must hold the arrays 'statistic' and 'units'. Delete it.")
    try:
        main = _outcomes_in(arrays, "")
        # an earlier version kept the main metric's alone
        names = [str(name) for name in arrays.get("others", np.empty(0, np.str_)).ravel()]
        others = {name: _outcomes_in(arrays, f"{at}_") for at, name in enumerate(names)}
    except KeyError as error:
        raise InputError(f"{path} must hold the array {error}. Delete it.") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}. Delete it.") from None
    _require_same(path, MAIN_METRIC, main, main_metric)
    for name, outcomes in others.items():
        _require_same(path, name, outcomes, metrics.get(name))
    return _KeptOutcomes(main, arrays["units"], others)


def _outcomes_in(arrays: Mapping[str, np.ndarray], prefix: str) -> Outcomes:
    """Take the outcomes whose arrays have a prefix, and check them."""
    beginning = f"{prefix}{_ARRAY}"
    values = {
        name.removeprefix(beginning): array
        for name, array in arrays.items()
        if name.startswith(beginning)
    }
    return check_outcomes(str(arrays[f"{prefix}statistic"]), values, arrays["units"])


def _require_same(path: Path, name: str, outcomes: Outcomes, metric: float | None) -> None:
    """Refuse outcomes that do not make the metric that the line of the result has."""
    # Ties make another average precision of equal scores, and it takes seconds
    if outcomes.statistic == "average_precision":
        return
    value = point_value(outcomes)
    if metric is None or not abs(value - metric) <= _SAME_OUTCOMES:
        raise InputError(
            f"{path} is not of the result that it lies beside: its {name.replace('_', ' ')} is "
            f"{value}, not {metric}. Delete it and the line of that result in the file of the "
            "results, and siftclip eval evaluates the task again."
        )
