"""Results of tasks: what one holds, the files they are kept in, averages over groups, a table.

`eval_results.jsonl` has DataComp's shape, a line a task with `key`, `dataset` and `metrics`, plus
fields of ours. Per-sample correctness lies beside it: `eval_results_correct/<key>.npz`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from siftclip.datamodules.files import append_jsonl, read_jsonl, read_npz, write_npz, write_text
from siftclip.selectors.errors import InputError

Z_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
MAIN_METRIC = "main_metric"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The metrics of one model on one task."""

    key: str  # the name of the task
    dataset: str  # the name to show
    metrics: dict[str, float | None]  # None = not defined here; `main_metric` is always there
    main_metric_name: str
    samples: int
    interval: tuple[float, float] | None  # 95 %, where the main metric is a share of the samples
    seconds: float
    model: str | None  # evaluate.fingerprint of the model; None in files of other tools
    # bool [samples]: whether the best class, or for retrieval the best caption, is right. None
    # for multilabel tasks, and where the file is gone.
    correct: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def main_metric(self) -> float | None:
        """The value of the main metric."""
        return self.metrics[MAIN_METRIC]


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927. Unlike
    the normal approximation it stays inside [0, 1] and is not empty at 0 and 1.

    Args:
        share: successes / samples, in [0, 1].
        samples: at least 1.
    """
    shrink = 1 / (1 + Z_95**2 / samples)
    centre = shrink * (share + Z_95**2 / (2 * samples))
    radius = shrink * Z_95 * math.sqrt(share * (1 - share) / samples + (Z_95 / (2 * samples)) ** 2)
    return max(0.0, centre - radius), min(1.0, centre + radius)


def append_result(path: Path, result: TaskResult) -> None:
    """Add a result to a results file. A killed run leaves all of it, or no line."""
    if result.correct is not None:
        write_npz(_correct_path(path, result.key), correct=result.correct)
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


def _correct_path(path: Path, key: str) -> Path:
    # DataComp's keys have slashes; replaced, no key leads out of the folder either
    return path.with_name(f"{path.stem}_correct") / f"{key.replace('/', '-')}.npz"


def _to_record(result: TaskResult) -> dict[str, Any]:
    return {
        "key": result.key,
        "dataset": result.dataset,
        "metrics": result.metrics,
        "main_metric_name": result.main_metric_name,
        "samples": result.samples,
        "interval": None if result.interval is None else list(result.interval),
        "seconds": round(result.seconds, 3),
        "model": result.model,
    }


def _from_record(path: Path, number: int, record: Any) -> TaskResult:
    try:
        key, metrics, interval = record["key"], dict(record["metrics"]), record.get("interval")
        metrics.setdefault(MAIN_METRIC, None)  # DataComp's tasks outside its average have none
        correct_path = _correct_path(path, key)
        return TaskResult(
            key=key,
            dataset=record["dataset"],
            metrics=metrics,
            main_metric_name=record.get("main_metric_name", MAIN_METRIC),
            samples=record.get("samples", 0),
            interval=None if interval is None else (interval[0], interval[1]),
            seconds=record.get("seconds", 0.0),
            model=record.get("model"),
            correct=read_npz(correct_path, ["correct"])[0] if correct_path.exists() else None,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}, line {number}, must be a result with key, dataset and metrics: {error!r}."
        ) from None


def aggregate(
    results: Sequence[TaskResult], groups: Mapping[str, Sequence[str]]
) -> dict[str, float | None]:
    """The mean over each group of tasks; None where a task of the group has no result.

    Args:
        results: of one model, each task at most once.
        groups: names of tasks by name of the group; `name:metric` takes that metric instead of
            the main metric.

    Raises:
        InputError: a group is empty, or a task does not have the metric.
    """
    by_key = {result.key: result for result in results}
    means: dict[str, float | None] = {}
    for group, members in groups.items():
        if not members:
            raise InputError(f"eval.groups.{group} must name at least one task. It is empty.")
        values = [_group_value(group, member, by_key) for member in members]
        known = [value for value in values if value is not None]
        # A mean over fewer tasks would look like the whole, and could not be compared.
        means[group] = sum(known) / len(known) if len(known) == len(values) else None
    return means


def _group_value(group: str, member: str, by_key: Mapping[str, TaskResult]) -> float | None:
    name, _, metric = member.partition(":")
    if name not in by_key:
        return None
    metrics = by_key[name].metrics
    if metric and metric not in metrics:
        raise InputError(
            f"eval.groups.{group}: {member!r} asks for a metric that {name} does not have. "
            f"It has {sorted(metrics)}."
        )
    return metrics[metric or MAIN_METRIC]


def format_table(results: Sequence[TaskResult]) -> str:
    """The results as text, a line a task: name, samples, main metric with its 95 % interval."""
    rows = [("task", "n", "metric", "value", "95 % interval")]
    for result in results:
        value, interval = result.main_metric, result.interval
        rows.append(
            (
                result.dataset,
                str(result.samples),
                result.main_metric_name,
                "-" if value is None else f"{value:.4f}",
                "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ("<", ">", "<", ">", "<")
    lines = [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligns, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
