"""The eval stage: a model, a run directory or a checkpoint on the tasks of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from siftclip.datamodules.clip_models import ClipModel, load_clip_model
from siftclip.eval.evaluate import evaluate_tasks
from siftclip.eval.results import TaskResult, aggregate, format_table
from siftclip.eval.tasks import Task, find_tasks
from siftclip.selectors.errors import InputError
from siftclip.trainer.cores import share_cores, worker_count
from siftclip.trainer.stages import plain


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Results of one model with the averages that the configuration asks for."""

    results: Sequence[TaskResult]
    averages: Mapping[str, float | None]

    def metrics(self) -> dict[str, float]:
        """All metrics that are defined, by the name they are logged under."""
        found = {
            f"eval/{result.key}/{name}": value
            for result in self.results
            for name, value in result.metrics.items()
        }
        found.update({f"eval/average/{name}": value for name, value in self.averages.items()})
        return {name: value for name, value in found.items() if value is not None}

    def records(self) -> list[dict[str, Any]]:
        """One record a task, for tables."""
        return [
            {
                "task": result.key,
                "metric": result.main_metric_name,
                "value": result.main_metric,
                "low": None if result.interval is None else result.interval[0],
                "high": None if result.interval is None else result.interval[1],
                "samples": result.samples,
            }
            for result in self.results
        ]

    def table(self) -> str:
        """The results as text, with the averages below."""
        lines = [format_table(self.results)]
        if self.averages:
            width = max(len(name) for name in self.averages)
            lines.append("")
            for name, value in self.averages.items():
                text = "- (a task is missing)" if value is None else f"{value:.4f}"
                lines.append(f"{name:<{width}}  {text}")
        return "\n".join(lines)


def tasks_from(config: DictConfig) -> list[Task]:
    """The tasks that the configuration names."""
    if config.eval.root is None:
        raise InputError(
            "eval.root must name a folder of tasks in clip_benchmark's webdataset layout, "
            "for example eval.root=/data/tasks."
        )
    names = plain(config.eval.tasks)
    return find_tasks(Path(config.eval.root), [names] if isinstance(names, str) else names)


def eval_stage(
    config: DictConfig, model: Path | ClipModel, *, results_path: Path | None
) -> EvalReport:
    """Evaluate a model on the configured tasks; tasks with a result are not run again.

    Args:
        config: the configuration.
        model: a model, or a run directory or model folder to load it from.
        results_path: the JSONL file of the results; None keeps them in memory.
    """
    tasks = tasks_from(config)
    clip = load_clip_model(str(model)) if isinstance(model, Path) else model
    num_workers = worker_count(config.data.num_workers)
    share_cores(num_workers)
    results = evaluate_tasks(
        clip,
        tasks,
        device=evaluation_device(config),
        batch_size=config.eval.batch_size,
        num_workers=num_workers,
        results_path=results_path,
        progress=config.progress,
    )
    groups: dict[str, list[str]] = plain(config.eval.groups)
    return EvalReport(results=results, averages=aggregate(results, groups))


def evaluation_device(config: DictConfig) -> str:
    """The GPU where there is one, unless the configuration asks for the CPU."""
    wants_cpu = config.trainer.accelerator == "cpu"
    return "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"
