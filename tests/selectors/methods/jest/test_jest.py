"""JEST as a selector: features and logits of a source, once and per step, on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import Chunk, SubBatch, draw, run
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Logits, Part, Requirements
from siftclip.selectors.methods.jest.jest import JEST
from siftclip.selectors.methods.jest.joint_sampling import Judge, joint_sample
from siftclip.selectors.methods.jest.learnability import ModelFeatures
from siftclip.selectors.methods.jest.pair_losses import LOSSES

LEARNER = ModelFeatures(name="learner")
CACHED = ModelFeatures(name="l14", logit_scale=20.0, logit_bias=-6.0)
LOGITS = {"learner": Logits(scale=12.0, bias=-5.0)}


def make_chunk(samples: int, *, dtype: torch.dtype = torch.float16) -> Chunk:
    generator = torch.Generator().manual_seed(0)
    keys = ("learner_img", "learner_txt", "l14_img", "l14_txt")
    widths = (8, 8, 12, 12)  # models may have different ones
    features = {
        key: normalize(torch.randn(samples, width, generator=generator), dim=1).to(dtype)
        for key, width in zip(keys, widths, strict=True)
    }
    uids = np.random.default_rng(0).integers(0, 2**64, (samples, 2), dtype=np.uint64)
    return Chunk(rows=np.arange(samples), uids=uids, features=features)


def make_selector(**options: Any) -> JEST:
    chosen: dict[str, Any] = {"learner": LEARNER, "reference": CACHED, "fraction": 0.25}
    return JEST(**chosen | options)


class Lacking(MemorySource):
    """A source that has no features of its first samples."""

    missing = 5

    def parts(self, requires: Requirements) -> list[Part]:
        return [Part(name="rest", rows=self.rows[self.missing :])]


@pytest.mark.parametrize("loss", LOSSES)
def test_draw_is_the_joint_sample_of_the_source(loss: str) -> None:
    chunk, sub_batch = make_chunk(40), SubBatch(samples=6, groups=2, temperature=0.5, seed=8)
    judges = [
        Judge(
            image=chunk.features[f"{name}_img"],
            text=chunk.features[f"{name}_txt"],
            logits=logits,
            sign=sign,
        )
        for name, logits, sign in (
            ("learner", LOGITS["learner"], 1.0),
            ("l14", Logits(scale=20.0, bias=-6.0), -1.0),
        )
    ]
    usable = torch.ones(40, dtype=torch.bool)
    expected, first = joint_sample(
        judges, usable, chunk.uids, sub_batch, losses=LOSSES[loss], chunks=3
    )
    selector = make_selector(loss=loss, chunks=3)
    choice = draw(selector, MemorySource(chunk, logits=LOGITS), sub_batch)
    assert np.array_equal(choice.multiplicities, expected)
    assert choice.scores is not None
    assert choice.scores.dtype == np.float32
    assert np.array_equal(choice.scores, first)


@pytest.mark.parametrize("loss", LOSSES)
def test_any_number_of_ranks_gives_the_same_answer(
    loss: str, run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]]
) -> None:
    chunk = make_chunk(4 * 20)
    chunk.features["l14_txt"][33] = torch.nan

    def choose(ranks: Ranks) -> Any:
        source = MemorySource(chunk, logits=LOGITS, part_samples=20, ranks=ranks)
        return draw(make_selector(loss=loss), source, SubBatch(samples=7, groups=4))

    def once(ranks: Ranks) -> Any:
        return run(make_selector(loss=loss), MemorySource(chunk, logits=LOGITS, ranks=ranks))

    for function in (choose, once):
        answers = [answer for size in (1, 2, 4) for answer in run_on_ranks(size, function)]
        for answer in answers:
            assert np.array_equal(answer.multiplicities, answers[0].multiplicities)
            assert np.array_equal(answer.scores, answers[0].scores, equal_nan=True)
        assert np.flatnonzero(np.isnan(answers[0].scores)).tolist() == [33]


def test_select_draws_the_fraction() -> None:
    source = MemorySource(make_chunk(30), logits=LOGITS)
    choice = run(make_selector(seed=4), source)
    assert choice.multiplicities.sum() == 7  # int(30 * 0.25)
    same = draw(make_selector(), source, SubBatch(samples=7, seed=4))
    assert np.array_equal(choice.multiplicities, same.multiplicities)
    assert not np.array_equal(choice.multiplicities, run(make_selector(), source).multiplicities)


def test_what_a_fraction_counts() -> None:
    left = MemorySource(make_chunk(30), logits=LOGITS).restrict(np.arange(3, 15))
    assert run(make_selector(), left).multiplicities.sum() == 7  # of 30
    assert run(make_selector(of="left"), left).multiplicities.sum() == 3  # of 12
    assert run(make_selector(fraction=0.9), left).multiplicities.sum() == 12  # all there are


def test_samples_without_features_are_the_last_choice() -> None:
    source = Lacking(make_chunk(12), logits=LOGITS)
    kept = run(make_selector(fraction=0.5), source).multiplicities
    assert kept[:5].sum() == 0
    assert kept.sum() == 6
    kept = run(make_selector(fraction=0.75), source).multiplicities
    assert kept[5:].sum() == 7
    first = np.lexsort((source.uids[:5, 1], source.uids[:5, 0]))[:2]
    assert np.flatnonzero(kept[:5]).tolist() == sorted(first)
    scores = run(make_selector(), source).scores
    assert scores is not None
    assert np.isnan(scores).tolist() == [True] * 5 + [False] * 7


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("models", [("learner",), ("reference",), ("learner", "reference")])
def test_contract(loss: str, models: tuple[str, ...]) -> None:
    chosen: dict[str, Any] = {
        name: ModelFeatures(name=name, logit_scale=8.0, logit_bias=-5.0) if name in models else None
        for name in ("learner", "reference")
    }
    check_selector(lambda: JEST(**chosen, loss=loss, fraction=0.3))


def test_mistakes_of_users() -> None:
    with pytest.raises(InputError, match=r"JEST needs learner, .* Got neither"):
        make_selector(learner=None, reference=None)
    with pytest.raises(InputError, match=r"loss must be one of sigmoid, softmax"):
        make_selector(loss="pair")
    with pytest.raises(InputError, match=r"chunks must be an integer of at least 1"):
        make_selector(chunks=0)
    with pytest.raises(InputError, match=r"fraction must be a number in the range"):
        make_selector(fraction=0.0)
    unknown = make_selector(reference=ModelFeatures(name="l14"))
    with pytest.raises(InputError, match=r"logit scale of the model of the features 'l14'"):
        run(unknown, MemorySource(make_chunk(9), logits=LOGITS))


def test_the_same_model_twice_is_read_once() -> None:
    same = make_selector(reference=ModelFeatures(name="learner", logit_scale=3.0, logit_bias=0.0))
    assert same.requires.features == ("learner_img", "learner_txt")
    assert run(same, MemorySource(make_chunk(9), logits=LOGITS)).multiplicities.sum() == 2


def test_the_softmax_loss_needs_no_bias() -> None:
    cached = ModelFeatures(name="learner", logit_scale=9.0)
    source = MemorySource(make_chunk(9))  # knows no logits
    choice = run(make_selector(learner=cached, reference=None, loss="softmax"), source)
    assert choice.multiplicities.sum() == 2
    with pytest.raises(InputError, match="set the selector's logit_scale"):
        run(make_selector(learner=cached, reference=None), source)
