"""What the base class of scorers does for a method: the rule, the checks, the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from siftclip.selectors.base import Choice, Chunk, ChunkSource, ScoreSelector, check_choice
from siftclip.selectors.errors import InputError, require_finite, require_fraction, require_int
from siftclip.selectors.rules import AsGiven, Threshold, TopFraction


class Answers(ScoreSelector):
    """Answers with what it was given."""

    def __init__(self, answer: Any, **rule: Any) -> None:
        super().__init__(**(rule or {"fraction": 0.5}))
        self.answer = answer

    def score(self, chunk: Chunk) -> Tensor:
        return self.answer


class AboveMean(ScoreSelector):
    """Centres by what a first pass has gathered."""

    def fit(self, source: ChunkSource) -> None:
        self.mean = float(np.concatenate([chunk.rows for chunk in source()]).mean())

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(chunk.rows - self.mean).float()


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
    chunks = [make_chunk([0, 1, 2]), make_chunk([3]), make_chunk([4, 9])]
    choice = AboveMean(threshold=0.0).select(lambda: chunks)
    assert choice.rows.tolist() == [0, 1, 2, 3, 4, 9]
    assert choice.multiplicities.tolist() == [0, 0, 0, 0, 1, 1]  # the mean is 19 / 6


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (torch.zeros(2, dtype=torch.float64), TypeError, "must return a float32 tensor"),
        (torch.zeros(2, dtype=torch.float16), TypeError, "must return a float32 tensor"),
        (np.zeros(2, np.float32), TypeError, "must return a float32 tensor"),
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

    scores = Learned(torch.ones(2, requires_grad=True)).checked_score(make_chunk([0, 1]))
    assert scores.tolist() == [2.0, 2.0]


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
    ("rows", "kept", "message"),
    [
        ([0, 0], [1, 1], "distinct rows"),
        ([0, 5], [1, 1], r"in \[0, 5\)"),
        ([-1, 2], [1, 1], "distinct rows"),
        ([0, 1], [1, -1], "at least 0"),
        ([0, 1], [1], "one multiplicity a row"),
    ],
)
def test_wrong_answer_of_a_set_function_is_refused(
    rows: list[int], kept: list[int], message: str
) -> None:
    choice = Choice(rows=np.array(rows), multiplicities=np.array(kept))
    with pytest.raises(ValueError, match=f"Mine.select must answer with .*{message}"):
        check_choice("Mine", choice, samples=5)


def test_answer_of_other_types_is_refused() -> None:
    choice = Choice(rows=np.array([0, 1], dtype=np.int32), multiplicities=np.array([1, 1]))
    with pytest.raises(TypeError, match="int64"):
        check_choice("Mine", choice, samples=5)
    whole = Choice(rows=np.array([3, 1]), multiplicities=np.array([0, 2]))
    assert check_choice("Mine", whole, samples=5) is whole
