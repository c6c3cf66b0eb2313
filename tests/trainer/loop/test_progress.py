"""The progress of training shows samples or steps, and the numbers that are known last."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from siftclip.trainer.loop import progress
from siftclip.trainer.loop.progress import TrainingProgress


class Shown:
    """Stands in for a bar."""

    def __init__(self, *, total: int, initial: int, **options: Any) -> None:
        self.total, self.samples = total, initial
        self.postfix = ""
        self.is_open = True

    def set_postfix_str(self, shown: str, *, refresh: bool) -> None:
        assert not refresh  # `update` does, if it is time
        self.postfix = shown

    def update(self, samples: int) -> None:
        self.samples += samples

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """The bars that are drawn at a terminal."""
    bars: list[Shown] = []

    def make(**options: Any) -> Shown:
        bars.append(Shown(**options))
        return bars[-1]

    monkeypatch.setattr(progress, "show_progress", make)
    monkeypatch.setattr(progress, "draws_bars", lambda: True)
    return bars


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of a log, each step of which takes ten seconds."""
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr("siftclip.trainer.loop.progress.time.monotonic", lambda: next(seconds))
    caplog.set_level(logging.INFO, "siftclip")
    return caplog.messages


TRAINER = SimpleNamespace(global_step=3, world_size=2)
LATEST = {
    "train/loss": 1.23456,
    "train/lr": 0.00049,
    "train/data_wait_fraction": 0.104,
    "train/samples_per_second": 250.0,
}
NUMBERS = "loss 1.235, lr 0.00049, waiting for data 10%"


def make_module(device: str = "cpu") -> SimpleNamespace:
    return SimpleNamespace(
        total_steps=10,
        global_batch_size=16,
        latest={},
        evaluated={},
        device=torch.device(device),
    )


def test_the_bar_counts_samples_and_tells_what_was_logged_last(shown: list[Shown]) -> None:
    bar, module = TrainingProgress(), make_module()
    bar.on_train_start(TRAINER, module)
    (found,) = shown
    assert (found.total, found.samples) == (160, 48)
    bar.on_train_batch_end(TRAINER, module)
    assert (found.samples, found.postfix) == (64, "")
    module.latest = LATEST
    bar.on_train_batch_end(TRAINER, module)
    of_device = "125 samples/s per process"
    assert (found.samples, found.postfix) == (80, f"{NUMBERS}, {of_device}")
    module.evaluated = {"eval/digit": 0.5}
    bar.on_train_batch_end(TRAINER, module)
    assert found.postfix == f"{NUMBERS}, digit 0.500, {of_device}"
    module.evaluated |= {"eval/average/all": 0.25, "eval/average/other": 0.75}
    bar.on_train_batch_end(TRAINER, module)
    assert found.postfix == f"{NUMBERS}, all 0.250, {of_device}"


def test_what_a_terminal_would_obey_is_escaped(shown: list[Shown]) -> None:
    """A task has the name of a folder, which may be anything."""
    bar, module = TrainingProgress(), make_module("cuda")
    module.latest, module.evaluated = LATEST, {"eval/\x1b[2Jx\r": 0.5}
    bar.on_train_start(TRAINER, module)
    bar.on_train_batch_end(TRAINER, module)
    assert shown[0].postfix == f"{NUMBERS}, \\x1b[2Jx\\r 0.500, 125 samples/s per GPU"


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_the_bar_closes_with_training(end: str, shown: list[Shown]) -> None:
    bar = TrainingProgress()
    bar.on_train_start(TRAINER, make_module())
    for _ in range(2):
        getattr(bar, end)()
    assert not shown[0].is_open
    bar.on_train_batch_end(TRAINER, make_module())
    assert shown[0].samples == 48


def test_other_ranks_show_nothing(shown: list[Shown], lines: list[str]) -> None:
    for wants_bar in (True, False):
        bar = TrainingProgress(bar=wants_bar)
        bar.disable()
        bar.on_train_start(TRAINER, make_module())
        bar.on_train_batch_end(TRAINER, make_module())
        bar.on_train_end()
    assert not shown
    assert not lines


def test_a_log_gets_a_line_after_the_first_step_and_every_thirty_seconds(
    lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shows, module = TrainingProgress(bar=False), make_module()
    shows.on_train_start(TRAINER, module)
    for step in range(4, 11):
        if step == 6:
            module.latest = LATEST
        shows.on_train_batch_end(SimpleNamespace(global_step=step, world_size=2), module)
    shows.on_train_end()
    rate = "0.8 samples/s per process, 1.6 samples/s"
    assert caplog.messages == [
        "train: step 4 of 10",
        f"train: step 7 of 10, {NUMBERS}, {rate}, 0:00:30 left",
        f"train: step 10 of 10, {NUMBERS}, {rate}, 0:00:00 left",
    ]
    shows.on_train_batch_end(SimpleNamespace(global_step=11, world_size=2), module)
    assert len(caplog.messages) == 3
