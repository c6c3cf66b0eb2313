"""Runs whose images a device resizes train the weights of those whose loaders resize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.streaming import datamodule, device_resize
from siftclip.datamodules.streaming.crops import Crops
from siftclip.trainer.runtime.loggers import FileLogger
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
JEST = [
    "selector=random", "selector.fraction=1", "online=every_step",
    "online.selector.fraction=0.25", "online.diagnostics.record_chosen=true",
]  # fmt: skip


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of each batch that the trainer resizes, on the CPU as it does on CUDA."""
    counts: list[int] = []
    original = device_resize.resize_crops

    def counted(buffer: torch.Tensor, crops: Crops) -> torch.Tensor:
        counts.append(len(crops.places))
        return original(buffer, crops)

    monkeypatch.setattr(device_resize, "resize_crops", counted)
    monkeypatch.setattr(datamodule, "RESIZING_DEVICES", ("cpu",))
    return counts


def assert_same(first: RunDir, second: RunDir) -> None:
    ours, theirs = (load_clip_model(str(run.path)).model.state_dict() for run in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_cuda_the_loaders_resize(base: list[str], compose: Compose) -> None:
    plain = train_stage(compose("train", base))
    ours = train_stage(compose("train", [*base, "data.resize=gpu"]))
    assert ours.path.name != plain.path.name
    assert_same(ours, plain)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], [16]),
        (["trainer.micro_batch_size=4", "data.num_workers=1"], [4] * 4),
        (JEST, [16] * 4),
    ],
    ids=["plain", "micro-batches", "in the loop"],
)
def test_the_device_gives_the_same_run(
    options: list[str],
    parts: list[int],
    base: list[str],
    compose: Compose,
    resized: list[int],
) -> None:
    plain = train_stage(compose("train", [*base, *options]))
    assert resized == []
    ours = train_stage(compose("train", [*base, *options, "data.resize=gpu"]))
    assert resized == parts * 6
    assert_same(ours, plain)
    if options == JEST:
        assert np.array_equal(*(np.load(run.path / "chosen.npy") for run in (ours, plain)))


def test_a_run_that_was_stopped_continues_with_the_same_pixels(
    base: list[str],
    compose: Compose,
    resized: list[int],
    tmp_path: Path,
) -> None:
    shared = [*base, "data.resize=gpu", "trainer.checkpoint_every_n_steps=3"]
    whole = train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'whole'}"]))
    original = FileLogger.log_metrics

    def fail(self: FileLogger, metrics: dict[str, float], step: int | None = None) -> None:
        if step == 5:
            raise RuntimeError("stop here")
        original(self, metrics, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileLogger, "log_metrics", fail)
        with pytest.raises(RuntimeError, match="stop here"):
            train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'cut'}"]))
    resized.clear()
    continued = train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'cut'}"]))
    assert resized == [16] * 3
    assert_same(continued, whole)
