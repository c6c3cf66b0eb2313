"""What diagnostics say of a choice, against loops and brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import InputError
from siftclip.trainer.online.diagnostics import (
    Diagnostics,
    SeenRows,
    cluster_entropy,
    kind_shares,
    offline_overlap,
    read_kinds,
    score_quantiles,
)

NAN = math.nan


def bools(text: str) -> np.ndarray:
    return np.array([letter == "x" for letter in text])


def test_quantiles_of_chosen_and_rejected() -> None:
    scores = np.array([0, 1, 2, 3, 4, 10, NAN, NAN, 20], dtype=np.float32)
    found = score_quantiles(scores, bools("xxxxx-x--"))
    assert found == pytest.approx(
        {
            "score_chosen_q10": 0.4,
            "score_chosen_q50": 2.0,
            "score_chosen_q90": 3.6,
            "score_rejected_q10": 11.0,
            "score_rejected_q50": 15.0,
            "score_rejected_q90": 19.0,
        }
    )


def test_quantiles_are_of_finite_scores() -> None:
    scores = np.array([0.1, np.inf, -np.inf, np.nan, 0.3, 0.5, -np.inf])
    kept = np.array([1, 1, 0, 0, 1, 0, 0], dtype=bool)
    finite = score_quantiles(np.array([0.1, 0.3, 0.5]), np.array([True, True, False]))
    assert score_quantiles(scores, kept) == finite
    assert len(finite) == 6
    assert score_quantiles(scores[1:3], np.array([True, False])) == {}


@pytest.mark.parametrize("kept", ["xxx", "---", "xx-"])
def test_no_quantiles_where_there_are_no_scores(kept: str) -> None:
    found = score_quantiles(np.array([1, 1, NAN], dtype=np.float32), bools(kept))
    sides = {name.split("_")[1] for name in found}
    assert sides == ({"rejected"} if kept == "---" else {"chosen"})
    assert set(found.values()) == {1.0}
    assert score_quantiles(np.full(3, NAN, dtype=np.float32), bools(kept)) == {}


def slow_overlap(offline: list[float], kept: np.ndarray) -> float:
    """The mean over all orders of the samples of the overlap with a stable sort's first k."""
    k, shares = int(kept.sum()), []
    for order in itertools.permutations(range(len(offline))):
        scored = [i for i in order if not math.isnan(offline[i])]
        blank = [i for i in order if math.isnan(offline[i])]
        ranked = sorted(scored, key=lambda i: -offline[i]) + blank
        shares.append(sum(bool(kept[i]) for i in ranked[:k]) / k)
    return sum(shares) / len(shares)


