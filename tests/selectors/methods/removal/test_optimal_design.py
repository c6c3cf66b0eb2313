"""A- and V-optimal design, against the inverses of the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import Chunk, FeatureFile
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import DictCache
from siftclip.selectors.methods.removal.elimination import remaining_samples
from siftclip.selectors.methods.removal.optimal_design import AOptimal, VOptimal, removal_cost

FILE = FeatureFile(path="t.npz")


def make(method: str, **options: Any) -> AOptimal:
    if method == "a":
        return AOptimal(features="a", **options)
    return VOptimal(features="a", target=FeatureFile(path="t.npz"), **options)


def samples(count: int = 80, dim: int = 6) -> Chunk:
    generator = np.random.default_rng(count)
    values = generator.standard_normal((count, dim)) * np.arange(1, dim + 1)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return Chunk(
        rows=np.arange(count),
        uids=generator.integers(0, 2**63, (count, 2)).astype(np.uint64),
        features={"a_img": torch.from_numpy(values.astype(np.float16))},
    )


def source(chunk: Chunk, **options: Any) -> MemorySource:
    return MemorySource(chunk, files={FILE: samples(30).features["a_img"]}, **options)


def slow_select(method: str, chunk: Chunk, fraction: float, steps: int, ridge: float) -> np.ndarray:
    """The step at which each sample goes, from an inverse for each sample left out."""
    x = chunk.features["a_img"].double().numpy()
    target = np.eye(x.shape[1])
    if method == "v":
        g = samples(30).features["a_img"].double().numpy()
        target = g.T @ g / len(g)
    left, removal = np.arange(len(x)), np.full(len(x), steps)
    for step, size in enumerate(remaining_samples(len(x), int(fraction * len(x)), steps)):
        if size == len(left):
            break
        moment = x[left].T @ x[left] + ridge * np.eye(x.shape[1])
        error = [
            np.trace(target @ np.linalg.inv(moment - np.outer(x[i], x[i])))
            - np.trace(target @ np.linalg.inv(moment))
            for i in left
        ]
        kept = keep_top(np.float32(error), chunk.uids[left], size) > 0
        removal[left[~kept]] = step
        left = left[kept]
    return removal


@pytest.mark.parametrize("method", ["a", "v"])
def test_contract(method: str) -> None:
    check_selector(lambda: make(method, fraction=0.3, steps=5))


def test_cost_is_the_growth_of_the_trace() -> None:
    x = samples(20).features["a_img"].double()
    moment = x.T @ x + 0.1 * torch.eye(6)
    target = torch.diag(torch.arange(6.0).double())
    for given, weights in ((None, torch.eye(6).double()), (target, target)):
        for i, cost in enumerate(removal_cost(x, moment, given)):
            without = torch.linalg.inv(moment - torch.outer(x[i], x[i]))
            growth = torch.trace(weights @ (without - torch.linalg.inv(moment)))
            assert cost.item() == pytest.approx(growth.item(), rel=1e-9)


@pytest.mark.parametrize("method", ["a", "v"])
@pytest.mark.parametrize(
    ("fraction", "steps", "ridge"), [(0.3, 1, 1.0), (0.3, 9, 0.1), (0.01, 56, 2.0), (1.0, 3, 1.0)]
)
def test_equals_slow_twin(method: str, fraction: float, steps: int, ridge: float) -> None:
    chunk = samples()
    choice = make(method, fraction=fraction, steps=steps, ridge=ridge).select(source(chunk))
    expected = slow_select(method, chunk, fraction, steps, ridge)
    np.testing.assert_array_equal(choice.scores, expected)
    np.testing.assert_array_equal(choice.multiplicities, expected == steps)


@pytest.mark.parametrize("method", ["a", "v"])
def test_ranks_and_chunks_do_not_matter(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]], method: str
) -> None:
    def select(ranks: Ranks) -> Any:
        pool = source(samples(), ranks=ranks, chunk_samples=7, part_samples=30)
        return make(method, fraction=0.3, steps=6).select(pool)

    expected = make(method, fraction=0.3, steps=6).select(source(samples()))
    for size in (1, 2, 4):
        for choice in run_on_ranks(size, select):
            np.testing.assert_array_equal(choice.scores, expected.scores)


def test_equal_samples_go_by_uid() -> None:
    uids = np.array([[0, 3], [0, 1], [0, 2]], dtype=np.uint64)
    chunk = Chunk(rows=np.arange(3), uids=uids, features={"a_img": torch.eye(2)[[0, 0, 0]]})
    choice = AOptimal(features="a", fraction=0.4, steps=2).select(source(chunk))
    assert choice.multiplicities.tolist() == [0, 1, 0]


def test_unusable_samples_are_left_out() -> None:
    chunk = samples()
    features = chunk.features["a_img"]
    features[0], features[1, 0] = 0, torch.nan
    choice = AOptimal(features="a", fraction=0.5, steps=4).select(source(chunk))
    good = source(chunk).restrict(np.arange(2, 80))
    expected = AOptimal(features="a", fraction=0.5, steps=4).select(good)
    assert choice.scores is not None
    np.testing.assert_array_equal(choice.scores[2:], expected.scores)
    assert np.isnan(choice.scores[:2]).all()


def test_killed_run_continues() -> None:
    chunk, cache = samples(), DictCache()

    class KeepingSource(MemorySource):
        def cache(self, selector: object) -> DictCache:
            return cache

    pool = KeepingSource(chunk)
    expected = AOptimal(features="a", fraction=0.3, steps=10).select(pool)
    for step in (10, 9, 8, 7, 6):
        cache._kept.pop(f"step-{step}", None)
    choice = AOptimal(features="a", fraction=0.3, steps=10).select(pool)
    np.testing.assert_array_equal(choice.scores, expected.scores)


def test_faults_of_input() -> None:
    with pytest.raises(InputError, match=r"ridge must be above 0"):
        AOptimal(features="a", fraction=0.3, steps=2, ridge=0)
    empty = MemorySource(samples(), files={FILE: torch.zeros(3, 6)})
    with pytest.raises(InputError, match=r"VOptimal: t\.npz has no rows"):
        make("v", fraction=0.3, steps=2).select(empty)
    other = MemorySource(samples(), files={FILE: torch.ones(3, 4)})
    with pytest.raises(InputError, match=r"have 6 components.*4.*another model"):
        make("v", fraction=0.3, steps=2).select(other)
