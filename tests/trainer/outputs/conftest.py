"""Outputs as commands leave them, made once, and copies of them that a test may spoil."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.trainer.compare.arms import arms_of_overrides, compare_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.settings.commands import CompareCommand, TrainCommand
from siftclip.trainer.stages.train import train_stage

SMALL = [
    *("scale.samples_seen=96", "trainer.checkpoint_every_n_steps=2", "eval.resamples=10"),
    "eval.tasks=[colour]",
]


@pytest.fixture(scope="session")
def made(
    demo_data: DemoData,
    base_of: Callable[[Path], list[str]],
    composing: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The outputs of a comparison of one arm, and of one run more."""
    folder = tmp_path_factory.mktemp("made")
    words = [*base_of(folder), *SMALL, f"eval.root={demo_data.tasks}"]
    with composing() as compose:
        compared = [*words, "compare.name=both", "compare.seeds=[0]", "~compare.arms.random"]
        settings: CompareCommand = compose("compare", compared)
        compare_stage(
            settings,
            arms_of_overrides(
                settings, compared, lambda arm: compose("compare", arm, TrainCommand)
            ),
        )
        train_stage(compose("train", [*words, "selector=random", "selector.fraction=0.5"]))
    return folder / "outputs"


@pytest.fixture
def outputs(made: Path, tmp_path: Path) -> Path:
    """A copy: large files are linked, small ones copied, so that they may be written over."""

    def copy(source: str, target: str) -> None:
        (os.link if os.path.getsize(source) > 10**6 else shutil.copy2)(source, target)

    return Path(shutil.copytree(made, tmp_path / "outputs", copy_function=copy))


def run_of(outputs: Path, selector: str) -> Path:
    """The run of a selector."""
    (run,) = outputs.glob(f"train/{selector}-*")
    return run


@pytest.fixture
def clip_run(outputs: Path) -> Path:
    return run_of(outputs, "clip_score")


@pytest.fixture
def random_run(outputs: Path) -> Path:
    return run_of(outputs, "random")
