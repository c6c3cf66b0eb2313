from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.eval.encoding.feature_cache import FeatureCache, SharedCache
from siftclip.ranks import OneRank, Ranks

MODEL = "a" * 64


def ids(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.uint64)


def rows(*numbers: int) -> np.ndarray:
    """Features that say whose they are."""
    return np.asarray([[n % 1000, 0.5, -1] for n in numbers], dtype=np.float32)


def test_what_was_added_is_found(tmp_path: Path) -> None:
    large = 2**64 - 7
    cache = FeatureCache(tmp_path)
    known, features = cache.find(ids(1, 2))
    assert known.tolist() == [False, False]
    assert features is None
    cache.add(ids(9, 3, large), rows(9, 3, large))
    cache.add(ids(5), rows(5))
    cache.add(ids(), np.zeros((0, 0), dtype=np.float32))
    later = FeatureCache(tmp_path)
    wanted = ids(4, large, 5, 0, 9, 9, 10, 3, 2**63)
    known, features = later.find(wanted)
    assert known.tolist() == [False, True, True, False, True, True, False, True, False]
    assert features is not None
    np.testing.assert_array_equal(features, rows(large, 5, 9, 9, 3))
    known, features = later.find(ids())
    assert features is not None
    assert (len(known), len(features)) == (0, 0)


def test_random_ids_against_a_dictionary(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    truth: dict[int, np.ndarray] = {}
    cache = FeatureCache(tmp_path)
    for _ in range(4):
        new = generator.integers(0, 200, 40).astype(np.uint64)
        values = rows(*new.tolist())
        cache.add(new, values)
        truth.update(zip(new.tolist(), values, strict=True))
    wanted = generator.integers(0, 220, 100).astype(np.uint64)
    known, features = FeatureCache(tmp_path).find(wanted)
    assert known.tolist() == [number in truth for number in wanted.tolist()]
    expected = [truth[number] for number in wanted.tolist() if number in truth]
    np.testing.assert_array_equal(features, expected)


def test_another_model_or_kind_finds_nothing(tmp_path: Path) -> None:
    def cache(model: str, kind: str) -> SharedCache:
        return SharedCache(tmp_path, model, kind, OneRank())

    cache(MODEL, "images").add(ids(1), rows(1))
    assert cache(MODEL, "images").known(ids(1, 2)).tolist() == [True, False]
    assert cache("b" * 64, "images").known(ids(1)).tolist() == [False]
    assert cache(MODEL, "classes").known(ids(1)).tolist() == [False]


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_get_what_the_first_has(
    size: int, tmp_path: Path, run_on_ranks: Callable[..., list[Any]]
) -> None:
    SharedCache(tmp_path, MODEL, "images", OneRank()).add(ids(1, 5), rows(1, 5))

    def ask(ranks: Ranks) -> tuple[list[bool], np.ndarray, tuple[int, ...]]:
        folder = tmp_path if ranks.rank == 0 else tmp_path / "not shared"
        cache = SharedCache(folder, MODEL, "images", ranks)
        known = cache.known(ids(1, 2, 5)).tolist()
        return known, cache.features(ids(5, 1)), cache.features(ids()).shape

    for known, features, nothing in run_on_ranks(size, ask):
        assert known == [True, False, True]
        np.testing.assert_array_equal(features, rows(5, 1))
        assert nothing == (0, 0)


def test_equal_sets_are_kept_once(tmp_path: Path) -> None:
    for _ in range(2):
        FeatureCache(tmp_path).add(ids(1, 2), rows(1, 2))
    assert len(list(tmp_path.rglob("*.npz"))) == 1


def test_a_damaged_file_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It stops no evaluation, least of all that of one rank of several."""
    cache = FeatureCache(tmp_path)
    cache.add(ids(1), rows(1))
    cache.add(ids(2), rows(2))
    (first, _) = sorted(cache.folder.glob("*.npz"))
    first.write_bytes(b"PK?")
    with caplog.at_level(logging.WARNING):
        known, _ = FeatureCache(tmp_path).find(ids(1, 2))
    assert known.sum() == 1
    assert "is not a readable npz" in caplog.text
    assert "passed over" in caplog.text


def test_arrays_of_another_kind_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FeatureCache(tmp_path).add(ids(1), rows(1))
    for number, (names, features) in enumerate(
        [
            (ids(2), rows(2)[:, :1]),
            (ids(3), rows(3).astype(np.float64)),
            (ids(4, 5), rows(4)),
            (ids(6).astype(np.int64), rows(6)),
            (np.uint64(7), np.float32(7)),
        ]
    ):
        np.savez(tmp_path / f"z{number}.npz", ids=names, features=features)
    with caplog.at_level(logging.WARNING):
        known, _ = FeatureCache(tmp_path).find(ids(1, 2, 3, 4, 5, 6, 7))
    assert known.tolist() == [True, *[False] * 6]
    assert caplog.text.count("passed over") == 5
