"""What is built for a run that selects while it trains. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig

from siftclip.errors import InputError
from siftclip.trainer.builders import assembly
from siftclip.trainer.online.controller import Online
from siftclip.trainer.stages.train import train_stage

Build = Callable[[list[str]], Online]
EVERY_STEP = [
    *("selector=random", "selector.fraction=1", "online=every_step"),
    "online.selector.fraction=0.5",
]
MICRO = [*EVERY_STEP, "trainer.micro_batch_size=4"]
AGAIN = ["selector=random", "online=every_n_steps", "online.selector.fraction=0.5"]
AVERAGE = ["online.weights=ema", "optim.ema_decay=0.9"]
SCORER = [
    *("online.selector.learner.name=scorer", "online.scorer.name=tiny"),
    "+online.scorer.architecture=${model.architecture}",
]


class BuiltError(Exception):
    """Ends a run before its first step, with what has been built."""


@pytest.fixture
def build(
    base: list[str], compose: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> Build:
    """`build(options)`: what selects in a run."""

    def stop(parts: Any, budget: Any, online: Online, **_: Any) -> None:
        raise BuiltError(online)

    monkeypatch.setattr(assembly, "training_module", stop)

    def online_of(options: list[str]) -> Online:
        with pytest.raises(BuiltError) as caught:
            train_stage(compose("train", [*base, *options]))
        online: Online = caught.value.args[0]
        return online

    return online_of


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(MICRO, True, id="micro-batches"),
        pytest.param(EVERY_STEP, False, id="one forward"),
        pytest.param([*MICRO, *AVERAGE], False, id="of other weights"),
        pytest.param([*MICRO, *SCORER], False, id="of another model"),
        pytest.param([*MICRO, "online.scoring.image_size=16"], False, id="of fewer pixels"),
        pytest.param([*MICRO, "model.options.force_patch_dropout=0.5"], False, id="dropout"),
    ],
)
def test_scoring_is_the_first_pass_of_micro_batches_where_it_is_the_same(
    options: list[str], expected: bool, build: Build
) -> None:
    online = build(options)
    assert online.in_loop is not None
    assert online.in_loop.reuses_forward is expected
    assert online.cost.reuses_forward is expected


def test_the_window_of_reselection_is_a_share_of_the_steps(build: Build) -> None:
    online = build([*AGAIN, "scale.samples_seen=320", "online.start=0.25", "online.stop=0.7"])
    assert online.reselection is not None
    assert online.reselection.window == (5, 14)  # of 20


def test_a_filter_ratio_filters_or_is_0(build: Build) -> None:
    plain = build([*EVERY_STEP, "online.schedule.filter_ratio=0"])
    assert not plain.plan.selects.any()
    with pytest.raises(InputError, match=r"filter_ratio=0\.01 is so small that a super-batch"):
        build([*EVERY_STEP, "online.schedule.filter_ratio=0.01"])
