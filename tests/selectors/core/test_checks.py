"""The checks of the contract fail on selectors that break it: one bad selector for each clause."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.hashing import uniform_score
from siftclip.selectors.core import checks
from siftclip.selectors.core.base import (
    Choice,
    Chunk,
    ExternalColumn,
    Requirements,
    ScoreSelector,
    Selector,
    Source,
)
from siftclip.selectors.core.checks import SelectorFactory
from siftclip.selectors.core.compose import Then
from siftclip.selectors.core.rules import TopFraction
from siftclip.selectors.core.sub_batch import SubBatch
from siftclip.selectors.methods.clip_score import ClipScore


class Sound(ScoreSelector):
    """Keeps the contract; the bad ones below break one clause of it each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**(options or {"fraction": 0.3}))

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(uniform_score(chunk.uids, 0))


class Changed(Sound):
    """Spoils the answer of a sound selector."""

    def change(self, choice: Choice) -> Choice:
        raise NotImplementedError

    def select(self, source: Source) -> Choice:
        return self.change(super().select(source))


class LeavesOneOut(Changed):
    def change(self, choice: Choice) -> Choice:
        return Choice(multiplicities=choice.multiplicities[1:])


class BoolMask(Changed):
    def change(self, choice: Choice) -> Choice:
        return Choice(multiplicities=choice.multiplicities > 0)


class NegativeCounts(Changed):
    def change(self, choice: Choice) -> Choice:
        return Choice(multiplicities=choice.multiplicities * 2 - 1)


class KeepsNothing(Changed):
    def change(self, choice: Choice) -> Choice:
        return Choice(multiplicities=choice.multiplicities * 0)


class DoubleScores(Changed):
    def change(self, choice: Choice) -> Choice:
        assert choice.scores is not None
        scores = choice.scores.astype(np.float64)
        return Choice(multiplicities=choice.multiplicities, scores=scores)


class SaysNothingOfWeights(Changed):
    def change(self, choice: Choice) -> Choice:
        weights = np.ones(len(choice.multiplicities), dtype=np.float32)
        return Choice(multiplicities=choice.multiplicities, weights=weights)


class NegativeWeights(SaysNothingOfWeights):
    weighs = True

    def change(self, choice: Choice) -> Choice:
        weights = np.full(len(choice.multiplicities), -1, dtype=np.float32)
        return Choice(multiplicities=choice.multiplicities, weights=weights)


class OtherWeights(SaysNothingOfWeights):
    """Its weights depend on the order of the samples."""

    weighs = True

    def change(self, choice: Choice) -> Choice:
        weights = np.arange(len(choice.multiplicities), dtype=np.float32)
        return Choice(multiplicities=choice.multiplicities, weights=weights)

    def select(self, source: Source) -> Choice:
        (part,) = source.parts(self.requires)
        choice = super().select(source)
        assert choice.weights is not None
        weights = np.empty_like(choice.weights)
        weights[source.index_of(part.rows)] = choice.weights
        return Choice(multiplicities=choice.multiplicities, weights=weights)


class TorchGlobal(Sound):
    def score(self, chunk: Chunk) -> Tensor:
        return torch.rand(len(chunk))


class NumpyGlobal(Sound):
    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(np.random.rand(len(chunk)).astype(np.float32))


class PythonGlobal(Sound):
    def score(self, chunk: Chunk) -> Tensor:
        return torch.tensor([random.random() for _ in range(len(chunk))])


class RelativeToChunk(Sound):
    def score(self, chunk: Chunk) -> Tensor:
        scores = super().score(chunk)
        return scores - scores.mean()


class ScoresInHalfPrecision(Sound):
    """CLIP score in the dtype of the features, made float32 by what is added."""

    @property
    def requires(self) -> Requirements:
        return Requirements(features=("l14_img", "l14_txt"))

    def score(self, chunk: Chunk) -> Tensor:
        similarities = (chunk.features["l14_img"] * chunk.features["l14_txt"]).sum(1)
        return similarities - 0.05 * torch.ones(len(chunk))


class DecidesInHalfPrecision(Selector):
    """Keeps images longer than 1, by rounding; it has no scores."""

    @property
    def requires(self) -> Requirements:
        return Requirements(features=("l14_img",))

    def select(self, source: Source) -> Choice:
        chunk = source.take(source.rows, self.requires)
        squares = (chunk.features["l14_img"] ** 2).sum(1)
        return Choice(multiplicities=(squares > 1).long().numpy())


