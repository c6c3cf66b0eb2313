"""The bar of training shows samples, and the numbers that are known last."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from siftclip.trainer.loop import progress
from siftclip.trainer.loop.progress import TrainingBar


class Shown:
    """Stands in for tqdm."""

    def __init__(self, *, total: int, initial: int, **options: Any) -> None:
        self.total, self.samples = total, initial
        self.postfix: dict[str, str] = {}
        self.is_open = True

    def set_postfix(self, shown: dict[str, str], *, refresh: bool) -> None:
        assert not refresh  # `update` does, if it is time
        self.postfix = shown

    def update(self, samples: int) -> None:
        self.samples += samples

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """The bars that are made."""
    bars: list[Shown] = []

    def make(**options: Any) -> Shown:
        bars.append(Shown(**options))
        return bars[-1]

    monkeypatch.setattr(progress, "tqdm", make)
    return bars


TRAINER = SimpleNamespace(global_step=3)


def make_module() -> SimpleNamespace:
    return SimpleNamespace(total_steps=10, global_batch_size=16, latest={}, evaluated={})


def test_the_bar_counts_samples_and_tells_what_was_logged_last(shown: list[Shown]) -> None:
    bar, module = TrainingBar(), make_module()
    bar.on_train_start(TRAINER, module)
    (found,) = shown
    assert (found.total, found.samples) == (160, 48)
    bar.on_train_batch_end(TRAINER, module)
    assert (found.samples, found.postfix) == (64, {})
    module.latest = {"train/loss": 1.23456, "train/data_wait_fraction": 0.104}
    bar.on_train_batch_end(TRAINER, module)
    assert (found.samples, found.postfix) == (80, {"loss": "1.235", "wait": "10%"})
    module.evaluated = {"eval/digit": 0.5}
    bar.on_train_batch_end(TRAINER, module)
    assert found.postfix == {"loss": "1.235", "wait": "10%", "digit": "0.500"}
    module.evaluated |= {"eval/average/all": 0.25, "eval/average/other": 0.75}
    bar.on_train_batch_end(TRAINER, module)
    assert found.postfix == {"loss": "1.235", "wait": "10%", "all": "0.250"}


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_the_bar_closes_with_training(end: str, shown: list[Shown]) -> None:
    bar = TrainingBar()
    bar.on_train_start(TRAINER, make_module())
    for _ in range(2):
        getattr(bar, end)()
    assert not shown[0].is_open
    bar.on_train_batch_end(TRAINER, make_module())
    assert shown[0].samples == 48


def test_other_ranks_show_no_bar(shown: list[Shown]) -> None:
    bar = TrainingBar()
    bar.disable()
    bar.on_train_start(TRAINER, make_module())
    bar.on_train_batch_end(TRAINER, make_module())
    bar.on_train_end()
    assert not shown
