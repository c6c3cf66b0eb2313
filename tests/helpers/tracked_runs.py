"""What TensorBoard and MLflow have of a run, read by their own readers; skipped where missing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

Curves = dict[str, list[tuple[int, float]]]  # by key: steps and values, in the order of the file


def wait_for_another_second() -> None:
    """By the second are named wandb's folders and TensorBoard's files, and those read in order."""
    time.sleep(1.02 - time.time() % 1)


def tensorboard_events(folder: Path) -> Any:
    """TensorBoard's own reader of a folder of event files."""
    pytest.importorskip("tensorboard", reason="siftclip[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = dict.fromkeys(["scalars", "tensors", "images", "histograms"], 0)  # all
    return EventAccumulator(str(folder), size_guidance=sizes).Reload()


def tensorboard_curves(folder: Path) -> Curves:
    """The curves of all event files in a folder."""
    events = tensorboard_events(folder)
    return {
        key: [(event.step, event.value) for event in events.Scalars(key)]
        for key in events.Tags()["scalars"]
    }


def mlflow_client(uri: str) -> Any:
    """A client of MLflow's own."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before it is imported
    pytest.importorskip("mlflow", reason="siftclip[mlflow] is not installed")
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def mlflow_curves(uri: str, run_id: str) -> Curves:
    """The curves of a run in a database of MLflow."""
    client = mlflow_client(uri)
    return {
        key: [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
        for key in client.get_run(run_id).data.metrics
    }


def curves_of_log(records: list[dict[str, Any]]) -> Curves:
    """The curves of a run's own log, without what is known before its first step."""
    curves: Curves = {}
    for record in records:
        for key, value in record.items():
            if key not in ("step", "time") and not key.startswith("selection/"):
                curves.setdefault(key, []).append((record["step"], value))
    return curves