class PrefersEarly(Sound):
    """Ties go to the samples that come first, not to the smaller uids."""

    def select(self, source: Source) -> Choice:
        kept = np.zeros(len(source), dtype=np.int64)
        (part,) = source.parts(self.requires)
        kept[source.index_of(part.rows[: len(source) // 2])] = 1
        return Choice(multiplicities=kept)


class RowsInPlace(Sound):
    def score(self, chunk: Chunk) -> Tensor:
        chunk.rows[:] = chunk.rows[::-1].copy()
        return super().score(chunk)


class UidsInPlace(Sound):
    def score(self, chunk: Chunk) -> Tensor:
        chunk.uids[0] += np.uint64(1)
        return super().score(chunk)


class FeaturesInPlace(Sound):
    @property
    def requires(self) -> Requirements:
        return Requirements(features=("l14_img",))

    def score(self, chunk: Chunk) -> Tensor:
        return chunk.features["l14_img"].mul_(2.0).float().sum(dim=1)


class ColumnInPlace(Sound):
    @property
    def requires(self) -> Requirements:
        return Requirements(column=ExternalColumn(path="a.parquet", column="a"))

    def score(self, chunk: Chunk) -> Tensor:
        assert chunk.column is not None
        np.add(chunk.column, 1, out=chunk.column)
        return torch.from_numpy(chunk.column.astype(np.float32))


class CaptionsInPlace(Sound):
    @property
    def requires(self) -> Requirements:
        return Requirements(captions=True)

    def score(self, chunk: Chunk) -> Tensor:
        assert chunk.captions is not None
        chunk.captions.sort()
        return super().score(chunk)


class Draws(Sound):
    """Draws wrongly, and the best of each group but for that."""

    def change(self, kept: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
        raise NotImplementedError

    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        kept = super().draw(source, sub_batch).multiplicities
        return Choice(multiplicities=self.change(kept, sub_batch))


class DrawsTooFew(Draws):
    def change(self, kept: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
        kept[np.flatnonzero(kept)[0]] = 0
        return kept


class DrawsTwice(Draws):
    def change(self, kept: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
        first, second, *_ = np.flatnonzero(kept)
        kept[first], kept[second] = 2, 0
        return kept


class DrawsTheSameOfEachGroup(Sound):
    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        alike = SubBatch(samples=sub_batch.samples, groups=sub_batch.groups)
        return super().draw(source, alike)


class DrawsAnArrayOfIndices(Draws):
    def change(self, kept: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
        return np.flatnonzero(kept)


class DrawsBools(Draws):
    def change(self, kept: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
        return kept > 0


class DrawsByTheGlobalState(Draws):
    def change(self, kept: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
        groups = kept.reshape(sub_batch.groups, -1)
        return np.stack([np.random.permutation(group) for group in groups]).reshape(-1)


class DrawsByACounter(Draws):
    drawn = 0

    def change(self, kept: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
        self.drawn += 1
        return np.roll(kept.reshape(sub_batch.groups, -1), self.drawn, axis=1).reshape(-1)


class DrawsWithWeights(Sound):
    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        choice = super().draw(source, sub_batch)
        weights = np.ones(len(source), dtype=np.float32)
        return Choice(multiplicities=choice.multiplicities, weights=weights)


class RefusesSubBatches(Sound):
    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        raise InputError("no sub-batches here")


class OfItsRank(Sound):
    def select(self, source: Source) -> Choice:
        choice = super().select(source)
        kept = np.roll(choice.multiplicities, source.ranks.rank)
        return Choice(multiplicities=kept, scores=choice.scores)


class NeedsAShare(Sound):
    def fit(self, source: Source) -> None:
        if not sum(len(task.rows) for task in source.mine(source.tasks(self.requires))):
            raise ZeroDivisionError("there is nothing to divide by")


class WaitsAlone(Sound):
    def fit(self, source: Source) -> None:
        if source.ranks.rank == 0:
            source.ranks.barrier()


class SumsForItself(Sound):
    def fit(self, source: Source) -> None:
        self._own = len(source.mine(source.tasks(self.requires)))

    def score(self, chunk: Chunk) -> Tensor:
        return (super().score(chunk) * self._own * 7) % 1


class DrawsOfItsRank(Sound):
    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        kept = super().draw(source, sub_batch).multiplicities.reshape(sub_batch.groups, -1)
        return Choice(multiplicities=np.roll(kept, source.ranks.rank, axis=1).reshape(-1))


class HoldsLambda(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.transform = lambda scores: scores


class ForgetsSettings(Sound):
    """Loses its seed when it is pickled."""

    seed = 1

    def __getstate__(self) -> dict[str, Any]:
        return {"rule": self.rule, "seed": 2}

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(uniform_score(chunk.uids, self.seed))


class KeepsUnscored(Sound):
    def __init__(self) -> None:
        best = TopFraction(0.9)
        super().__init__(rule=lambda scores, uids, n: best(np.nan_to_num(scores), uids, n))


class NeedsTwo(Sound):
    def select(self, source: Source) -> Choice:
        choice = super().select(source)
        assert len(source) > 1, "the variance of one sample is not defined"
        return choice


class AnswersForThePool(Sound):
    def select(self, source: Source) -> Choice:
        return super().select(source.whole)


BAD: list[tuple[type[Selector], Callable[[SelectorFactory], None], str | None]] = [
    (LeavesOneOut, checks.check_answer, "answered once"),
    (BoolMask, checks.check_answer, "multiplicities must be int64"),
    (NegativeCounts, checks.check_answer, "at least 0"),
    (KeepsNothing, checks.check_answer, "nothing was kept"),
    (DoubleScores, checks.check_answer, "scores must be float32"),
    (SaysNothingOfWeights, checks.check_weights, "does not declare that it weighs samples"),
    (NegativeWeights, checks.check_weights, "finite weights of at least 0"),
    (OtherWeights, checks.check_sample_order, "weights differ"),
    (TorchGlobal, checks.check_deterministic, "torch's global random state"),
    (NumpyGlobal, checks.check_deterministic, "numpy's global random state"),
    (PythonGlobal, checks.check_deterministic, None),
    (RelativeToChunk, checks.check_chunk_size, None),
    (ScoresInHalfPrecision, checks.check_half_precision, r"not scored in float32.*\.float\(\)"),
    (DecidesInHalfPrecision, checks.check_half_precision, r"float16 and float32 features"),
    (PrefersEarly, checks.check_sample_order, None),
    (RowsInPlace, checks.check_input_untouched, None),
    (UidsInPlace, checks.check_input_untouched, None),
    (FeaturesInPlace, checks.check_input_untouched, "features 'l14_img' were modified"),
    (ColumnInPlace, checks.check_input_untouched, None),
    (CaptionsInPlace, checks.check_input_untouched, None),
    (ForgetsSettings, checks.check_picklable, None),
    (KeepsUnscored, checks.check_unscored, "NaN were kept"),
    (NeedsTwo, checks.check_single_sample, None),
    (DrawsTooFew, checks.check_draw, r"must choose 6 different samples of each of the 4 groups"),
    (DrawsTwice, checks.check_draw, r"must choose 6 different samples"),
    (DrawsTheSameOfEachGroup, checks.check_draw, r"must choose \[6, 5, 6, 5\] different samples"),
    (DrawsAnArrayOfIndices, checks.check_draw, r"must answer with one multiplicity for each of 96"),
    (DrawsBools, checks.check_draw, r"must answer with int64"),
    (DrawsByTheGlobalState, checks.check_draw, "two fresh selectors draw differently"),
    (DrawsByACounter, checks.check_draw, "a second draw with the same seed differs"),
    (DrawsWithWeights, checks.check_draw, "does not declare that it weighs samples"),
    (RefusesSubBatches, checks.check_draw, "a sub-batch is refused: no sub-batches here"),
    (OfItsRank, checks.check_ranks, r"rank 1 of 2 does not answer as one rank, in parts of 40"),
    (NeedsAShare, checks.check_ranks, "there is nothing to divide by"),
    (WaitsAlone, checks.check_ranks, "ranks do not wait for the same thing"),
    (SumsForItself, checks.check_ranks, "does not answer as one rank"),
    (DrawsOfItsRank, checks.check_ranks, r"rank 1 of 2 does not answer .* for a sub-batch"),
    (AnswersForThePool, checks.check_few_left, "2 of a source of 257 samples"),
]


def test_sound_selector_passes() -> None:
    checks.check_selector(Sound)


def test_features_that_are_left_open_are_named() -> None:
    checks.check_selector(lambda: ClipScore(fraction=0.3))
    checks.check_selector(lambda: Then(stages=[ClipScore(fraction=0.5), ClipScore(fraction=0.3)]))


@pytest.mark.parametrize(("bad", "check", "message"), BAD, ids=[bad.__name__ for bad, _, _ in BAD])
def test_bad_selector_fails(
    bad: type[Selector], check: Callable[[SelectorFactory], None], message: str | None
) -> None:
    with pytest.raises(AssertionError, match=message):
        check(bad)


def test_selector_that_cannot_be_pickled_fails() -> None:
    with pytest.raises(AssertionError, match="the selector cannot be pickled: "):
        checks.check_picklable(HoldsLambda)


def test_every_check_has_a_bad_selector() -> None:
    assert {check for _, check, _ in BAD} == set(checks.CHECKS)


def test_check_selector_names_the_check_that_failed() -> None:
    with pytest.raises(AssertionError, match=r"^check_sample_order: "):
        checks.check_selector(PrefersEarly)
