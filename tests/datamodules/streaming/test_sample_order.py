"""The order of samples is a pure function of (seed, rows, step), and exact in what it shows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from siftclip.datamodules.streaming.datamodule import OrderSampler
from siftclip.datamodules.streaming.order import (
    MAX_ROUNDS,
    SampleOrder,
    Substitutes,
    check_chosen,
    derive_generator,
    derive_seeds,
    rank_slice,
    shuffle,
)
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.errors import InputError
from siftclip.hashing import mix64

MULTIPLICITIES = st.lists(st.integers(1, 4), min_size=1, max_size=25)
SEEDS = st.integers(0, 2**40)


def make_rows(multiplicities: list[int]) -> np.ndarray:
    """Rows 3, 6, 9, ..., repeated."""
    rows = 3 * np.arange(1, len(multiplicities) + 1, dtype=np.int64)
    return np.repeat(rows, multiplicities)


def make_order(rows: np.ndarray, seed: int, batch: int) -> SampleOrder:
    return SampleOrder(rows=rows, seed=seed, global_batch=batch)


def stream(order: SampleOrder, steps: int) -> list[int]:
    return [row for step in range(steps) for row in order.batch(step)[1].tolist()]


@given(MULTIPLICITIES, SEEDS, st.integers(1, 40))
def test_each_pass_shows_each_row_as_often_as_it_was_selected(
    multiplicities: list[int], seed: int, batch: int
) -> None:
    rows = make_rows(multiplicities)
    order = make_order(rows, seed, batch)
    shown = stream(order, -(-3 * len(rows) // batch))
    for number in range(3):
        one_pass = shown[number * len(rows) : (number + 1) * len(rows)]
        assert sorted(one_pass) == rows.tolist()
    # so over any prefix a row has been shown between floor and ceil of its share of the passes
    for length in range(0, len(shown) + 1, 7):
        counts = Counter(shown[:length])
        for row, multiplicity in Counter(rows.tolist()).items():
            passes = length // len(rows)
            assert passes * multiplicity <= counts[row] <= (passes + 1) * multiplicity


@given(MULTIPLICITIES, SEEDS, st.sampled_from([4, 8, 12]), st.integers(0, 30))
def test_ranks_share_the_global_batch(
    multiplicities: list[int], seed: int, batch: int, step: int
) -> None:
    order = make_order(make_rows(multiplicities), seed, batch)
    positions, rows = order.batch(step)
    assert positions.tolist() == list(range(step * batch, (step + 1) * batch))
    assert rows.shape == (batch,)
    for world_size in (1, 2, 4):
        parts = [rows[rank_slice(batch, rank=r, world_size=world_size)] for r in range(world_size)]
        assert {len(part) for part in parts} == {batch // world_size}
        assert np.concatenate(parts).tolist() == rows.tolist()


@given(MULTIPLICITIES, SEEDS, st.integers(1, 40), st.permutations(range(6)))
def test_any_step_can_come_first(
    multiplicities: list[int], seed: int, batch: int, steps: list[int]
) -> None:
    rows = make_rows(multiplicities)
    through = make_order(rows, seed, batch)
    expected = [through.batch(step)[1].tolist() for step in range(6)]
    jumping = make_order(rows, seed, batch)
    for step in steps:
        assert jumping.batch(step)[1].tolist() == expected[step]
        assert make_order(rows, seed, batch).batch(step)[1].tolist() == expected[step]


@given(SEEDS, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 12))
def test_batch_size_does_not_change_the_sequence(seed: int, divisor: int, other: int) -> None:
    """Where no batch holds samples of two passes; else it does not in the first one."""
    rows = make_rows([1] * 12)
    shown = [make_order(rows, seed, batch).span(0, 36)[1] for batch in (1, divisor, other)]
    assert np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[0][:12], shown[2][:12])


def test_passes_and_seeds_differ() -> None:
    rows = make_rows([1] * 40)
    shown = set()
    for seed in range(5):
        order = make_order(rows, seed, 40)
        shown |= {tuple(order.batch(step)[1].tolist()) for step in range(5)}
    assert len(shown) == 25


def test_positions_in_a_pass_are_uniform() -> None:
    """Each row is equally often at each place: chi-square over 2,000 passes of 8 rows."""
    passes, n = 2000, 8
    order = make_order(np.arange(n, dtype=np.int64), 0, n)
    counts = np.zeros((n, n))
    for step in range(passes):
        counts[np.arange(n), order.batch(step)[1]] += 1
    expected = passes / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 49 + 4 * np.sqrt(2 * 49)  # (n - 1)**2 degrees of freedom, four deviations


def test_rows_are_not_modified() -> None:
    rows = make_rows([1, 2, 3])
    original = rows.copy()
    stream(make_order(rows, 0, 4), 5)
    assert np.array_equal(rows, original)


def test_batch_larger_than_the_selection_spans_passes() -> None:
    order = make_order(make_rows([1, 1, 1]), 0, 7)
    assert sorted(stream(order, 3)) == [3] * 7 + [6] * 7 + [9] * 7


@pytest.mark.parametrize(("batch", "world_size"), [(5, 2), (6, 4), (1, 2)])
def test_batch_that_cannot_be_shared_is_refused(batch: int, world_size: int) -> None:
    with pytest.raises(
        InputError,
        match=rf"global_batch must be a multiple of the {world_size} .*Got {batch}\.",
    ):
        rank_slice(batch, rank=0, world_size=world_size)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_refuses_micro_batches_that_are_not_equal(rank: int) -> None:
    order = make_order(make_rows([1] * 8), 0, 8)
    with pytest.raises(InputError, match=r"micro_batch_size must divide the 4 .*Got 3\."):
        OrderSampler(
            order=order,
            global_batch=8,
            start_step=0,
            total_steps=1,
            rank=rank,
            world_size=2,
            micro_batch=3,
        )


@given(st.sets(st.integers(0, 300), min_size=1), st.data(), SEEDS, st.integers(0, 10**6))
def test_substitutes_are_others_than_the_draw_and_than_each_other(
    selected: set[int], data: st.DataObject, seed: int, start: int
) -> None:
    rows = np.array(sorted(selected))
    drawn = np.array(data.draw(st.lists(st.sampled_from(rows.tolist()), min_size=1, max_size=40)))
    substitutes = Substitutes(rows, drawn, seed=seed, start=start)
    others = selected - set(drawn.tolist())
    attempts = max(1, len(others) // len(drawn))
    found = [substitutes.row(place, a) for a in range(attempts) for place in range(len(drawn))]
    if len(others) < len(drawn):
        assert set(found) <= selected  # there are not enough of them
    else:
        assert set(found) <= others
        assert len(set(found)) == len(found)
    again = Substitutes(rows, drawn, seed=seed, start=start)
    assert [again.row(place, 0) for place in range(len(drawn))] == found[: len(drawn)]


def test_substitutes_vary_with_seed_and_draw() -> None:
    rows, drawn = np.arange(10**6), np.arange(0, 1000, 10)
    found = {Substitutes(rows, drawn, seed=s, start=0).row(3, 0) for s in range(10)}
    found |= {Substitutes(rows, drawn, seed=0, start=s).row(3, 0) for s in range(1, 11)}
    assert len(found) == 20


def test_generators_of_different_words_differ() -> None:
    words = [(0, 1), (1, 0), (0, 0, 1), (0, 1, 1), (2**32, 7), (1, 1), (0, 2), (0, 3)]
    assert len({int(derive_generator(*w).integers(2**63)) for w in words}) == len(words)


@given(st.integers(0, 9), st.sampled_from([1, 2, 4]))
def test_sampler_resumes_where_it_was_stopped(start_step: int, world_size: int) -> None:
    def requests(rank: int, start: int) -> list[list[tuple[int, int]]]:
        sampler = OrderSampler(
            order=make_order(make_rows([2, 1, 1, 1]), 3, 8),
            global_batch=8,
            start_step=start,
            total_steps=9,
            rank=rank,
            world_size=world_size,
        )
        assert len(sampler) == 9 - start
        return list(sampler)

    for rank in range(world_size):
        whole = requests(rank, 0)
        assert len(whole) == 9
        assert {len(batch) for batch in whole} == {8 // world_size}
        assert requests(rank, start_step) == whole[start_step:]
        assert all(type(number) is int for batch in whole for pair in batch for number in pair)


def test_repetitions_are_spread_over_the_pass() -> None:
    """Of m copies, each lands in another m-th part: the gaps between them are never small."""
    multiplicities = [1] * 300 + [2] * 60 + [3] * 40 + [5] * 20
    rows = make_rows(multiplicities)
    for seed in range(5):
        shown = shuffle(rows, derive_generator(seed))
        assert sorted(shown.tolist()) == rows.tolist()
        place = {row: np.flatnonzero(shown == row) / len(shown) for row in set(rows.tolist())}
        for row, multiplicity in Counter(rows.tolist()).items():
            # the parts are of random numbers of samples, hence not exact
            parts = place[row] * multiplicity
            assert (np.abs(parts - np.arange(multiplicity) - 0.5) < 0.5 + 0.05 * multiplicity).all()


def test_place_of_repeated_rows_is_uniform() -> None:
    """Over many passes, no part of a pass has more of the repetitions than of the others."""
    rows = make_rows([3] * 4 + [1] * 12)
    shown = np.stack([shuffle(rows, derive_generator(seed)) for seed in range(3000)])
    repeated = (shown <= 12).mean(axis=0)
    assert np.abs(repeated - 0.5).max() < 0.06


@given(MULTIPLICITIES, SEEDS, st.integers(1, 6), st.integers(1, 9))
def test_window_shows_each_row_as_often_as_it_was_selected(
    multiplicities: list[int], seed: int, window: int, shard_samples: int
) -> None:
    rows = make_rows(multiplicities)
    shard_of_row = np.arange(rows.max() + 1, dtype=np.int32) // (3 * shard_samples)
    shown = shuffle(rows, derive_generator(seed), shard_of_row=shard_of_row, window_shards=window)
    assert sorted(shown.tolist()) == rows.tolist()
    # what one round shows of its tars in a row comes from `window` tars at a time
    rounds = min(MAX_ROUNDS, max(multiplicities))
    if rounds == 1:
        shards = len(np.unique(shard_of_row[rows]))
        at = 0
        seen: set[int] = set()
        while at < len(shown):
            here: set[int] = set()
            start = at
            while at < len(shown) and len(here | {int(shard_of_row[shown[at]])}) <= window:
                here.add(int(shard_of_row[shown[at]]))
                at += 1
            assert not here & seen, "a tar is read again after its window"
            seen |= here
            assert at > start
        assert len(seen) == shards


def test_every_pass_groups_the_tars_of_a_window_anew() -> None:
    """Each pair of 4 tars is equally often the first window of a pass: chi-square, 600 passes."""
    passes, shard_of_row = 600, np.repeat(np.arange(4, dtype=np.int32), 3)
    order = SampleOrder(
        rows=np.arange(12), seed=3, global_batch=6, shard_of_row=shard_of_row, window_shards=2
    )
    firsts = Counter(
        tuple(sorted({int(shard) for shard in shard_of_row[order.batch(2 * number)[1]]}))
        for number in range(passes)
    )
    pairs = {(a, b) for b in range(4) for a in range(b)}
    assert firsts.keys() == pairs
    chi_square = sum((firsts[pair] - passes / 6) ** 2 / (passes / 6) for pair in pairs)
    assert chi_square < 5 + 4 * np.sqrt(2 * 5)  # five degrees of freedom, four deviations


def test_every_round_of_a_pass_groups_the_tars_of_a_window_anew() -> None:
    rows, shard_of_row = np.repeat(np.arange(12), 2), np.repeat(np.arange(6, dtype=np.int32), 2)
    windows = []
    for seed in range(40):
        shown = shuffle(rows, derive_generator(seed), shard_of_row=shard_of_row, window_shards=3)
        windows.append([frozenset(shard_of_row[shown[at : at + 6]].tolist()) for at in (0, 12)])
    assert all(len(window) == 3 for both in windows for window in both)
    # by chance one in ten rounds begins with the tars that the round before began with
    assert sum(first == second for first, second in windows) < 12


def test_window_of_all_shards_is_as_good_as_none() -> None:
    """Each row is equally often at each place: chi-square over 3,000 passes of 12 rows, 4 tars."""
    passes, n = 3000, 12
    rows, shard_of_row = np.arange(n), np.arange(n, dtype=np.int32) // 3
    counts = np.zeros((n, n))
    for seed in range(passes):
        shown = shuffle(rows, derive_generator(seed), shard_of_row=shard_of_row, window_shards=4)
        counts[np.arange(n), shown] += 1
    chi_square = ((counts - passes / n) ** 2 / (passes / n)).sum()
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_repetitions_meet_their_tars_in_several_rounds() -> None:
    rows = np.repeat(np.arange(1000), 2)
    shard_of_row = np.arange(1000, dtype=np.int32) // 10
    shown = shuffle(rows, derive_generator(0), shard_of_row=shard_of_row, window_shards=5)
    first, second = shown[:1000], shown[1000:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1000))
    for start in range(0, 2000, 50):
        assert len(np.unique(shard_of_row[shown[start : start + 50]])) == 5


def test_versions_of_a_selection_have_other_orders() -> None:
    rows = make_rows([1] * 40)
    shown = {
        tuple(SampleOrder(rows=rows, seed=0, global_batch=40, selection_version=v).batch(0)[1])
        for v in range(5)
    }
    assert len(shown) == 5


@example([1] * 12, 0, 5, 2, 12)  # a pass more would begin inside a batch
@given(MULTIPLICITIES, SEEDS, st.integers(1, 12), st.integers(0, 5), st.integers(0, 60))
def test_order_of_a_later_selection_begins_with_a_pass_of_its_own(
    multiplicities: list[int], seed: int, batch: int, first_step: int, more: int
) -> None:
    """Wherever it begins, it is the order that begins at 0, moved there."""
    rows = make_rows(multiplicities)
    first = first_step * batch
    later = SampleOrder(rows=rows, seed=seed, global_batch=batch, first_position=first)
    positions, shown = later.span(first, 2 * len(rows))
    assert positions.tolist() == list(range(first, first + 2 * len(rows)))
    assert sorted(shown[: len(rows)]) == sorted(shown[len(rows) :]) == rows.tolist()
    from_the_start = make_order(rows, seed, batch)
    assert shown.tolist() == from_the_start.span(0, 2 * len(rows))[1].tolist()
    assert later.moves_samples(first + more) == from_the_start.moves_samples(more)


class EverySecond:
    """A first stage: of twice the samples, those at even places, backwards."""

    def __call__(self, step: int, rows: np.ndarray, wanted: int) -> np.ndarray:
        assert len(rows) == 16
        return np.arange(0, 16, 2)[::-1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_first_stage_chooses_before_the_ranks_share(world_size: int) -> None:
    order = make_order(make_rows([1] * 50), 3, 16)
    ranks = [
        list(
            OrderSampler(
                order=order,
                global_batch=8,
                start_step=2,
                total_steps=5,
                rank=rank,
                world_size=world_size,
                first_stage=EverySecond(),
                plan=StepPlan(trained=8, drawn=np.full(5, 16), read=np.full(5, 8)),
            )
        )
        for rank in range(world_size)
    ]
    for number, step in enumerate(range(2, 5)):
        positions, rows = order.batch(step)
        expected = list(zip(positions[::2][::-1].tolist(), rows[::2][::-1].tolist(), strict=True))
        assert [request for batches in ranks for request in batches[number]] == expected


@pytest.mark.parametrize(
    "chosen",
    [[0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 9], [-1, 0, 1, 2], [0.0, 1.0, 2.0, 3.0], [[0, 1, 2, 3]]],
)
def test_first_stage_that_chooses_wrongly_is_named(chosen: Any) -> None:
    with pytest.raises(InputError, match=r"Picky must choose 4 different indices from 0 to 8.*Got"):
        check_chosen(np.asarray(chosen), drawn=9, wanted=4, owner="Picky")
    assert check_chosen([8, 0, 3, 1], drawn=9, wanted=4, owner="Picky").tolist() == [8, 0, 3, 1]  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=50, unique=True), SEEDS)
def test_seeds_are_pure_and_differ(positions: list[int], seed: int) -> None:
    together = derive_seeds(np.array(positions), seed, 3).tolist()
    assert len(set(together)) == len(positions)
    assert [int(derive_seeds(np.array([p]), seed, 3)[0]) for p in positions] == together
    assert not set(together) & set(derive_seeds(np.array(positions), seed, 4).tolist())


def test_seeds_are_the_numbers_of_splitmix64() -> None:
    """One after the other, where `mix64` adds the increment to the state before it mixes it."""
    state = int(derive_generator(7, 3).integers(2**63, dtype=np.uint64))
    expected = []
    for _ in range(5):
        expected.append(int(mix64(np.array([state], dtype=np.uint64))[0]))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert derive_seeds(np.arange(5), 7, 3).tolist() == expected


def test_bits_of_seeds_are_fair() -> None:
    seeds = derive_seeds(np.arange(20_000), 0, 3)
    bits = np.unpackbits(seeds.view(np.uint8)).reshape(len(seeds), 64).astype(float)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02
    correlation = np.corrcoef(bits.T) - np.eye(64)
    assert np.abs(correlation).max() < 0.04
