"""Shares of a step that are no whole number of samples of each group."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from siftclip.selectors.core.base import Choice, Source, SubBatch
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk
from siftclip.selectors.methods.uniform import Uniform
from siftclip.trainer.online.in_loop import StepDraw
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]


class Counted(Uniform):
    """Notes how many samples of each group it is asked for."""

    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        self._asked = sub_batch.quotas.tolist()
        return super().draw(source, sub_batch)


def draw_at(step: int, *, groups: int, quota: int, fraction: float) -> tuple[Choice, list[int]]:
    samples = 3 * groups * quota
    uids = np.random.default_rng(step).integers(0, 2**63, (samples, 2)).astype(np.uint64)
    source = MemorySource(Chunk(rows=np.arange(samples), uids=uids))
    selector = Counted(seed=1, fraction=1)
    schedule = Schedule(filter_ratio=0.5, uniform_fraction=fraction)
    chooses = StepDraw(selector=selector, schedule=schedule, total_steps=99, groups=groups, seed=2)
    return chooses(source, step, groups * quota), selector._asked


@given(
    step=st.integers(0, 98),
    groups=st.integers(1, 40),
    quota=st.integers(1, 5),
    fraction=st.floats(0, 1),
)
def test_the_share_of_the_whole_sub_batch_is_drawn_uniformly(
    step: int, groups: int, quota: int, fraction: float
) -> None:
    choice, asked = draw_at(step, groups=groups, quota=quota, fraction=fraction)
    assert groups * quota - sum(asked) == round(fraction * groups * quota)
    assert max(asked) - min(asked) <= 1
    counts = choice.multiplicities.reshape(groups, -1).sum(1)
    assert counts.tolist() == [quota] * groups


def test_groups_of_two_share_a_quarter() -> None:
    """0 of 64 samples, when each group rounded half a sample."""
    asked = [draw_at(step, groups=32, quota=2, fraction=0.25)[1] for step in range(4)]
    assert [64 - sum(quotas) for quotas in asked] == [16] * 4
    assert np.sum(asked, axis=0).tolist() == [6] * 32  # every group in its turn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["online.schedule.uniform_fraction=0.02"], "=0.02 of 16 samples is less than half a"),
        (["online.groups=16", "online.selector.fraction=0.6"],
         "a step draws 32.0 samples on average, where online.schedule.filter_ratio asks for 26.7"),
        (["online.schedule.uniform_fraction=0.1"], None),
    ],
)  # fmt: skip
def test_rounding_that_changes_a_schedule_is_named(
    options: list[str],
    message: str | None,
    base: list[str],
    compose: Compose,
    caplog: pytest.LogCaptureFixture,
) -> None:
    every_step = ["selector=random", "selector.fraction=1", "online=every_step"]
    random = ["selector@online.selector=random", "online.selector.fraction=0.5"]
    with caplog.at_level(logging.WARNING):
        train_stage(compose("train", [*base, *every_step, *random, *options]))
    told = [
        r.getMessage() for r in caplog.records if r.name == "siftclip.trainer.builders.online_setup"
    ]
    assert len(told) == (message is not None)
    assert message is None or message in told[0]
