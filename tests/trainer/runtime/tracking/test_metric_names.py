"""Axes and names that loggers get beside those of the log."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.trainer.runtime.tracking.metric_names import Axes, with_open_clip_names


def record(step: int, *, step_seconds: float, flops: float | None = None) -> dict[str, Any]:
    """What a window of training logs at its last step, of batches of 16."""
    counted = {} if flops is None else {"cost/flops": flops}
    return {"train/batch_time": step_seconds, "train/samples_seen": 16.0 * step, **counted}


def test_open_clips_names_of_the_same_numbers() -> None:
    metrics = {"eval/imagenet1k/acc1": 0.5, "eval/imagenet1k/acc5": 0.75, "eval/digit/acc1": 0.25}
    assert with_open_clip_names(metrics) == {
        **metrics,
        "val/imagenet-zeroshot-val-top1": 0.5,
        "val/imagenet-zeroshot-val-top5": 0.75,
    }


def test_axes_count_steps_that_no_record_is_of() -> None:
    axes = Axes()
    assert axes.at({"selection/samples": 9}, 0) == {"samples": 0, "flops": 0, "seconds": 0}
    assert axes.at(record(10, step_seconds=0.5, flops=1e9), 10) == {
        "samples": 160,
        "flops": 1e9,
        "seconds": 5,
    }
    at_20 = {"samples": 320, "flops": 2e9, "seconds": 7.5}
    assert axes.at(record(20, step_seconds=0.25, flops=2e9), 20) == at_20
    assert axes.at({"eval/digit/acc1": 0.5}, 25) == at_20  # where the last record was
    assert axes.at(record(20, step_seconds=9, flops=9e9), 20) == at_20  # repeated


def test_a_model_that_cannot_be_counted_has_no_flops() -> None:
    axes = Axes()
    assert axes.at(record(10, step_seconds=0.5), 10) == {"samples": 160, "seconds": 5}


@given(
    times=st.lists(st.floats(0.001, 10), min_size=1, max_size=12),
    repeats=st.lists(st.integers(0, 11), max_size=6),
    every=st.integers(1, 7),
)
def test_axes_do_not_move_for_what_has_been(
    times: list[float], repeats: list[int], every: int
) -> None:
    """Of steps that are trained again after a restart, and of what stands between the records."""
    log = [
        (number * every, record(number * every, step_seconds=seconds, flops=1e6 * number))
        for number, seconds in enumerate(times, start=1)
    ]
    plain, disturbed = Axes(), Axes()
    for number, (step, metrics) in enumerate(log):
        at = plain.at(metrics, step)
        assert disturbed.at(metrics, step) == at
        assert at["samples"] == 16 * step
        assert at["seconds"] == pytest.approx(every * sum(times[: number + 1]))
        for again in repeats:
            if again <= number:
                assert disturbed.at(log[again][1], log[again][0]) == at
        assert disturbed.at({"eval/digit/acc1": 0.5}, step) == at


@pytest.mark.parametrize("key", ["train/loss", "train/lr", "train/scale", "train/batch_time"])
def test_keys_of_training_are_open_clips_already(key: str) -> None:
    assert with_open_clip_names({key: 1.0}) == {key: 1.0}
