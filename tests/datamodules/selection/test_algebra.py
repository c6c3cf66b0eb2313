"""Set algebra of selections against a slow twin of counters, and samples against their law."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from siftclip.datamodules.selection.algebra import CountedUids, Operation, combine, sample
from siftclip.errors import InputError, ParameterError

HALF = st.sampled_from([0, 1, 2, 2**63, 2**64 - 1])  # few, so that halves and uids are shared
COUNTS = st.dictionaries(st.tuples(HALF, HALF), st.integers(1, 4), max_size=15)
Pair = tuple[int, int]


def counted(counts: dict[Pair, int]) -> CountedUids:
    ordered = dict(sorted(counts.items()))
    uids = np.array(list(ordered), dtype=np.uint64).reshape(-1, 2)
    return CountedUids(uids, np.array(list(ordered.values()), dtype=np.int64))


def as_counter(selection: CountedUids) -> Counter[Pair]:
    assert (selection.uids.dtype, selection.multiplicities.dtype) == (np.uint64, np.int64)
    pairs = [(high, low) for high, low in selection.uids.tolist()]
    assert pairs == sorted(set(pairs))  # distinct, and ascending
    assert (selection.multiplicities >= 1).all()
    return Counter(dict(zip(pairs, selection.multiplicities.tolist(), strict=True)))


def twin(operation: Operation, first: Counter[Pair], second: Counter[Pair]) -> Counter[Pair]:
    """The same, sample by sample."""
    if operation == "union":
        return first | second
    if operation == "intersection":
        return first & second
    return Counter({pair: count for pair, count in first.items() if pair not in second})


@pytest.mark.parametrize("operation", get_args(Operation))
@given(first=COUNTS, second=COUNTS, block=st.integers(1, 6))
def test_operations_are_those_of_counters(
    operation: Operation, first: dict[Pair, int], second: dict[Pair, int], block: int
) -> None:
    answer = combine(operation, counted(first), counted(second), block_samples=block)
    assert as_counter(answer) == twin(operation, Counter(first), Counter(second))


@given(first=COUNTS, second=COUNTS, third=COUNTS)
def test_laws_of_sets_hold(
    first: dict[Pair, int], second: dict[Pair, int], third: dict[Pair, int]
) -> None:
    a, b, c = map(counted, (first, second, third))

    def equal(one: CountedUids, other: CountedUids) -> bool:
        return as_counter(one) == as_counter(other)

    for operation in ("union", "intersection"):
        assert equal(combine(operation, a, b), combine(operation, b, a))
        left = combine(operation, combine(operation, a, b), c)
        assert equal(left, combine(operation, a, combine(operation, b, c)))
        assert equal(combine(operation, a, a), a)
    without = combine("difference", a, b)
    assert not len(combine("intersection", without, b).uids)
    # what is taken away and what stays are all samples of the first, each as often as it was
    both = as_counter(combine("intersection", a, b))
    assert set(as_counter(without)) | set(both) == set(first)


def test_many_uids_in_blocks_are_those_of_one() -> None:
    generator = np.random.default_rng(0)

    def selection(count: int) -> CountedUids:
        uids = np.unique(generator.integers(0, 3000, (count, 2), dtype=np.uint64), axis=0)
        return CountedUids(uids, generator.integers(1, 5, len(uids)))

    a, b = selection(20_000), selection(30_000)
    for operation in get_args(Operation):
        whole = combine(operation, a, b)
        for block in (7, 1000, 10**6):
            parts = combine(operation, a, b, block_samples=block)
            assert all(np.array_equal(x, y) for x, y in zip(whole, parts, strict=True))


# ---- samples ------------------------------------------------------------------------------------
@given(counts=COUNTS.filter(bool), samples=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_a_sample_has_as_many_draws_and_no_strangers(
    counts: dict[Pair, int], samples: int, seed: int
) -> None:
    drawn = as_counter(sample(counted(counts), samples, seed=seed))
    assert drawn.total() == samples
    assert set(drawn) <= set(counts)


def test_a_sample_does_not_depend_on_blocks() -> None:
    selection = counted({(3, number): 1 + number % 3 for number in range(50)})
    whole = as_counter(sample(selection, 1000, seed=5))
    for block in (1, 7, 999, 1000, 5000):
        assert as_counter(sample(selection, 1000, seed=5, block_samples=block)) == whole
    assert as_counter(sample(selection, 1000, seed=6)) != whole


def test_fewer_draws_are_the_first_of_more() -> None:
    selection = counted({(3, number): 1 for number in range(50)})
    few, more = (as_counter(sample(selection, n, seed=5)) for n in (100, 101))
    assert (more - few).total() == 1
    assert not few - more


def test_draws_follow_the_multiplicities() -> None:
    """A test of fit to the multinomial law, whose p value is that of this seed alone."""
    weights = [1, 2, 3, 4, 5] * 8
    selection = counted({(9, number): weight for number, weight in enumerate(weights)})
    draws = 60_000
    drawn = sample(selection, draws, seed=1).multiplicities
    expected = draws * np.array(weights) / sum(weights)
    assert stats.chisquare(drawn, expected).pvalue > 0.01


def test_seeds_draw_independently() -> None:
    selection = counted({(9, number): 1 for number in range(2000)})
    chosen = [
        {tuple(uid) for uid in sample(selection, 1386, seed=seed).uids.tolist()} for seed in (0, 1)
    ]
    assert all(abs(len(each) - 1000) < 60 for each in chosen)  # 2000 (1 - exp(-1386 / 2000))
    assert abs(len(chosen[0] & chosen[1]) - 500) < 60


def mixed(value: int) -> int:
    """SplitMix64, as its authors have it, on Python's numbers."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_draws_are_those_of_a_slow_twin(seed: int) -> None:
    """A change would make other samples under a seed that somebody has published."""
    counts = {(0, number): 1 + number % 4 for number in range(23)}
    places = [pair for pair, count in counts.items() for _ in range(count)]
    start = mixed(seed ^ 0x737562736574)
    numbers = [mixed((start + 0x9E3779B97F4A7C15 * draw) % 2**64) for draw in range(500)]
    expected = Counter(places[(number >> 11) * len(places) >> 53] for number in numbers)
    assert as_counter(sample(counted(counts), 500, seed=seed)) == expected


def test_nonsense_is_refused() -> None:
    selection = counted({(0, 1): 1})
    with pytest.raises(ParameterError, match="samples must be"):
        sample(selection, 0, seed=0)
    with pytest.raises(ParameterError, match="seed must be"):
        sample(selection, 1, seed=-1)
    with pytest.raises(InputError, match="nothing to draw"):
        sample(counted({}), 1, seed=0)
    with pytest.raises(ParameterError, match=r"fewer than 2\^53"):
        sample(counted({(0, 1): 2**53}), 1, seed=0)
