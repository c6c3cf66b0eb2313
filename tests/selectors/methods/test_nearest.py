"""Neighbours of a target: packed lists, ranks and unions against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.selectors.core.base import FeatureFile
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, DictCache, take
from siftclip.selectors.kernels.neighbour_lists import (
    NOTHING,
    best_ranks,
    pack,
    unpack,
    update_lists,
)
from siftclip.selectors.methods import nearest as module
from siftclip.selectors.methods.nearest import NearestRank, NearestUnion, target_ranks

KEY = "l14_img"
TARGET = FeatureFile(path="target.npy")


def pool(samples: int = 150, seed: int = 0) -> Chunk:
    """Unit vectors in 5 dimensions; the last 30 repeat others, two are not usable."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((samples, 5))
    values[-30:] = values[:30]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    values[40], values[41] = np.nan, 0
    return Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=generator.integers(0, 2**63, size=(samples, 2)).astype(np.uint64),
        features={KEY: torch.from_numpy(values.astype(np.float16))},
    )


def targets(count: int = 12) -> torch.Tensor:
    values = torch.randn(count, 5, generator=torch.Generator().manual_seed(1))
    values = torch.nn.functional.normalize(values, dim=1)
    values[0], values[1] = torch.nan, 0
    return values.half()


def source_of(chunk: Chunk, **options: Any) -> MemorySource:
    return MemorySource(chunk, files={TARGET: targets()}, **options)


def slow_ranks(chunk: Chunk) -> tuple[list[int], list[float]]:
    """For each sample its best rank over targets, and the product of that; -1 if not usable."""
    x, goals = chunk.features[KEY].double().numpy(), targets().double().numpy()[2:]
    usable = [i for i in range(len(x)) if np.isfinite(x[i]).all() and x[i].any()]
    ranks, products = [-1] * len(x), [0.0] * len(x)
    for goal in goals:
        product = {i: float(np.float32(x[i] @ goal)) for i in usable}
        for rank, i in enumerate(sorted(usable, key=lambda i: (-product[i], *chunk.uids[i]))):
            better = ranks[i] < 0 or (rank, -product[i]) < (ranks[i], -products[i])
            if better:
                ranks[i], products[i] = rank, product[i]
    return ranks, products


@given(
    products=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_packed_numbers_sort_like_product_and_place(products: list[float], seed: int) -> None:
    values = torch.tensor([*products, -1.0, -1.0, 0.5, 0.5]) + 0.0  # no negative zero
    places = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**32, len(values)))
    packed = pack(values, places)
    expected = sorted(range(len(values)), key=lambda i: (-float(values[i]), int(places[i])))
    ours = packed.argsort(descending=True, stable=True)
    assert [(float(values[i]), int(places[i])) for i in ours] == [
        (float(values[i]), int(places[i])) for i in expected
    ]
    assert torch.equal(unpack(packed)[1], places)
    assert bool((packed > NOTHING + 1).all())


def test_lists_equal_a_sort_however_samples_arrive() -> None:
    x, goals = pool(100).features[KEY][42:], targets()[2:]
    places = torch.from_numpy(np.random.default_rng(0).permutation(58))
    products = (goals.double() @ x.double().T).float()
    expected = pack(products, places.expand_as(products)).sort(dim=1, descending=True).values
    for size in (1, 10, 58):
        for count in (1, 7, 58):
            lists = torch.full((10, count), NOTHING)
            for values, own in zip(x.split(size), places.split(size), strict=True):
                lists = update_lists(lists, goals, values, own)
            assert torch.equal(lists, expected[:, :count])
    short = update_lists(torch.full((10, 60), NOTHING), goals, x, places)
    assert torch.equal(short[:, :58], expected)
    assert bool((short[:, 58:] == NOTHING).all())


def test_best_ranks_take_the_smallest_rank_and_then_the_largest_product() -> None:
    lists = pack(torch.tensor([[0.9, 0.5], [0.7, 0.6]]), torch.tensor([[0, 1], [2, 0]]))
    best = best_ranks(torch.full((4,), NOTHING), lists)
    again = best_ranks(best, pack(torch.tensor([[0.8, 0.7]]), torch.tensor([[0, 1]])))
    assert (-(again >> 32)).tolist()[:3] == [0, 1, 0]
    assert again[3] == NOTHING
    assert again[0] == best[0]  # 0.9 stays
    assert again[1] > best[1]  # 0.7 instead of 0.5


