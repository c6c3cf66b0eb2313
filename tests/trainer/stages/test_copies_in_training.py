"""Runs whose batches cannot be of different samples say so, and train on the others alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from siftclip.files import read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.losses.copies import Copies
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
FEW = ["selector=random", "selector.fraction=0.05"]  # 12 samples, fewer than a batch of 16


def losses(run: RunDir) -> list[float]:
    records = read_jsonl(run.path / "metrics.jsonl")
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_a_selection_smaller_than_a_batch(
    base: list[str],
    compose: Compose,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with caplog.at_level(logging.WARNING):
        whole = train_stage(compose("train", [*base, *FEW]))
    (said,) = [text for text in caplog.messages if "hold a sample twice" in text]
    assert said.startswith("100 % of the batches")
    assert "a step draws 16 samples, and the selection has 12 different ones" in said
    assert "With draws of 12 or fewer" in said
    assert whole.summary is not None
    assert whole.summary["copies_fraction"] == 1
    parts = train_stage(
        compose(
            "train", [*base, *FEW, "trainer.micro_batch_size=4", f"run_dir={tmp_path / 'parts'}"]
        )
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    monkeypatch.setattr(Copies, "of", lambda inputs: None)
    counted = train_stage(compose("train", [*base, *FEW, f"run_dir={tmp_path / 'counted'}"]))
    assert losses(counted)[0] > losses(whole)[0] + 0.02  # copies are the hardest negatives


def test_a_selection_with_room_says_nothing(
    base: list[str], compose: Compose, demo_data: DemoData, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = train_stage(compose("train", [*base, "selector=random", "selector.fraction=0.5"]))
    assert "hold a sample twice" not in caplog.text
    assert run.summary is not None
    assert run.summary["copies_fraction"] == 0


@pytest.mark.parametrize("cadence", ["every_step", "every_n_steps"])
def test_super_batches_and_later_selections_say_so_too(
    cadence: str, base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, list[Any]] = {
        "every_step": [
            "selector@online.selector=learnability",
            "online.features=noise",
            "online.selector.fraction=0.2",
            "selector.fraction=0.25",
        ],
        "every_n_steps": [
            "online.every_n_steps=3",
            "selector@online.selector=random",
            "online.selector.fraction=0.05",
        ],
    }
    with caplog.at_level(logging.WARNING):
        train_stage(
            compose("train", [*base, "selector=random", f"online={cadence}", *options[cadence]])
        )
    said = [text for text in caplog.messages if "hold a sample twice" in text]
    drawn = {"every_step": 80, "every_n_steps": 16}[cadence]
    assert said
    assert all(f"a step draws {drawn} samples" in text for text in said)
