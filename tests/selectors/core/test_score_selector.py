"""What the base class of scorers does for a method: the rule, the checks, the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from siftclip.errors import InputError, require_finite, require_fraction, require_int
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import Choice, Chunk, ScoreSelector, Source, check_choice
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import AsGiven, Threshold, TopFraction
from siftclip.selectors.core.source import Requirements, WorkUnit


class Answers(ScoreSelector):
    """Answers with what it was given."""

    def __init__(self, answer: Any, **rule: Any) -> None:
        super().__init__(**(rule or {"fraction": 0.5}))
        self.answer = answer

    def score(self, chunk: Chunk) -> Tensor:
        return self.answer


class AboveMean(ScoreSelector):
    """Centres by what a first pass has gathered."""

    def fit(self, source: Source) -> None:
        self._mean = float(source.rows.mean())

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(chunk.rows - self._mean).float()


def make_chunk(rows: list[int]) -> Chunk:
    uids = np.stack([rows, rows], axis=1).astype(np.uint64)
    return Chunk(rows=np.array(rows, dtype=np.int64), uids=uids)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, "none of them"),
        ({"fraction": 0.5, "threshold": 0.1}, "fraction and threshold"),
        ({"threshold": 0.1, "rule": AsGiven()}, "threshold and rule"),
        ({"fraction": None, "threshold": None}, "none of them"),
    ],
)
def test_exactly_one_rule_must_be_given(options: dict[str, Any], given: str) -> None:
    with pytest.raises(InputError, match=f"AboveMean needs exactly one of .*Got {given}"):
        AboveMean(**options)


def test_rule_follows_from_the_option() -> None:
    assert isinstance(AboveMean(fraction=0.1).rule, TopFraction)
    assert isinstance(AboveMean(threshold=0.0).rule, Threshold)  # 0 is given, not missing
    rule = AsGiven()
    assert AboveMean(rule=rule).rule is rule


def test_select_fits_then_scores_all_chunks() -> None:
    source = MemorySource(make_chunk([9, 0, 1, 2, 3, 4]), chunk_samples=2)
    choice = AboveMean(threshold=0.0).select(source)
    assert source.rows.tolist() == [0, 1, 2, 3, 4, 9]
    assert choice.multiplicities.tolist() == [0, 0, 0, 0, 1, 1]  # the mean is 19 / 6


def test_fraction_of_what_is_left_or_of_the_pool() -> None:
    rows = list(range(10))
    left = MemorySource(make_chunk(rows)).restrict(np.array([1, 3, 5, 9]))
    assert AboveMean(fraction=0.3).select(left).multiplicities.tolist() == [0, 1, 1, 1]
    assert AboveMean(fraction=0.5, of="left").select(left).multiplicities.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"of must be one of pool, left. Got 'rest'"):
        AboveMean(fraction=0.5, of="rest")
    with pytest.raises(InputError, match=r"of belongs to fraction. Got 'left'"):
        AboveMean(threshold=0.5, of="left")


def test_samples_whose_features_say_nothing_have_no_score() -> None:
    """Zero vectors, NaN and infinity: no score, whatever the method answers, and never kept."""
    features = torch.eye(6).half()
    features[1], features[3, 2], features[4, 0] = 0, torch.nan, torch.inf
    chunk = replace(make_chunk(list(range(6))), features={"a_img": features})

    class Constant(Answers):
        @property
        def requires(self) -> Requirements:
            return Requirements(features=("a_img",))

    choice = Constant(torch.ones(6), fraction=1.0).select(MemorySource(chunk))
    assert choice.multiplicities.tolist() == [1, 0, 1, 0, 0, 1]
    assert choice.scores is not None
    assert np.isnan(choice.scores).tolist() == [False, True, False, True, True, False]


class TwoPasses(ScoreSelector):
    """The value of a sample is its row in the first pass and zero in the second."""

    passes = 2

    def tasks(self, source: Source, pass_number: int) -> Sequence[WorkUnit]:
        return source.tasks(self.requires, label=f"{pass_number}-")

    def score_task(self, source: Source, task: WorkUnit) -> Tensor:
        return torch.from_numpy(task.rows).float() * (task.name[0] == "0")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_scores_are_means_of_passes_and_the_same_on_all_ranks(
    run_on_ranks: Callable[..., list[np.ndarray]], size: int
) -> None:
    chunk = make_chunk([5, 3, 8, 1, 9, 0, 7])

    def run(ranks: Ranks) -> np.ndarray:
        source = MemorySource(chunk, part_samples=2, ranks=ranks)
        return TwoPasses(fraction=0.5).scores(source)

    for scores in run_on_ranks(size, run):
        assert scores.dtype == np.float32
        assert scores.tolist() == [0, 0.5, 1.5, 2.5, 3.5, 4, 4.5]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            torch.zeros(2, dtype=torch.float64),
            TypeError,
            r"float32 tensor \[2\]. Got torch.float64 \[2\]",
        ),
        (
            torch.zeros(2, dtype=torch.float16),
            TypeError,
            r"Got torch.float16 \[2\].*\.float\(\) converts",
        ),
        (np.zeros(2, np.float32), TypeError, "must return a float32 tensor.*Got a ndarray"),
        (torch.zeros(3), ValueError, r"\[2\] scores for a chunk of 2 samples. Got \[3\]"),
        (torch.zeros(2, 1), ValueError, r"Got \[2, 1\]"),
        (torch.zeros(()), ValueError, r"Got \[\]"),
    ],
)
def test_wrong_answer_of_a_method_is_an_error(
    answer: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Answers(answer).checked_score(make_chunk([0, 1]))
    assert not isinstance(caught.value, InputError)  # a fault of the code, not of the user


def test_scores_carry_no_gradient() -> None:
    class Learned(Answers):
        def score(self, chunk: Chunk) -> Tensor:
            assert not torch.is_grad_enabled()
            return self.answer * 2

    selector = Learned(torch.ones(2, requires_grad=True))
    assert selector.scores(MemorySource(make_chunk([0, 1]))).tolist() == [2.0, 2.0]


def test_requirements_of_options_name_option_and_value() -> None:
    with pytest.raises(InputError, match=r"data.x must be an integer of at least 2. Got 1."):
        require_int("data.x", 1, minimum=2)
    assert require_int("data.x", 2, minimum=2) == 2
    with pytest.raises(InputError, match=r"a.b must be a finite number. Got inf."):
        require_finite("a.b", float("inf"))
    assert require_finite("a.b", -1) == -1.0
    with pytest.raises(InputError, match=r"a.f must be a number in the range \(0, 1\].* Got 0."):
        require_fraction("a.f", 0)
    assert require_fraction("a.f", 1) == 1.0


@pytest.mark.parametrize(
    ("kept", "message"),
    [([1, -1], "at least 0"), ([1], "one multiplicity for each of 2"), ([[1, 1]], "one multi")],
)
def test_wrong_answer_of_a_set_function_is_refused(kept: list[Any], message: str) -> None:
    choice = Choice(multiplicities=np.array(kept))
    with pytest.raises(ValueError, match=f"Mine.select must answer with .*{message}"):
        check_choice("Mine", choice, samples=2)


def test_answer_of_other_types_is_refused() -> None:
    choice = Choice(multiplicities=np.array([1, 1], dtype=np.int32))
    with pytest.raises(TypeError, match="int64"):
        check_choice("Mine", choice, samples=2)
    whole = Choice(multiplicities=np.array([0, 2]))
    assert check_choice("Mine", whole, samples=2) is whole
