"""Results of tasks: what one holds, and the files they are kept in.

`eval_results.jsonl` has DataComp's shape, a line a task with `key`, `dataset` and `metrics`, plus
fields of ours. What the main metric is made of lies beside it: `eval_results_outcomes/<key>.npz`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from siftclip.datamodules.files import append_jsonl, read_jsonl, read_npz_all, write_npz, write_text
from siftclip.eval.known_tasks import KNOWN_TASKS
from siftclip.eval.outcomes import Outcomes
from siftclip.eval.tasks import OWN_FAMILY
from siftclip.selectors.errors import InputError

MAIN_METRIC = "main_metric"
_ARRAY = "array_"


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
    family: str = OWN_FAMILY
    # What the main metric is made of, and which image or instance each unit is, uint64 [n]. None
    # where there is no main metric, and where the file is gone.
    outcomes: Outcomes | None = field(default=None, compare=False, repr=False)
    units: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def main_metric(self) -> float | None:
        """The value of the main metric."""
        return self.metrics[MAIN_METRIC]


def append_result(path: Path, result: TaskResult) -> None:
    """Add a result to a results file. A killed run leaves all of it, or no line."""
    if result.outcomes is None or result.units is None:
        outcomes_path(path, result.key).unlink(missing_ok=True)  # those of an earlier result
    else:
        arrays = {f"{_ARRAY}{name}": array for name, array in result.outcomes.arrays.items()}
        write_npz(
            outcomes_path(path, result.key),
            statistic=np.asarray(result.outcomes.statistic),
            units=result.units,
            **arrays,
        )
    append_jsonl(path, _to_record(result))  # last: the line says that the arrays are there


def write_lines(path: Path, results: Sequence[TaskResult]) -> None:
    """Replace the lines of a results file, atomically. Arrays on disk stay as they are."""
    write_text(path, "".join(json.dumps(_to_record(r), allow_nan=False) + "\n" for r in results))


def read_results(path: Path) -> list[TaskResult]:
    """Read a results file, ours or DataComp's; none if it does not exist.

    Raises:
        InputError: a line is not JSON or is not a result, or an array is damaged.
    """
    return [
        _from_record(path, number, record)
        for number, record in enumerate(read_jsonl(path), start=1)
    ]


def outcomes_path(path: Path, key: str) -> Path:
    """Where the outcomes of a task are kept."""
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
    }


def _from_record(path: Path, number: int, record: Any) -> TaskResult:
    try:
        key, metrics, interval = record["key"], dict(record["metrics"]), record.get("interval")
        metrics.setdefault(MAIN_METRIC, None)  # DataComp's tasks outside its average have none
        outcomes, units = _read_outcomes(outcomes_path(path, key))
        known = KNOWN_TASKS.get(key)  # files of DataComp's do not say
        return TaskResult(
            key=key,
            dataset=record["dataset"],
            metrics=metrics,
            main_metric_name=record.get("main_metric_name", MAIN_METRIC),
            samples=record.get("samples", 0),
            interval=None if interval is None else (interval[0], interval[1]),
            seconds=record.get("seconds", 0.0),
            model=record.get("model"),
            task=record.get("task"),
            family=record.get("family") or (known.family if known else OWN_FAMILY),
            outcomes=outcomes,
            units=units,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}, line {number}, must be a result with key, dataset and metrics: {error!r}."
        ) from None


def _read_outcomes(path: Path) -> tuple[Outcomes | None, np.ndarray | None]:
    if not path.exists():
        return None, None
    arrays = read_npz_all(path)
    if not {"statistic", "units"} <= arrays.keys():
        raise InputError(f"{path} must hold the arrays 'statistic' and 'units'. Delete it.")
    values = {
        name.removeprefix(_ARRAY): array
        for name, array in arrays.items()
        if name.startswith(_ARRAY)
    }
    statistic: Any = str(arrays["statistic"])
    return Outcomes(statistic=statistic, arrays=values), arrays["units"]
