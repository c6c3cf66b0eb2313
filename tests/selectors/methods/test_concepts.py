"""Concept balancing, against loops that look at every sample at every choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import draw
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, ListColumn
from siftclip.selectors.core.sub_batch import SubBatch
from siftclip.selectors.methods.concepts import (
    ConceptBalance,
    choose_diverse,
    concept_targets,
    distinct_concepts,
)


def column(lists: list[list[int]]) -> ListColumn:
    sizes = [len(members) for members in lists]
    values = [value for members in lists for value in members]
    return ListColumn(np.array(values, np.int64), np.concatenate([[0], np.cumsum(sizes)]))


def make_uids(samples: int, seed: int = 0) -> np.ndarray:
    # few high halves, so that the low ones matter
    return np.random.default_rng(seed).integers(0, 5, (samples, 2)).astype(np.uint64) + np.stack(
        [np.zeros(samples, np.uint64), 10 * np.arange(samples, dtype=np.uint64)], axis=1
    )


def source_of(lists: list[list[int]], *, seed: int = 0, **options: Any) -> MemorySource:
    chunk = Chunk(rows=np.arange(len(lists)), uids=make_uids(len(lists), seed), lists=column(lists))
    return MemorySource(chunk, **options)


def random_lists(samples: int, concepts: int, mean: float, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, concepts + 1)
    return [
        generator.choice(concepts, size=generator.poisson(mean), p=weights / weights.sum()).tolist()
        for _ in range(samples)
    ]


def slow_diverse(lists: list[list[int]], uids: np.ndarray, quota: int, groups: int) -> list[int]:
    """The samples in the order in which they are chosen."""
    sets = [set(members) for members in lists]
    names = sorted(set().union(*sets))
    frequency = {c: sum(c in s for s in sets) for c in names}
    if names:
        targets = concept_targets(
            np.array([frequency[c] for c in names]), len(lists), quota * groups
        )
        target = dict(zip(names, targets.tolist(), strict=True))
    counts = dict.fromkeys(names, 0)
    chosen: list[int] = []
    size = len(lists) // groups
    for _ in range(quota * groups):
        best = None
        for i, members in enumerate(sets):
            mine = [j for j in chosen if j // size == i // size]
            if i in chosen or len(mine) == quota:
                continue
            gain = -1.0
            if members:
                gain = math.fsum(
                    (target[c] - counts[c]) / target[c] + 1 / frequency[c]
                    for c in members
                    if counts[c] < target[c]
                ) / len(members)
            key = (-gain, *uids[i].tolist(), i)
            if best is None or key < best:
                best = key
        assert best is not None
        chosen.append(best[-1])
        for c in sets[best[-1]]:
            counts[c] += 1
    return chosen


concept_lists = st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=24)


@given(lists=concept_lists, groups=st.sampled_from([1, 2, 4]), data=st.data())
def test_diverse_equals_the_loop(lists: list[list[int]], groups: int, data: st.DataObject) -> None:
    lists = lists * groups  # so that the groups are equal, with many ties
    quota = data.draw(st.integers(0, len(lists) // groups))
    uids = make_uids(len(lists))
    kept, gains = choose_diverse(
        distinct_concepts(column(lists)), uids, SubBatch(samples=quota, groups=groups)
    )
    assert np.flatnonzero(kept).tolist() == sorted(slow_diverse(lists, uids, quota, groups))
    assert kept.reshape(groups, -1).sum(1).tolist() == [quota] * groups
    assert np.isnan(gains).tolist() == [not members for members in lists]


@pytest.mark.parametrize("stored", [1, 128])
@pytest.mark.parametrize(
    ("concepts", "mean"), [(40, 3.0), (5, 1.0), (300, 5.0), (3, 4.0), (1, 0.7)]
)
def test_diverse_equals_the_loop_however_few_gains_are_stored(
    concepts: int, mean: float, stored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siftclip.selectors.methods.concepts._STORED", stored)
    lists = random_lists(120, concepts, mean, seed=1)
    uids = make_uids(120, seed=2)
    kept, _ = choose_diverse(distinct_concepts(column(lists)), uids, SubBatch(samples=9, groups=4))
    assert np.flatnonzero(kept).tolist() == sorted(slow_diverse(lists, uids, 9, 4))


def test_gains_are_those_at_the_choice_and_of_what_is_left_at_the_end() -> None:
    lists = [[0], [0], [0], [1], []]
    uids = np.array([[0, i] for i in range(5)], dtype=np.uint64)
    kept, gains = choose_diverse(column(lists), uids, SubBatch(samples=3))
    # F = 3, 1; 3 of 5 samples have 4 * 3 // 5 = 2 concepts, one each: targets 1 and 1
    assert kept.tolist() == [1, 1, 0, 1, 0]  # 3 first, then 0, then 1 by its uid
    np.testing.assert_allclose(gains, [4 / 3, 0, 0, 2, np.nan], rtol=1e-6)


def test_diversity_covers_more_concepts_than_chance() -> None:
    lists = random_lists(2000, 400, 3.0, seed=3)
    kept, _ = choose_diverse(
        distinct_concepts(column(lists)), make_uids(2000), SubBatch(samples=200)
    )

    def coverage(rows: np.ndarray) -> int:
        return len({c for row in rows for c in lists[row]})

    chance = np.random.default_rng(0).permutation(2000)[:200]
    assert coverage(np.flatnonzero(kept)) > 1.3 * coverage(chance)


def test_one_concept_in_all_samples_still_fills_the_quota() -> None:
    """Where the release stops at ten."""
    choice = draw(
        ConceptBalance(path=None, column="c", fraction=1.0),
        source_of([[7]] * 200),
        SubBatch(samples=40, groups=2),
    )
    assert choice.multiplicities.reshape(2, -1).sum(1).tolist() == [40, 40]


@given(lists=concept_lists)
def test_distinct_concepts(lists: list[list[int]]) -> None:
    values, offsets = distinct_concepts(column(lists))
    assert len(offsets) == len(lists) + 1
    for i, members in enumerate(lists):
        assert values[offsets[i] : offsets[i + 1]].tolist() == sorted(set(members))


@given(
    frequencies=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    samples=st.integers(50, 100),
    data=st.data(),
)
def test_targets_are_equal_but_for_rare_concepts(
    frequencies: list[int], samples: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(0, samples))
    sizes = np.array(frequencies)
    targets = concept_targets(sizes, samples, chosen)
    concepts = int(sizes.sum()) * chosen // samples
    assert (targets >= 1).all()
    assert (targets <= sizes).all()
    assert targets.sum() <= max(concepts, len(sizes)) + len(sizes)
    if concepts >= len(sizes):
        assert targets.sum() == concepts
    unlimited = targets[targets < sizes]
    assert len(unlimited) == 0 or targets.max() - unlimited.min() <= 1


@pytest.mark.parametrize("mode", ["diversity", "frequency"])
def test_samples_without_concepts_come_last(mode: str) -> None:
    lists = [[], [3], [], [3, 4], [], [], [], [4]]
    selector = ConceptBalance(path=None, column="c", fraction=0.5, mode=mode)
    choice = draw(selector, source_of(lists), SubBatch(samples=2, groups=2))
    assert choice.multiplicities[:4].tolist() == [0, 1, 0, 1]
    assert choice.multiplicities[7] == 1
    assert choice.multiplicities[4:].sum() == 2
    assert choice.scores is not None
    assert np.isnan(choice.scores).tolist() == [not members for members in lists]
    chosen = selector.select(source_of(lists)).multiplicities
    assert chosen.sum() == 4
    assert chosen[[1, 3, 7]].tolist() == [1, 1, 1]


def test_frequency_counts_distinct_concepts() -> None:
    lists = [[1, 1, 1], [1, 2], [3], [4, 5, 6], [9], [9, 9, 8, 8], [2, 3], [1]]
    selector = ConceptBalance(path=None, column="c", fraction=0.5, mode="frequency")
    choice = draw(selector, source_of(lists), SubBatch(samples=2, groups=2))
    assert choice.multiplicities.tolist() == [0, 1, 0, 1, 0, 1, 1, 0]
    assert choice.scores is not None
    assert choice.scores.tolist() == [1, 2, 1, 3, 1, 2, 2, 1]
    assert choice.scores.dtype == np.float32
    counts = np.zeros(8)
    for seed in range(200):
        sub_batch = SubBatch(samples=1, groups=2, temperature=0.5, seed=seed)
        counts += draw(selector, source_of(lists), sub_batch).multiplicities
    # softmax of (1, 2, 1, 3) / 0.5
    assert abs(counts[3] / 200 - 0.85) < 0.1
    assert counts[0] > 0


@pytest.mark.parametrize("mode", ["diversity", "frequency"])
def test_ranks_choose_alike(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]], mode: str
) -> None:
    lists = random_lists(64, 12, 2.0, seed=5)

    def decide(ranks: Ranks) -> list[int]:
        selector = ConceptBalance(path=None, column="c", fraction=0.25, mode=mode)
        source = source_of(lists, ranks=ranks, part_samples=16)
        choice = draw(selector, source, SubBatch(samples=4, groups=4))
        return [*choice.multiplicities.tolist(), *selector.select(source).multiplicities.tolist()]

    answers = [answer for size in (1, 2, 4) for answer in run_on_ranks(size, decide)]
    assert all(answer == answers[0] for answer in answers)


@given(seed=st.integers(0, 1000), mode=st.sampled_from(["diversity", "frequency"]))
def test_order_of_samples_does_not_matter(seed: int, mode: str) -> None:
    lists = random_lists(30, 8, 2.0, seed)
    uids = make_uids(30, seed)
    order = np.random.default_rng(seed).permutation(30)
    selector = ConceptBalance(path=None, column="c", fraction=0.3, mode=mode)

    def kept(index: np.ndarray) -> set[tuple[int, ...]]:
        chunk = Chunk(rows=np.arange(30), uids=uids[index], lists=column(lists).take(index))
        found = selector.select(MemorySource(chunk)).multiplicities
        assert found.sum() == 9
        return {tuple(uid) for uid in uids[index][found > 0].tolist()}

    assert kept(np.arange(30)) == kept(order)


def test_fraction_is_of_the_pool_or_of_what_is_left() -> None:
    source = source_of([[1], [2], [1, 2]])
    for of, expected in (("pool", [1, 1, 0]), ("left", [1, 0, 0])):
        selector = ConceptBalance(path=None, column="c", fraction=0.4, of=of)
        counts = [
            int(selector.select(source.restrict(np.arange(samples))).multiplicities.sum())
            for samples in (3, 1, 0)
        ]
        assert counts == expected


def test_wrong_parameters() -> None:
    good: dict[str, Any] = {"path": None, "column": "c", "fraction": 0.2}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"path": "a.npy"}, r"path must end in .parquet, or be null. Got 'a.npy'"),
        ({"mode": "dm"}, r"mode must be one of diversity, frequency. Got 'dm'"),
        ({"fraction": 0}, r"fraction must be a number in the range"),
        ({"of": "all"}, r"of must be one of pool, left"),
    ]
    for parameters, message in wrong:
        with pytest.raises(InputError, match=message):
            ConceptBalance(**{**good, **parameters})
    with pytest.raises(InputError, match=r"has no temperature. Got 1.0; set it to null"):
        draw(ConceptBalance(**good), source_of([[1]]), SubBatch(samples=1, temperature=1.0))