@given(
    st.lists(
        st.tuples(st.sampled_from([-math.inf, 0.0, 1.0, 2.0, NAN]), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
def test_overlap_is_the_mean_over_orders_of_ties(samples: list[tuple[float, bool]]) -> None:
    offline, kept = [score for score, _ in samples], np.array([flag for _, flag in samples])
    found = offline_overlap(np.array(offline, dtype=np.float32), kept)
    if not kept.any() or all(math.isnan(score) for score in offline):
        assert found is None
    else:
        assert found == pytest.approx(slow_overlap(offline, kept))


def test_overlap_of_the_best_and_of_the_worst() -> None:
    offline = np.arange(10, dtype=np.float32)
    assert offline_overlap(offline, bools("-------xxx")) == 1.0
    assert offline_overlap(offline, bools("xxx-------")) == 0.0
    assert offline_overlap(np.ones(10, dtype=np.float32), bools("xxx-------")) == pytest.approx(0.3)


def test_cluster_entropy() -> None:
    assert cluster_entropy(np.array([0, 1, 2, 3]), 4) == pytest.approx(1.0)
    assert cluster_entropy(np.array([2, 2, 2, -1]), 4) == 0.0
    assert cluster_entropy(np.array([0, 1, -1, -1]), 4) == pytest.approx(0.5)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(8)
    assert cluster_entropy(np.array([5, 7, 5, 5]), 8) == pytest.approx(expected)
    assert cluster_entropy(np.array([-1, -1]), 4) is None
    assert cluster_entropy(np.array([0, 0]), 1) is None
    assert cluster_entropy(np.array([], dtype=np.int64), 4) is None


def test_kind_shares_count_the_unknown_as_samples() -> None:
    kinds = np.array([0, 2, 2, -1], dtype=np.int16)
    assert kind_shares(kinds, 3).tolist() == [0.25, 0.0, 0.5]


@given(st.integers(1, 40), st.lists(st.lists(st.integers(0, 39), max_size=12), max_size=6))
def test_seen_rows_are_a_set(samples: int, steps: list[list[int]]) -> None:
    seen, expected = SeenRows(samples), set[int]()
    for step in steps:
        rows = [row % samples for row in step]
        seen.add(np.array(rows, dtype=np.int64))
        expected.update(rows)
        assert seen.count == len(expected)
    state = seen.state_dict()
    assert state["seen"].dtype == torch.uint8
    assert state["seen"].shape == (math.ceil(samples / 8),)
    again = SeenRows(samples)
    again.load_state_dict(state)
    assert again.count == len(expected)
    again.add(np.arange(samples))
    assert again.count == samples
    assert seen.count == len(expected)  # the state is a copy
    seen.add(np.array(sorted(expected), dtype=np.int64))
    assert seen.count == len(expected)


def test_a_record_of_another_pool_is_refused() -> None:
    with pytest.raises(InputError, match=r"about 16 samples, the pool has 17\. Resume with"):
        SeenRows(17).load_state_dict(SeenRows(16).state_dict())


ROWS = np.array([3, 0, 5, 4])
SCORES = np.array([0.5, NAN, 2.0, 1.0], dtype=np.float32)


def full() -> Diagnostics:
    return Diagnostics(
        6,
        offline=np.array([4, 9, 9, 1, 2, NAN], dtype=np.float32),
        clusters=np.array([7, 9, 10**12, 7, 9, -1]),
        kinds=np.array([0, 0, 1, 1, -1, 0], dtype=np.int16),
        kind_names=("clean", "noise"),
    )


@pytest.mark.parametrize("kept", [bools("x-x-"), np.array([1, 0, 1, 0])])
def test_a_step_in_numbers(kept: np.ndarray) -> None:
    diagnostics = full()
    diagnostics.saw(np.array([1, 1, 2]))
    assert diagnostics.describe(SCORES, kept, ROWS) == pytest.approx(
        {
            "online/score_chosen_q10": 0.65,
            "online/score_chosen_q50": 1.25,
            "online/score_chosen_q90": 1.85,
            "online/score_rejected_q10": 1.0,
            "online/score_rejected_q50": 1.0,
            "online/score_rejected_q90": 1.0,
            "online/offline_overlap": 0.0,
            "online/cluster_entropy": 0.0,
            "online/unique_samples": 2.0,
            "online/share_clean": 0.5,
            "online/share_noise": 0.5,
            "online/share_clean_offered": 0.5,
            "online/share_noise_offered": 0.25,
        }
    )


def test_clusters_are_counted_over_the_pool() -> None:
    found = full().describe(None, bools("x--x"), ROWS)
    assert found["online/cluster_entropy"] == pytest.approx(math.log(2) / math.log(3))
    assert found["online/offline_overlap"] == pytest.approx(0.5)
    assert not any("score" in name for name in found)


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert Diagnostics(6).describe(None, bools("xx--"), ROWS) == {"online/unique_samples": 0.0}
    found = full().describe(SCORES, bools("----"), ROWS)
    assert set(found) == {"online/unique_samples"} | {
        f"online/score_rejected_q{percent}" for percent in (10, 50, 90)
    }
    assert all(
        type(value) is float for value in full().describe(SCORES, bools("xx-x"), ROWS).values()
    )


def test_state_goes_on() -> None:
    first, second = full(), full()
    first.saw(ROWS)
    second.load_state_dict(first.state_dict())
    second.saw(np.array([0, 1]))
    assert second.describe(None, bools("x---"), ROWS)["online/unique_samples"] == 5.0


def test_arrays_of_another_length_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"clusters has the shape \(5,\), not \(6,\)"):
        Diagnostics(6, clusters=np.zeros(5, dtype=np.int64))


@pytest.fixture
def pool(make_samples: Any, write_pool: Callable[..., Path], load_pool: Any) -> Pool:
    opened: Pool = load_pool(write_pool(make_samples(6)))
    return opened


def write_truth(path: Path, pool: Pool, **columns: Any) -> Path:
    """Truth for the rows 4, 1, 0, and one line without a uid, one without a kind, one too many."""
    uids = [f"{high:016x}{low:016x}" for high, low in pool.uids[[4, 1, 0, 3]].tolist()]
    names = ["noise", "clean", "clean", None, "noise", "other"]
    lines = {"uid": [*uids, "no uid", "f" * 32], "kind": names, **columns}
    pd.DataFrame(lines).to_parquet(path)
    return path


def test_kinds_are_read_by_uid(pool: Pool, tmp_path: Path) -> None:
    kinds, names = read_kinds(pool, write_truth(tmp_path / "truth.parquet", pool))
    assert names == ("clean", "noise", "other")
    assert kinds.dtype == np.int16
    assert kinds.tolist() == [0, 0, -1, -1, 1, -1]


def test_truth_files_that_say_nothing(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "truth.parquet"
    pd.DataFrame({"uid": ["f" * 32], "label": ["noise"]}).to_parquet(path)
    with pytest.raises(InputError, match=r"must have a column 'kind'. It has \['uid', 'label'\]"):
        read_kinds(pool, path)
    pd.DataFrame({"uid": ["f" * 32], "kind": ["noise"]}).to_parquet(path)
    with pytest.raises(InputError, match="names none of the 6 samples of the pool"):
        read_kinds(pool, path)
    many = [f"{number:032x}" for number in range(2**15)]
    pd.DataFrame({"uid": many, "kind": many}).to_parquet(path)
    with pytest.raises(InputError, match="32768 different values; at most 32767"):
        read_kinds(pool, path)
    with pytest.raises(InputError, match=r"missing\.parquet cannot be read: No such file"):
        read_kinds(pool, tmp_path / "missing.parquet")