@pytest.mark.parametrize("neighbours", [1, 5, 150])
def test_ranks_equal_a_loop_on_every_rank(
    neighbours: int, run_on_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ENTRIES", 4 * neighbours)  # blocks of 4, 4 and 2 targets
    chunk = pool()
    expected, products = slow_ranks(chunk)
    expected = [min(rank, neighbours) for rank in expected]

    def run(ranks: Any) -> Any:
        source = source_of(chunk, part_samples=40, chunk_samples=11, ranks=ranks)
        return target_ranks(source, KEY, TARGET, neighbours=neighbours)

    for size in (1, 2, 4):
        for ranks, order in run_on_ranks(size, run):
            assert ranks.tolist() == expected
            listed = np.flatnonzero((ranks >= 0) & (ranks < neighbours))
            by_order = listed[np.argsort(order[listed], kind="stable")]
            assert (np.diff(np.array(products)[by_order]) >= 0).all()


def test_scores_are_minus_the_ranks() -> None:
    chunk = pool()
    expected, _ = slow_ranks(chunk)
    selector = NearestRank(key=KEY, target=TARGET, neighbours=6, threshold=-2)
    choice = selector.select(source_of(chunk, part_samples=33))
    assert choice.scores is not None
    clipped = [np.nan if rank < 0 else -float(min(rank, 6)) for rank in expected]
    np.testing.assert_array_equal(choice.scores, np.array(clipped, dtype=np.float32))
    assert choice.multiplicities.tolist() == [int(0 <= rank <= 2) for rank in expected]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_union_keeps_exactly_the_fraction(fraction: float, run_on_ranks: Any) -> None:
    chunk = pool()
    ranks, products = slow_ranks(chunk)
    order = sorted(
        (i for i in range(150) if ranks[i] >= 0),
        key=lambda i: (ranks[i], -products[i], *chunk.uids[i]),
    )
    expected = sorted(order[: int(150 * fraction)])
    selector = NearestUnion(key=KEY, target=TARGET, fraction=fraction)

    def run(threads: Any) -> np.ndarray:
        return selector.select(source_of(chunk, part_samples=40, ranks=threads)).multiplicities

    for size in (1, 2):
        for kept in run_on_ranks(size, run):
            assert np.flatnonzero(kept).tolist() == expected
    assert len(expected) == min(int(150 * fraction), 148)


def test_lists_grow_until_the_budget_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten equal targets have one list between them."""
    lengths = []

    def spy(*arguments: Any, neighbours: int) -> Any:
        lengths.append(neighbours)
        return target_ranks(*arguments, neighbours=neighbours)

    monkeypatch.setattr(module, "target_ranks", spy)
    chunk = pool()
    source = MemorySource(chunk, files={TARGET: targets()[2:3].repeat(10, 1)})
    kept = NearestUnion(key=KEY, target=TARGET, fraction=0.3).select(source).multiplicities
    products = (chunk.features[KEY].double() @ targets()[2].double()).numpy()
    products[[40, 41]] = -9
    assert kept.sum() == 45
    assert products[kept > 0].min() >= products[kept == 0].max()
    assert lengths == [18, 72]


def test_restricted_and_small_sources() -> None:
    source = source_of(pool())
    part = source.restrict(np.arange(20, 60))
    of_pool = NearestUnion(key=KEY, target=TARGET, fraction=0.2)
    of_left = NearestUnion(key=KEY, target=TARGET, fraction=0.2, of="left")
    assert of_pool.select(part).multiplicities.sum() == 30
    assert of_left.select(part).multiplicities.sum() == 8
    for samples in (0, 1):
        few = source_of(take(pool(), np.arange(samples)))
        whole = NearestUnion(key=KEY, target=TARGET, fraction=1.0)
        assert whole.select(few).multiplicities.tolist() == [1] * samples


def test_order_of_samples_does_not_matter() -> None:
    chunk = pool()
    shuffled = take(chunk, np.random.default_rng(5).permutation(150))
    moved = Chunk(rows=chunk.rows, uids=shuffled.uids, features=shuffled.features)
    selector = NearestUnion(key=KEY, target=TARGET, fraction=0.2)
    first = selector.select(source_of(chunk)).multiplicities
    second = selector.select(source_of(moved)).multiplicities
    assert sorted(chunk.uids[first > 0].tolist()) == sorted(moved.uids[second > 0].tolist())


def test_a_killed_run_continues_at_the_next_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTRIES", 12)
    cache, chunk = DictCache(), pool()
    monkeypatch.setattr(MemorySource, "cache", lambda self, selector: cache)
    expected, _ = slow_ranks(chunk)
    real, calls = module.best_ranks, []

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "best_ranks", dying)
    with pytest.raises(KeyboardInterrupt):
        target_ranks(source_of(chunk), KEY, TARGET, neighbours=3)
    ranks, _ = target_ranks(source_of(chunk), KEY, TARGET, neighbours=3)
    assert len(calls) == 4  # 10 targets in blocks of 4: the third is cut off, and done again
    assert ranks.tolist() == [min(rank, 3) for rank in expected]


def test_a_target_without_usable_rows() -> None:
    source = MemorySource(pool(), files={TARGET: torch.zeros(3, 5)})
    with pytest.raises(InputError, match=r"target target\.npy has no row that is finite"):
        target_ranks(source, KEY, TARGET, neighbours=3)


def test_a_killed_run_continues_with_other_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of targets depend on the size of chunks; what was done does not."""
    cache, chunk = DictCache(), pool()
    monkeypatch.setattr(MemorySource, "cache", lambda self, selector: cache)
    files = {TARGET: targets().repeat(3, 1)}
    sources = [MemorySource(chunk, files=files, chunk_samples=size) for size in (1, 2)]
    real = module.best_ranks

    def dying(*arguments: Any) -> Any:
        if cache.get("best") is not None:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "best_ranks", dying)
    with pytest.raises(KeyboardInterrupt):
        target_ranks(sources[0], KEY, TARGET, neighbours=3)
    monkeypatch.setattr(module, "best_ranks", real)
    ranks, _ = target_ranks(sources[1], KEY, TARGET, neighbours=3)
    cache = DictCache()
    expected, _ = target_ranks(sources[1], KEY, TARGET, neighbours=3)
    assert np.array_equal(ranks, expected)


def test_a_target_of_another_model() -> None:
    source = MemorySource(pool(), files={TARGET: torch.ones(3, 9)})
    with pytest.raises(
        InputError, match=r"those of the target \S+ 9: they belong to another model"
    ):
        target_ranks(source, KEY, TARGET, neighbours=3)
