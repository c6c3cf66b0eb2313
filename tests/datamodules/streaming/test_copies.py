"""No step draws a sample twice where that can be, and what must not move stays where it was."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.datamodules.streaming.copies import CutPass, count_copies
from siftclip.datamodules.streaming.order import SampleOrder, derive_generator, shuffle
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.purposes import GeneratorPurpose

SEEDS = st.integers(0, 2**40)


@st.composite
def selections(draw: st.DrawFn, *, most: int = 4, rows: int = 30) -> np.ndarray:
    multiplicities = draw(st.lists(st.integers(1, most), min_size=2, max_size=rows))
    return np.repeat(5 * np.arange(len(multiplicities)), multiplicities)


def tars_of(rows: np.ndarray) -> np.ndarray:
    return np.arange(rows.max() + 1, dtype=np.int32) // 17


def plain_passes(rows: np.ndarray, seed: int, passes: int, **options: Any) -> np.ndarray:
    """The shuffles laid end to end, with nothing kept apart."""
    generators = [
        derive_generator(seed, number, 0, GeneratorPurpose.ORDER) for number in range(passes)
    ]
    return np.concatenate([shuffle(rows, generator, **options) for generator in generators])


@given(selections(), SEEDS, st.data())
def test_no_draw_holds_a_sample_twice_where_a_pass_has_room(
    rows: np.ndarray, seed: int, data: st.DataObject
) -> None:
    """For each size of a batch that the selection has room for, across the borders of passes."""
    most = int(np.bincount(rows).max())
    batch = data.draw(st.integers(1, len(rows) // most))
    window = data.draw(st.sampled_from([None, 1, 2, 5]))
    order = SampleOrder(
        rows=rows, seed=seed, global_batch=batch, shard_of_row=tars_of(rows), window_shards=window
    )
    assert order.has_room
    assert order.is_distinct
    assert order.copies_fraction(0, 9, most_samples=10**6) == 0
    steps = -(-6 * len(rows) // batch)
    shown = [order.batch(step)[1] for step in range(steps)]
    assert [count_copies(batch_rows) for batch_rows in shown] == [0] * steps
    through = np.concatenate(shown)
    for number in range(5):
        one_pass = through[number * len(rows) : (number + 1) * len(rows)]
        assert np.array_equal(np.sort(one_pass), rows)
    step = data.draw(st.integers(0, steps - 1))  # of a continued run, which knows no other pass
    alone = SampleOrder(
        rows=rows, seed=seed, global_batch=batch, shard_of_row=tars_of(rows), window_shards=window
    )
    assert np.array_equal(alone.batch(step)[1], shown[step])


@pytest.mark.parametrize(
    ("multiplicities", "batch", "seed"),
    [
        ([2, 2, 1, 1, 1], 3, 49),
        ([3, 3, 1, 1, 2], 3, 973),
        ([3, 1, 1, 2, 3], 3, 388),
        ([1, 2, 2, 2], 3, 31),
        ([2, 2, 2, 2, 2, 1], 5, 989),
    ],
)
def test_a_pass_that_ends_inside_a_draw_keeps_that_end_for_the_next(
    multiplicities: list[int], batch: int, seed: int
) -> None:
    """Found by a search: if it did not, a continued run would draw other samples here."""
    rows = np.repeat(np.arange(len(multiplicities)), multiplicities)
    whole = SampleOrder(rows=rows, seed=seed, global_batch=batch)
    for step in range(6 * len(rows) // batch):
        alone = SampleOrder(rows=rows, seed=seed, global_batch=batch)
        assert np.array_equal(alone.batch(step)[1], whole.batch(step)[1]), step


@given(st.integers(2, 40), SEEDS, st.integers(1, 40), st.sampled_from([None, 2]))
def test_without_copies_nothing_moves_but_what_meets_itself_at_a_border(
    samples: int, seed: int, batch: int, window: int | None
) -> None:
    rows = 5 * np.arange(samples)
    options: dict[str, Any] = {"shard_of_row": tars_of(rows), "window_shards": window}
    order = SampleOrder(rows=rows, seed=seed, global_batch=batch, **options)
    plain = plain_passes(rows, seed, 6, **options)
    shown = order.span(0, 6 * samples)[1]
    assert np.array_equal(shown[:samples], plain[:samples])
    if batch > samples or samples % batch == 0:
        assert np.array_equal(shown, plain)  # each batch is in one pass, or there is no way
        assert not order.moves_samples(6 * samples)
        return
    assert order.moves_samples(6 * samples)
    if samples < 2 * batch:
        return  # an exchange may make others necessary in the passes behind it
    for number in range(1, 6):  # exchanges are inside a pass, one for each that meets itself
        one_pass = slice(number * samples, (number + 1) * samples)
        start = number * samples - number * samples % batch
        meets = count_copies(plain[start : start + batch])
        assert (shown[one_pass] != plain[one_pass]).sum() == 2 * meets


def smallest_number_of_copies(rows: np.ndarray, edges: list[int], before: list[int]) -> int:
    """By a flow of samples to draws, one unit at a time: what no exchange can avoid."""
    places = [stop - start for start, stop in pairwise(edges)]
    holds: list[set[int]] = [set() for _ in places]

    def place(row: int, tried: set[int]) -> bool:
        for draw, room in enumerate(places):
            if draw in tried or row in holds[draw] or (draw == 0 and row in before):
                continue
            tried.add(draw)
            if len(holds[draw]) < room:
                holds[draw].add(row)
                return True
            for other in sorted(holds[draw]):
                if place(other, tried):
                    holds[draw].remove(other)
                    holds[draw].add(row)
                    return True
        return False

    return sum(not place(int(row), set()) for row in rows)


@settings(max_examples=150)
@given(selections(most=5, rows=7), SEEDS, st.data())
def test_as_few_copies_are_left_as_any_order_has(
    rows: np.ndarray, seed: int, data: st.DataObject
) -> None:
    """Also where there is no room for all: against a twin that looks for the best one slowly."""
    inside = st.lists(st.integers(1, len(rows) - 1), unique=True, max_size=5)
    cuts = np.array(sorted(data.draw(inside)), dtype=np.int64)
    before = np.array(sorted(data.draw(st.sets(st.sampled_from(rows.tolist()), max_size=3))))
    before = before.astype(np.int64)
    shown = shuffle(rows, derive_generator(seed))
    whole = CutPass(shown, cuts, before=before)
    whole.separate(repeats=True, partners=range(whole.draws), chains=True)
    edges = [0, *cuts.tolist(), len(rows)]
    left = sum(
        count_copies(np.concatenate([before if not start else [], shown[start:stop]]))
        for start, stop in pairwise(edges)
    )
    assert left == smallest_number_of_copies(rows, edges, before.tolist())
    assert np.array_equal(np.sort(shown), rows)


@given(selections(most=3), SEEDS, st.data())
def test_draws_of_other_sizes_are_kept_distinct_as_well(
    rows: np.ndarray, seed: int, data: st.DataObject
) -> None:
    """Super-batches that grow and shrink, up to what the selection has room for."""
    most = int(np.bincount(rows).max())
    largest = len(rows) // most
    trained = data.draw(st.integers(1, largest))
    sizes = data.draw(st.lists(st.integers(trained, largest), min_size=30, max_size=30))
    drawn = np.array(sizes)
    plan = StepPlan(trained=trained, drawn=drawn, read=np.full(30, trained))
    order = SampleOrder(rows=rows, seed=seed, global_batch=trained, starts=plan.starts)
    plain = plain_passes(rows, seed, 31 * largest // len(rows) + 2)
    copies = before = 0
    for step, size in enumerate(sizes):
        start = int(plan.starts[step])
        copies += count_copies(order.span(start, size)[1])
        before += count_copies(plain[start : start + size])
    assert copies <= before
    if order.is_distinct:
        assert copies == 0
    shown = order.span(0, int(plan.starts[-1]))[1]
    for step in (29, 3, 17):
        fresh = SampleOrder(rows=rows, seed=seed, global_batch=trained, starts=plan.starts)
        start, size = int(plan.starts[step]), sizes[step]
        assert np.array_equal(fresh.span(start, size)[1], shown[start : start + size])


def test_super_batches_hold_no_copy_in_a_realistic_plan() -> None:
    rows = np.repeat(np.arange(3000), np.random.default_rng(0).integers(1, 4, 3000))
    drawn = np.array([64] * 20 + [320] * 60 + [128] * 20)
    plan = StepPlan(trained=64, drawn=drawn, read=drawn)
    order = SampleOrder(rows=rows, seed=1, global_batch=64, starts=plan.starts)
    draws = [order.span(int(plan.starts[step]), int(drawn[step]))[1] for step in range(100)]
    assert [count_copies(draw) for draw in draws] == [0] * 100


@pytest.mark.parametrize(
    ("starts", "has_room", "is_distinct"),
    [([0, 6, 12], True, True), ([0, 4, 10], True, False), ([0, 4, 12], False, False)],
)
def test_the_largest_draw_needs_room(starts: list[int], has_room: bool, is_distinct: bool) -> None:
    rows = np.repeat(np.arange(6), 2)
    order = SampleOrder(rows=rows, seed=0, global_batch=4, starts=np.array(starts))
    assert order.largest_draw == max(np.diff(starts))
    assert (order.has_room, order.is_distinct) == (has_room, is_distinct)


def test_copies_that_cannot_be_kept_apart_are_counted() -> None:
    few = SampleOrder(rows=np.arange(10), seed=0, global_batch=16)
    assert not few.has_room
    assert few.copies_fraction(0, 100, most_samples=1) == 1
    often = SampleOrder(rows=np.repeat(np.arange(40), [30] + [1] * 39), seed=0, global_batch=8)
    exact = [count_copies(often.batch(step)[1]) > 0 for step in range(50)]
    assert often.copies_fraction(0, 50, most_samples=10**6) == sum(exact) / 50 > 0
    # the first row has 30 of 69 places in some 9 draws; nothing else comes twice
    assert all(Counter(often.batch(s)[1].tolist()).most_common(2)[1][1] == 1 for s in range(50))


def test_versions_of_a_selection_begin_with_a_step() -> None:
    rows = np.repeat(np.arange(20), 2)
    order = SampleOrder(
        rows=rows, seed=3, global_batch=12, selection_version=2, first_position=7 * 12
    )
    for step in range(7, 40):
        assert count_copies(order.batch(step)[1]) == 0


@pytest.mark.parametrize("window", [None, 3])
def test_a_pass_goes_through_its_tars_as_before(window: int | None) -> None:
    """Copies change places with the nearest sample that will do."""
    rows = np.repeat(np.arange(2000), 2)
    tars = np.arange(2000, dtype=np.int32) // 20
    options: dict[str, Any] = {"shard_of_row": tars, "window_shards": window}
    order = SampleOrder(rows=rows, seed=0, global_batch=150, **options)
    shown, plain = order.span(0, 8000)[1], plain_passes(rows, 0, 2, **options)
    moved = np.flatnonzero(shown != plain)
    assert 0 < len(moved) < 200
    sources = [np.flatnonzero(plain == row) for row in shown[moved]]
    distance = [np.abs(places - place).min() for place, places in zip(moved, sources, strict=True)]
    assert max(distance) < 3 * 150


def test_last_pass_of_a_plan_is_cut_behind_its_last_draw_too() -> None:
    """Else all that no step draws any more would be one draw, which cannot take two copies."""
    rows = np.repeat(np.arange(7), [1, 3, 1, 3, 3, 1, 1])
    plan = StepPlan.plain(4, 4)  # ends one draw behind the beginning of the second pass
    for seed in range(200):
        order = SampleOrder(rows=rows, seed=seed, global_batch=4, starts=plan.starts)
        assert order.is_distinct
        draws = order.span(0, 16)[1].reshape(4, 4)
        assert [count_copies(draw) for draw in draws] == [0] * 4
