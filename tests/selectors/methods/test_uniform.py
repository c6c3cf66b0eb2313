"""Uniform random choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.hashing import mix64, uniform_score
from siftclip.selectors.core.base import Chunk
from siftclip.selectors.methods.uniform import Uniform

MASK = 2**64 - 1


def consecutive_uids(count: int) -> np.ndarray:
    """The worst case for a hash: all high halves equal, low halves 0, 1, 2, ..."""
    return np.stack([np.zeros(count), np.arange(count)], axis=1).astype(np.uint64)


def mix64_slowly(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_mix64_gives_the_published_numbers() -> None:
    # Java's SplittableRandom(0).nextLong(): the first outputs of SplitMix64 with seed 0
    increment = 0x9E3779B97F4A7C15
    states = np.array([0, increment, (2 * increment) & MASK], dtype=np.uint64)
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.integers(0, MASK))
def test_mix64_equals_slow_twin(value: int) -> None:
    assert int(mix64(np.array([value], dtype=np.uint64))[0]) == mix64_slowly(value)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_scores_are_uniform(seed: int) -> None:
    count, bins = 20_000, 100
    scores = uniform_score(consecutive_uids(count), seed)
    assert scores.dtype == np.float32
    assert scores.min() >= 0
    assert scores.max() < 1
    counts, _ = np.histogram(scores, bins=bins, range=(0, 1))
    chi_square = float(((counts - count / bins) ** 2 / (count / bins)).sum())
    # 99 degrees of freedom: mean 99, standard deviation 14.1; 99 + 4 * 14.1 = 155
    assert 50 < chi_square < 155
    # Kolmogorov-Smirnov: the 0.1 % point is 1.95 / sqrt(n)
    distance = np.abs(np.sort(scores) - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / np.sqrt(count)


def test_neighbouring_uids_and_seeds_are_independent() -> None:
    count = 20_000
    uids = consecutive_uids(count)
    first, second = uniform_score(uids, 0), uniform_score(uids, 1)
    limit = 4 / np.sqrt(count)
    assert abs(np.corrcoef(first, second)[0, 1]) < limit
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < limit
    assert abs(np.corrcoef(first, uniform_score(uids[:, ::-1], 0))[0, 1]) < limit


def test_score_depends_on_uid_and_seed_alone() -> None:
    uids = consecutive_uids(50)
    scores = uniform_score(uids, 3)
    shuffle = np.random.default_rng(0).permutation(50)
    assert np.array_equal(uniform_score(uids[shuffle], 3), scores[shuffle])
    chunk = Chunk(rows=np.arange(50)[::-1].copy(), uids=uids)
    assert np.array_equal(Uniform(seed=3, fraction=0.5).score(chunk).numpy(), scores)
    assert not np.array_equal(uniform_score(uids, 4), scores)


def test_each_half_of_the_uid_matters() -> None:
    uids = np.array([[1, 2], [2, 1], [1, 1], [2, 2]], dtype=np.uint64)
    assert len(set(uniform_score(uids, 0).tolist())) == 4


def test_same_samples_are_kept_in_a_larger_pool() -> None:
    uids = consecutive_uids(1000)
    rule = Uniform(seed=0, threshold=0.9).rule
    scores = uniform_score(uids, 0)
    assert np.array_equal(rule(scores, uids, 0)[:300], rule(scores[:300], uids[:300], 0))


@pytest.mark.parametrize("seed", [-1, 1.0, "1", True, None])
def test_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(InputError, match=r"seed must be an integer of at least 0"):
        Uniform(seed=seed, fraction=0.5)  # type: ignore[arg-type]  # what a YAML file may hold


def test_any_large_seed_is_taken() -> None:
    uids = consecutive_uids(8)
    assert not np.array_equal(uniform_score(uids, 2**64 + 1), uniform_score(uids, 0))
