"""Which steps are profiled, what is written, and that nothing is left of one that fails."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.errors import InputError
from siftclip.trainer.loop.profiling import TABLE_NAME, TRACE_NAME, ProfileSteps
from siftclip.trainer.stages.train import train_stage

Tiny = Callable[..., Any]


def steps_in(folder: Path) -> int:
    """Steps of the optimiser in a trace."""
    with gzip.open(folder / TRACE_NAME, "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step#Adam") for event in events)


@pytest.mark.parametrize("batches_a_step", [1, 3])
def test_steps_behind_the_first_are_written_once(
    batches_a_step: int, tiny_training: Tiny, tmp_path: Path
) -> None:
    callback = ProfileSteps(tmp_path / "profile", skip=2, steps=3)
    tiny_training(total_steps=9, batches_a_step=batches_a_step).fit(callback)
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {TRACE_NAME, TABLE_NAME}
    assert steps_in(tmp_path / "profile") == 3
    assert "Self CPU" in (tmp_path / "profile" / TABLE_NAME).read_text()


def test_a_run_that_ends_before_gives_what_there_is(
    tiny_training: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_training(total_steps=4).fit(ProfileSteps(tmp_path / "some", skip=2, steps=9))
    assert steps_in(tmp_path / "some") == 2
    tiny_training(total_steps=4).fit(ProfileSteps(tmp_path / "none", skip=9))
    assert not (tmp_path / "none").exists()
    assert "nothing was profiled: training ended before step 10" in caplog.text


def test_a_failure_ends_the_profiler(tiny_training: Tiny, tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step == 4:
            raise RuntimeError("stop here")

    callback = ProfileSteps(tmp_path / "profile", skip=2)
    with pytest.raises(RuntimeError, match="stop here"):
        tiny_training(total_steps=9, after_batch=fail).fit(callback)
    assert not (tmp_path / "profile").exists()
    tiny_training(total_steps=4).fit(ProfileSteps(tmp_path / "next", skip=2))  # can begin


@pytest.mark.parametrize("number", [{"skip": -1}, {"steps": 0}])
def test_numbers_are_checked(number: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ProfileSteps"):
        ProfileSteps(tmp_path, **number)


def test_of_a_run(base: list[str], compose: Callable[..., Any]) -> None:
    words = ["trainer.profile=true", "scale.samples_seen=240", "scale.global_batch_size=16"]
    run = train_stage(compose("train", [*base, *words]))
    folder = run.path / "profile"
    assert {path.name for path in folder.iterdir()} == {TRACE_NAME, TABLE_NAME}
    assert "AdamW" in (folder / TABLE_NAME).read_text()
