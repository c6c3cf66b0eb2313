"""Mutated files of every kind end in a value, an InputError or counted samples, and soon.

A few inputs of each kind, the same at each run; `python tests/fuzz/count_outcomes.py` tries
thousands, which the test marked `nightly` does too.
"""

from __future__ import annotations

import logging
import runpy
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType

import pytest
from fuzz_kinds import KINDS, outcome_of, outcome_of_answers, write_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage import remote as remote_storage

SECONDS = 20  # of one input, on a machine that does other things
EXAMPLES = 12  # of a kind
RANDOM = st.randoms(use_true_random=False)  # which hypothesis shrinks
HURRIED = settings(
    derandomize=True,
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    write_base(root)
    return root


@pytest.fixture(autouse=True)
def _quiet_and_bounded() -> Iterator[None]:
    """No log of what is bad, warnings of libraries are none of ours, and an end to what hangs."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError("an input took too long")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS * EXAMPLES)
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files(name: str, base: Path) -> None:
    @HURRIED
    @given(RANDOM)
    def check(random: Random) -> None:
        assert outcome_of(base, KINDS[name], random) in ("value", "error", "counted")

    check()


def test_wrong_answers_of_a_server(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_storage, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", 1.0)
    outcomes = {outcome_of_answers(base, Random(seed)) for seed in range(10)}
    assert outcomes <= {"value", "error", "counted"}
    assert len(outcomes) > 1  # some get through


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_ten_thousand_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    signal.alarm(0)  # the script has its own
    count = runpy.run_path(str(Path(__file__).with_name("count_outcomes.py")))
    assert count["main"](["--inputs", "10000", "--seed", "7"]) == 0, capsys.readouterr().out
