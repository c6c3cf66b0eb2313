"""Compositions, against twins written as loops, and against the authors' two-stage drivers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from siftclip.errors import InputError
from siftclip.selectors.core.base import Choice, Requirements, ScoreSelector, Selector, Source
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.compose import (
    And,
    Minus,
    Mix,
    Or,
    RankSum,
    Then,
    mix_scores,
    ordinal_ranks,
    rank_sum,
    union,
)
from siftclip.selectors.core.description import describe
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import AsGiven, DataCompFraction
from siftclip.selectors.core.source import Chunk, FeatureFile
from siftclip.selectors.methods.captions.datacomp_filters import BasicFilter
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.external import External
from siftclip.selectors.methods.uniform import Uniform

NUMBERS = st.sampled_from([0.0, 0.5, -1.0, 2.0, math.nan, math.inf, -math.inf])
Reference = Callable[[str], Mapping[str, np.ndarray]]


class Given(ScoreSelector):
    """Scores of a test, by row."""

    def __init__(self, values: Any, **rule: Any) -> None:
        super().__init__(**(rule or {"rule": AsGiven()}))
        self.values = np.asarray(values, dtype=np.float32)

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(self.values[chunk.rows])


class Files(Selector):
    """Reads a target, and keeps nothing."""

    @property
    def requires(self) -> Requirements:
        return Requirements(files=(FeatureFile(path="a.npz"),), features=("b32_img",))

    def select(self, source: Source) -> Choice:
        return Choice(multiplicities=np.zeros(len(source), dtype=np.int64))


def make_source(samples: int, seed: int = 0, **options: Any) -> MemorySource:
    generator = np.random.default_rng(seed)
    numbers = generator.permutation(samples).astype(np.uint64)
    uids = np.stack([numbers // 3, numbers % 3], axis=1).astype(np.uint64)
    return MemorySource(Chunk(rows=np.arange(samples), uids=uids), **options)


def kept(selector: Selector, source: Source) -> list[int]:
    return selector.select(source).multiplicities.tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_sets_equal_slow_twins(counts: list[tuple[int, int, int]]) -> None:
    source = make_source(len(counts))
    a, b, c = (Given(column) for column in zip(*counts, strict=True))
    assert kept(And(selectors=[a, b, c]), source) == [min(row) for row in counts]
    assert kept(Or(selectors=[a, b, c]), source) == [max(row) for row in counts]
    assert kept(Then(stages=[a, b, c]), source) == [x * y * z for x, y, z in counts]
    assert kept(Minus(keep=a, remove=b), source) == [0 if y else x for x, y, _ in counts]


def test_then_shows_a_stage_only_what_is_left() -> None:
    source = make_source(10)
    first = Given(np.arange(10), threshold=4)  # leaves 6 of 10
    second = Given(-np.arange(10), fraction=0.3)  # 3 of the pool's 10
    choice = Then(stages=[first, second]).select(source)
    assert np.flatnonzero(choice.multiplicities).tolist() == [4, 5, 6]
    assert choice.scores is not None
    assert np.isnan(choice.scores[:4]).all()
    assert choice.scores[4:].tolist() == [-4, -5, -6, -7, -8, -9]
    of_what_is_left = Given(-np.arange(10), fraction=0.5, of="left")
    assert kept(Then(stages=[first, of_what_is_left]), source) == [0] * 4 + [1] * 3 + [0] * 3


def test_stages_may_be_compositions() -> None:
    source = make_source(10)
    first = Given(np.arange(10), threshold=4)
    for cls in (RankSum, Mix):
        ranked = cls(selectors=[Given(-np.arange(10))], fraction=0.3)  # 3 of the pool's 10
        inner = Then(stages=[Given(np.arange(10) % 2, threshold=1), ranked])  # of 5, 7 and 9
        assert np.flatnonzero(kept(Then(stages=[first, inner]), source)).tolist() == [5, 7, 9]
        assert np.flatnonzero(kept(Then(stages=[first, ranked]), source)).tolist() == [4, 5, 6]


def test_names_of_stages_are_no_parameters() -> None:
    stages = [Uniform(seed=1, fraction=0.5), Uniform(seed=2, fraction=0.5)]
    named = Then(stages={"first": stages[0], "second": stages[1]})
    assert named.stages == tuple(stages)
    assert describe(named) == describe(Then(stages=stages))


def test_then_stops_when_nothing_is_left() -> None:
    class Unreachable(Selector):
        def select(self, source: Source) -> Choice:
            raise AssertionError("nothing is left to decide about")

    assert kept(Then(stages=[Given([0, 0]), Unreachable()]), make_source(2)) == [0, 0]


def test_then_has_the_scores_of_its_last_stage_alone() -> None:
    source = make_source(3)
    assert (
        Then(stages=[Given([1, 1, 1]), And(selectors=[Given([1, 0, 1])])]).select(source).scores
        is None
    )


def rank_sum_slowly(
    scores: list[list[float]], uids: list[tuple[int, int]], weights: list[float]
) -> list[float]:
    """Count for each sample how many others it is better than; -inf says never."""
    n = len(uids)
    never = [any(column[i] == -math.inf for column in scores) for i in range(n)]
    scored = [i for i in range(n) if not any(math.isnan(column[i]) for column in scores)]
    scored = [i for i in scored if not never[i]]
    total = [-math.inf if never[i] else math.nan for i in range(n)]
    for i in scored:
        total[i] = 0.0
        for column, weight in zip(scores, weights, strict=True):
            worse = [
                j
                for j in scored
                if column[j] < column[i] or (column[j] == column[i] and uids[j] > uids[i])
            ]
            total[i] += weight * len(worse)
    return total


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), st.integers(0, 99))
def test_rank_sum_equals_slow_twin(rows: list[tuple[float, float]], seed: int) -> None:
    source = make_source(len(rows), seed)
    scores = [list(column) for column in zip(*rows, strict=True)]
    uids = [(int(high), int(low)) for high, low in source.uids]
    expected = rank_sum_slowly(scores, uids, [1.0, 0.5])
    got = rank_sum([np.array(column) for column in scores], source.uids, [1.0, 0.5])
    np.testing.assert_array_equal(got, expected)


def test_ordinal_ranks_of_equal_scores_prefer_small_uids() -> None:
    uids = np.array([[1, 2**64 - 1], [0, 5], [1, 0]], dtype=np.uint64)
    assert ordinal_ranks(np.zeros(3), uids).tolist() == [0, 2, 1]
    assert ordinal_ranks(np.zeros(0), uids[:0]).tolist() == []


def test_rank_sum_decides_before_it_rounds() -> None:
    # 2^24 + 1 is no float32: rounded, the two best would be equal and the smaller uid would win
    selector = RankSum(
        selectors=[Given([0, 1, 2]), Given([0, 2, 1])], weights=[2.0**24, 2.0**24 - 1], fraction=0.4
    )
    uids = np.array([[0, 0], [0, 1], [0, 2]], dtype=np.uint64)
    choice = selector.select(MemorySource(Chunk(rows=np.arange(3), uids=uids)))
    assert choice.multiplicities.tolist() == [0, 0, 1]
    assert choice.scores is not None
    assert choice.scores.dtype == np.float32


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), st.integers(0, 99))
def test_mix_equals_slow_twin(rows: list[tuple[float, float]], seed: int) -> None:
    weights = [0.5, -2.0]
    scores = [np.array(column, dtype=np.float32) for column in zip(*rows, strict=True)]
    got = mix_scores(scores, weights)
    scored = [row for row in rows if all(math.isfinite(value) for value in row)]
    expected = []
    for row in rows:
        if -math.inf in row:
            expected.append(-math.inf)
            continue
        if any(map(math.isnan, row)):
            expected.append(math.nan)
            continue
        if math.inf in row:  # the second score counts against a sample
            expected.append(-math.inf if row[1] == math.inf else math.inf)
            continue
        total = 0.0
        for place, weight in enumerate(weights):
            values = [other[place] for other in scored]
            mean = math.fsum(values) / len(values)
            spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
            total += weight * (row[place] - mean) / spread if len(set(values)) > 1 else 0.0
        expected.append(total)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    shuffle = np.random.default_rng(seed).permutation(len(rows))
    assert np.array_equal(
        mix_scores([column[shuffle] for column in scores], weights), got[shuffle], equal_nan=True
    )


def test_combined_scores_ignore_the_rules_of_their_selectors() -> None:
    source = make_source(6)
    for cls in (RankSum, Mix):
        selector = cls(
            selectors=[Given(np.arange(6), threshold=99), Given(np.arange(6), fraction=0.1)],
            fraction=0.5,
        )
        assert kept(selector, source) == [0, 0, 0, 1, 1, 1]


def test_union_has_every_input_once() -> None:
    need = union([ClipScore(features="l14", fraction=1), BasicFilter(), Files(), Files()])
    assert need.features == ("l14_img", "l14_txt", "b32_img")
    assert need.captions
    assert need.sizes
    assert need.column is None
    assert need.files == (FeatureFile(path="a.npz"),)


def test_union_names_a_single_column_only() -> None:
    one, other = (External(path=None, column=name, fraction=1) for name in ("a", "b"))
    assert union([one, one]).column == one.column
    assert union([one, other]).column is None


def test_all_compositions_tell_what_they_read() -> None:
    score = ClipScore(features="l14", fraction=1)
    for selector in (
        Then(stages=[score]),
        And(selectors=[score]),
        Or(selectors=[score]),
        Minus(keep=score, remove=score),
        RankSum(selectors=[score], fraction=0.5),
        Mix(selectors=[score], fraction=0.5),
    ):
        assert selector.requires == score.requires


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Then(stages=[]), "stages must name at least one selector"),
        (lambda: Or(selectors={}), "selectors must name at least one selector"),
        (lambda: And(selectors={"a": 1}), r"selectors.a must be a Selector. Got int"),
        (lambda: Minus(keep=Given([1]), remove=1), r"remove must be a Selector. Got int"),  # type: ignore[arg-type]
        (lambda: And(selectors=[1]), r"selectors.0 must be a Selector. Got int"),
        (
            lambda: RankSum(selectors=[Then(stages=[Given([1])])], fraction=1),
            r"selectors.0 must be a ScoreSelector. Got Then",
        ),
        (
            lambda: Mix(selectors=[Given([1])], weights=[1, 2], fraction=1),
            "one number for each of 1 selectors. Got 2",
        ),
        (
            lambda: Mix(selectors=[Given([1])], weights=[math.nan], fraction=1),
            "weights must be a finite number",
        ),
        (lambda: Mix(selectors=[Given([1])]), "Mix needs exactly one of fraction"),
    ],
)
def test_wrong_parameters_are_named(make: Callable[[], Selector], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


FACTORIES: dict[str, Callable[[], Selector]] = {
    "then": lambda: Then(
        stages=[ClipScore(features="l14", fraction=0.5), Uniform(seed=3, fraction=0.3)]
    ),
    "and": lambda: And(selectors=[Uniform(seed=1, fraction=0.6), Uniform(seed=2, fraction=0.6)]),
    "or": lambda: Or(selectors=[Uniform(seed=1, fraction=0.2), External(path="a.npy")]),
    "minus": lambda: Minus(
        keep=ClipScore(features="l14", fraction=0.5), remove=Uniform(seed=2, fraction=0.2)
    ),
    "rank_sum": lambda: RankSum(
        selectors=[ClipScore(features="l14", fraction=1), Uniform(seed=3, fraction=1)],
        rule=DataCompFraction(0.2),
    ),
    "mix": lambda: Mix(
        selectors=[ClipScore(features="l14", fraction=1), Uniform(seed=3, fraction=1)],
        weights=[0.7, 0.3],
        fraction=0.2,
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_contract(name: str) -> None:
    check_selector(FACTORIES[name])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree(run_on_ranks: Callable[..., list[Any]], size: int) -> None:
    generator = np.random.default_rng(5)
    chunk = Chunk(
        rows=np.arange(500),
        uids=generator.integers(0, 2**63, (500, 2)).astype(np.uint64),
        features={
            key: torch.from_numpy(generator.standard_normal((500, 8)).astype(np.float16))
            for key in ("l14_img", "l14_txt")
        },
        column=generator.integers(0, 3, 500).astype(np.float64),
    )
    for make in FACTORIES.values():

        def select(ranks: Any, make: Any = make) -> list[int]:
            return kept(make(), MemorySource(chunk, part_samples=70, ranks=ranks))

        alone = run_on_ranks(1, select)[0]
        assert run_on_ranks(size, select) == [alone] * size


@pytest.mark.testbed
@pytest.mark.parametrize(("second", "scores"), [("normsim2_0.2", "p2"), ("normsiminf_0.2", "inf")])
def test_two_stages_equal_the_authors_driver(
    reference: Reference,
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
    second: str,
    scores: str,
) -> None:
    driver, first = reference("twostage_l14"), reference("negcliploss_sh4_B2048_K3")
    assert np.array_equal(driver["perms"], first["perms"])  # the same scores in both files
    selector = Then(
        stages=[
            Given(first["score"], fraction=0.3),
            Given(reference("normsim_l14")[scores], fraction=0.2),
        ]
    )
    answer = selector.select(reference_source(reference("inputs_l14"), "l14"))
    conformance(
        f"then: negCLIPLoss 30 %, NormSim {scores} 20 %, of the authors' scores",
        kept=np.flatnonzero(answer.multiplicities),
        expected_kept=driver[f"ncl0.3_{second}"],
    )


@pytest.mark.testbed
def test_clip_score_then_vas_equals_the_authors_driver(
    reference: Reference,
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
) -> None:
    inputs = reference("inputs_l14")
    selector = Then(
        stages=[
            External(path=None, column="clip_l14_similarity_score", fraction=0.45),
            Given(reference("vas_l14")["vas_img"], fraction=0.3),
        ]
    )
    answer = selector.select(reference_source(inputs, "l14"))
    conformance(
        "then: CLIP score 45 %, VAS 30 %, of the authors' scores",
        kept=np.flatnonzero(answer.multiplicities),
        expected_kept=reference("twostage_l14")["vas_f0.45_fvas0.3"],
    )


def test_each_score_has_a_weight() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        mix_scores([np.zeros(2), np.ones(2)], [1.0])
