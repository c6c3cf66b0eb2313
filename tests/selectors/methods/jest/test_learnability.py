"""Learnability of single pairs against loops: parts, chunks, ranks, and samples to leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra.utils
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import normalize

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import Chunk, SubBatch, draw
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Logits
from siftclip.selectors.methods.jest.jest import JEST
from siftclip.selectors.methods.jest.learnability import Learnability, ModelFeatures

CONFIGS = Path(__file__).parents[4] / "configs" / "selector"
LEARNER, REFERENCE = ModelFeatures(name="learner"), ModelFeatures(name="reference")
LOGITS = {"learner": Logits(scale=9.0, bias=-4.0), "reference": Logits(scale=6.0, bias=-3.0)}


def make_chunk(samples: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Chunk:
    generator = torch.Generator().manual_seed(seed)
    keys = ("learner_img", "learner_txt", "reference_img", "reference_txt")
    features = {
        key: normalize(torch.randn(samples, 8, generator=generator, dtype=torch.float64), dim=1).to(
            dtype
        )
        for key in keys
    }
    uids = np.random.default_rng(seed).integers(0, 2**64, (samples, 2), dtype=np.uint64)
    return Chunk(rows=np.arange(samples), uids=uids, features=features)


def slow_loss(chunk: Chunk, name: str, loss: str, able: list[int], i: int) -> float:
    """The loss of sample i among those that are able, by the definition."""
    image, text = (chunk.features[f"{name}_{side}"].double() for side in ("img", "txt"))
    scale, bias = LOGITS[name].scale, LOGITS[name].bias

    def logit(a: int, b: int) -> Tensor:
        return scale * (image[a] @ text[b]) + bias

    if loss == "pair":
        return -float(logit(i, i) - bias)
    if loss == "softmax":
        rows = torch.stack([logit(i, j) for j in able]).logsumexp(0)
        columns = torch.stack([logit(j, i) for j in able]).logsumexp(0)
        return float((rows + columns) / 2 - logit(i, i))
    total = -torch.nn.functional.logsigmoid(logit(i, i))
    for j in able:
        if j != i:
            pair = torch.stack([-logit(i, j), -logit(j, i)])
            total = total - torch.nn.functional.logsigmoid(pair).sum() / 2
    return float(total)


def slow_scores(
    chunk: Chunk, loss: str, models: dict[str, float], unusable: tuple[int, ...] = ()
) -> np.ndarray:
    able = [i for i in range(len(chunk)) if i not in unusable]
    found = np.full(len(chunk), np.nan)
    for i in able:
        found[i] = sum(
            sign * slow_loss(chunk, name, loss, able, i) for name, sign in models.items()
        )
    return found


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "pair"])
@pytest.mark.parametrize("part_samples", [None, 10])
@pytest.mark.parametrize("chunk_samples", [7, 100])
def test_scores_equal_loops(loss: str, part_samples: int | None, chunk_samples: int) -> None:
    chunk = make_chunk(23)
    chunk.features["learner_img"][4] = torch.nan
    chunk.features["reference_txt"][[11, 22]] = 0.0
    source = MemorySource(
        chunk, logits=LOGITS, part_samples=part_samples, chunk_samples=chunk_samples
    )
    selector = Learnability(learner=LEARNER, reference=REFERENCE, loss=loss, fraction=0.5)
    expected = slow_scores(chunk, loss, {"learner": 1.0, "reference": -1.0}, (4, 11, 22))
    np.testing.assert_allclose(selector.scores(source), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "pair"])
def test_hard_and_easy_reference(loss: str) -> None:
    chunk = make_chunk(9, seed=1)
    source = MemorySource(chunk, logits=LOGITS)
    hard = Learnability(learner=LEARNER, reference=None, loss=loss, fraction=0.5)
    easy = Learnability(learner=None, reference=REFERENCE, loss=loss, fraction=0.5)
    assert hard.requires.features == ("learner_img", "learner_txt")
    assert easy.requires.features == ("reference_img", "reference_txt")
    expected = slow_scores(chunk, loss, {"learner": 1.0})
    np.testing.assert_allclose(hard.scores(source), expected, rtol=1e-5, atol=1e-6)
    expected = slow_scores(chunk, loss, {"reference": -1.0})
    np.testing.assert_allclose(easy.scores(source), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "pair"])
def test_any_number_of_ranks_gives_the_same_scores(
    loss: str, run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]]
) -> None:
    chunk = make_chunk(4 * 21, dtype=torch.float16)

    def choose(ranks: Ranks) -> Any:
        source = MemorySource(chunk, logits=LOGITS, part_samples=21, ranks=ranks)
        selector = Learnability(learner=LEARNER, reference=REFERENCE, loss=loss, fraction=0.5)
        return draw(selector, source, SubBatch(samples=5, groups=4, temperature=0.3))

    answers = [answer for size in (1, 2, 4) for answer in run_on_ranks(size, choose)]
    for answer in answers:
        assert np.array_equal(answer.scores, answers[0].scores)
        assert np.array_equal(answer.multiplicities, answers[0].multiplicities)


def test_restricted_sources_have_fewer_negatives() -> None:
    chunk = make_chunk(12)
    rows = np.array([1, 2, 5, 7, 11])
    source = MemorySource(chunk, logits=LOGITS, part_samples=4).restrict(rows)
    selector = Learnability(learner=LEARNER, reference=None, fraction=0.5)
    left_out = tuple(set(range(12)) - set(rows.tolist()))
    expected = slow_scores(chunk, "softmax", {"learner": 1.0}, left_out)[rows]
    np.testing.assert_allclose(selector.scores(source), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "pair"])
def test_odd_sources(loss: str) -> None:
    selector = Learnability(learner=LEARNER, reference=REFERENCE, loss=loss, fraction=1.0)
    one = make_chunk(1)
    expected = slow_scores(one, loss, {"learner": 1.0, "reference": -1.0})
    found = selector.scores(MemorySource(one, logits=LOGITS))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    none = make_chunk(5)
    none.features["learner_txt"][:] = torch.nan
    assert np.isnan(selector.scores(MemorySource(none, logits=LOGITS, part_samples=2))).all()
    same = make_chunk(6)
    for key, values in same.features.items():
        same.features[key] = values[:1].expand(6, 8)
    found = selector.scores(MemorySource(same, logits=LOGITS))
    np.testing.assert_allclose(found, np.full(6, found[0]), rtol=1e-6)


def test_own_logits_come_before_those_of_the_source() -> None:
    source = MemorySource(make_chunk(3), logits=LOGITS)
    own = ModelFeatures(name="learner", logit_scale=50, logit_bias=-7)
    assert own.logits(source, biased=True) == Logits(scale=50, bias=-7)
    half = ModelFeatures(name="learner", logit_scale=50.0)
    assert half.logits(source, biased=True) == Logits(scale=50.0, bias=-4.0)
    assert LEARNER.logits(source, biased=True) == LOGITS["learner"]
    # the softmax loss needs no bias, so that cached features need no source that knows it
    cached = ModelFeatures(name="l14", logit_scale=100.0)
    assert cached.logits(source, biased=False).scale == 100.0
    with pytest.raises(InputError, match=r"'l14' is not known .* set the selector's logit_scale"):
        cached.logits(source, biased=True)


def test_mistakes_of_users() -> None:
    with pytest.raises(InputError, match=r"Learnability needs learner, .* Got neither"):
        Learnability(learner=None, reference=None, fraction=0.5)
    with pytest.raises(InputError, match=r"loss must be one of softmax, sigmoid, pair"):
        Learnability(learner=LEARNER, reference=None, loss="l2", fraction=0.5)
    with pytest.raises(InputError, match=r"ModelFeatures: logit_scale must be above 0"):
        ModelFeatures(name="x", logit_scale=0.0)
    with pytest.raises(InputError, match=r"ModelFeatures: logit_bias must be a finite"):
        ModelFeatures(name="x", logit_bias=float("nan"))


@pytest.mark.parametrize("name", ["learnability", "hard", "easy_reference", "jest"])
def test_configs_build_their_selectors(name: str) -> None:
    config = OmegaConf.merge({"seed": 3}, {"selector": OmegaConf.load(CONFIGS / f"{name}.yaml")})
    node = OmegaConf.to_container(config, resolve=True)["selector"]
    assert node.pop("name") == name
    selector = hydra.utils.instantiate(node)
    assert isinstance(selector, JEST if name == "jest" else Learnability)
    assert (selector.learner is None) == (name == "easy_reference")
    assert (selector.reference is None) == (name == "hard")
    choice = draw(selector, MemorySource(make_chunk(20), logits=LOGITS), SubBatch(samples=4))
    assert choice.multiplicities.sum() == 4


def test_the_softmax_loss_needs_no_bias() -> None:
    cached, chunk = ModelFeatures(name="learner", logit_scale=9.0), make_chunk(7)
    selector = Learnability(learner=cached, reference=None, fraction=0.5)
    expected = slow_scores(chunk, "softmax", {"learner": 1.0})
    np.testing.assert_allclose(selector.scores(MemorySource(chunk)), expected, rtol=1e-5)
