"""Bad samples are counted, named and bounded."""

from __future__ import annotations

import json

import pytest

from siftclip.datamodules.index.faults import EXAMPLES_PER_CAUSE, FaultLog
from siftclip.errors import InputError


def make_log(**causes: int) -> FaultLog:
    log = FaultLog()
    for cause, count in causes.items():
        for number in range(count):
            log.add(cause, f"{cause}.tar:{number}")
    return log


def test_counts_all_and_keeps_the_first_examples() -> None:
    log = make_log(empty=5, torn=1)
    assert log.samples == 6
    assert log.counts == {"empty": 5, "torn": 1}
    assert log.examples["empty"] == [f"empty.tar:{i}" for i in range(EXAMPLES_PER_CAUSE)]
    assert log.summary().startswith("5 empty (such as empty.tar:0, empty.tar:1")
    assert log.summary().endswith("; 1 torn (such as torn.tar:0)")


def test_an_example_is_named_once() -> None:
    log = FaultLog()
    log.add("torn", "a.tar:1")
    log.add("torn", "a.tar:1")
    assert log.samples == 2
    assert log.examples == {"torn": ["a.tar:1"]}


def test_merge_adds_counts_and_fills_examples() -> None:
    log = make_log(empty=2)
    log.merge(make_log(empty=4, torn=1))
    assert log.counts == {"empty": 6, "torn": 1}
    assert log.examples == {
        "empty": ["empty.tar:0", "empty.tar:1", "empty.tar:2"],
        "torn": ["torn.tar:0"],
    }


def test_state_is_json() -> None:
    log = make_log(empty=1)
    assert json.loads(json.dumps(log.state())) == {
        "counts": {"empty": 1},
        "examples": {"empty": ["empty.tar:0"]},
    }


@pytest.mark.parametrize(
    ("bad", "fraction", "ok"), [(1, 0.01, True), (2, 0.01, False), (0, 0, True), (1, 0, False)]
)
def test_limit_is_a_fraction_of_all_samples(bad: int, fraction: float, ok: bool) -> None:
    log = make_log(torn=bad)
    if ok:
        log.check(owner="pool x", total=100, max_bad_fraction=fraction)
        return
    with pytest.raises(InputError) as caught:
        log.check(owner="pool x", total=100, max_bad_fraction=fraction)
    message = str(caught.value)
    assert message.startswith(f"pool x: {bad} of 100 samples are bad")
    assert f"max_bad_fraction={fraction}" in message
    assert f"{bad} torn (such as torn.tar:0" in message


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_limit_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="max_bad_fraction must be a number in the range"):
        FaultLog().check(owner="pool x", total=1, max_bad_fraction=fraction)
