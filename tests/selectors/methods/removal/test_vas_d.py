"""VAS-D and NormSim-D, against the loop that scores everything and the authors' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import siftclip.selectors.methods.removal.elimination as elimination
from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import Chunk
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import DictCache, Source
from siftclip.selectors.methods.removal.elimination import LazyForms, Samples, remaining_samples
from siftclip.selectors.methods.removal.vas_d import NormSimD, VasD


def clustered(samples: int = 300, dim: int = 12, seed: int = 0) -> Chunk:
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((6, dim))
    values = centres[generator.integers(0, 6, samples)] + generator.standard_normal((samples, dim))
    values[samples // 2 : samples // 2 + 20] = values[:20]  # equal samples
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return Chunk(
        rows=np.arange(samples),
        uids=generator.integers(0, 2**63, (samples, 2)).astype(np.uint64),
        features={"a_img": torch.from_numpy(values.astype(np.float16))},
    )


def eager(chunk: Chunk, left: np.ndarray, selector: VasD) -> np.ndarray:
    """The step at which each of `left` goes: the released loop in float64, ties by uid."""
    x = chunk.features["a_img"].double().numpy()
    draw = selector.drawn if isinstance(selector, NormSimD) else None
    removal = np.full(len(chunk), -1)
    removal[left] = selector.steps
    pool = chunk.rows if selector.initial == "pool" else left
    sizes = remaining_samples(len(left), int(selector.fraction * len(chunk)), selector.steps)
    for step, size in enumerate(sizes):
        if size == len(left):
            break
        base = pool if step == 0 else left
        base = base if draw is None else base[draw(base, chunk.uids[base], step)]
        covariance = x[base].T @ x[base] / len(base)
        scores = np.einsum("ni,ij,nj->n", x[left], covariance, x[left]).astype(np.float32)
        kept = keep_top(scores, chunk.uids[left], size) > 0
        removal[left[~kept]] = step
        left = left[kept]
    return removal


def make(method: str, **options: Any) -> VasD:
    if method == "vas_d":
        return VasD(features="a", **options)
    return NormSimD(features="a", seed=3, sample_fraction=0.5, **options)


@pytest.mark.parametrize("method", ["vas_d", "normsim_d"])
@pytest.mark.parametrize("initial", ["pool", "left"])
def test_contract(method: str, initial: str) -> None:
    check_selector(lambda: make(method, fraction=0.3, steps=7, initial=initial))


@given(
    method=st.sampled_from(["vas_d", "normsim_d"]),
    initial=st.sampled_from(["pool", "left"]),
    seed=st.integers(0, 2**31),
    samples=st.integers(50, 300),
    fraction=st.floats(0.01, 1),
    steps=st.integers(1, 30),
    many=st.sampled_from([0.0, elimination._MANY_UNDECIDED]),
    growth=st.sampled_from([0.0, elimination._GROWTH]),
)
@settings(max_examples=40, deadline=None)
def test_equals_eager_loop(
    method: str,
    initial: str,
    seed: int,
    samples: int,
    fraction: float,
    steps: int,
    many: float,
    growth: float,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elimination, "_MANY_UNDECIDED", many)  # 0: always estimate
        patch.setattr(elimination, "_GROWTH", growth)  # 0: renew the reference often
        check_against_eager_loop(method, initial, seed, samples, fraction, steps)


def check_against_eager_loop(
    method: str, initial: str, seed: int, samples: int, fraction: float, steps: int
) -> None:
    chunk = clustered(samples, seed=seed)
    left = np.flatnonzero(np.random.default_rng(seed).random(samples) < 0.7)
    selector = make(method, fraction=fraction, steps=steps, initial=initial)
    choice = selector.select(MemorySource(chunk).restrict(left))
    assert choice.scores is not None
    np.testing.assert_array_equal(choice.scores.astype(int), eager(chunk, left, selector)[left])
    assert choice.multiplicities.sum() == min(int(fraction * samples), len(left))


def test_schedule() -> None:
    assert remaining_samples(3600, 2400, 10) == [3480 - 120 * t for t in range(10)]
    assert remaining_samples(10, 7, 2) == [8, 7]
    # the released schedule asks for the fourth time for one of no samples: 3 * ceil(5 / 4) > 5
    assert remaining_samples(10, 5, 4) == [8, 6, 5, 5]
    assert remaining_samples(5, 10, 3) == [5, 5, 5]
    assert remaining_samples(0, 0, 1) == [0]


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 200))
def test_schedule_ends_at_the_target(samples: int, target: int, steps: int) -> None:
    sizes = remaining_samples(samples, target, steps)
    assert len(sizes) == steps
    assert sizes[-1] == min(samples, target)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_few_samples_are_scored(monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    monkeypatch.setattr(elimination, "MEMORY_BYTES", kept_bytes)
    chunk = clustered(3000)
    samples = Samples(
        "Test",
        MemorySource(chunk, chunk_samples=100),
        VasD(features="a", fraction=0.3, steps=1).requires,
    )
    forms, left, x = LazyForms(samples), np.arange(3000), chunk.features["a_img"].double()
    for _ in range(100):
        covariance = x[left].T @ x[left] / len(left)
        forms.move(covariance)
        lowest = forms.lowest(left, 10)
        scores = torch.einsum("ni,ij,nj->n", x[left], covariance, x[left]).float().numpy()
        expected = keep_top(scores, chunk.uids[left], len(left) - 10) == 0
        np.testing.assert_array_equal(lowest, expected)
        left = left[~lowest]
    assert forms.scored < 0.25 * 100 * 2500


@pytest.mark.parametrize("estimates", [False, True])
def test_scores_within_their_bounds(estimates: bool) -> None:
    chunk = clustered(400, dim=40)
    x = chunk.features["a_img"].double()
    samples = Samples("Test", MemorySource(chunk), make("vas_d", fraction=1, steps=1).requires)
    forms, everything = LazyForms(samples), np.arange(400)
    for count in (400, 380, 350, 300, 100):
        covariance = x[:count].T @ x[:count] / count
        forms.move(covariance)
        if count == 400:
            forms.lowest(everything, 1)
        if estimates:
            forms._estimate(everything[:300])
        middle, reach = forms._bounds(everything)
        exact = torch.einsum("ni,ij,nj->n", x, covariance, x).numpy()
        assert (np.abs(exact - middle) <= reach).all()
        if estimates and count < 380:
            assert reach[:300].max() < 0.5 * reach[300:].min()


@pytest.mark.parametrize("sign", [-1, 1])
def test_bounds_hold_in_directions_that_a_change_leaves_alone(sign: int) -> None:
    """All large values of a change have one sign, and what is orthogonal to them moves by 0."""
    chunk = clustered(300, dim=40)
    x = chunk.features["a_img"].double()
    samples = Samples("Test", MemorySource(chunk), make("vas_d", fraction=1, steps=1).requires)
    forms, everything = LazyForms(samples), np.arange(300)
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator).double())
    matrix = torch.eye(40, dtype=torch.float64) / 2
    forms.move(matrix)
    forms.lowest(everything, 1)
    for number in range(3):
        large = directions[:, 16 * number % 40 :][:, :16]  # as many as a large part holds
        matrix = matrix + sign * 0.1 * (large @ large.T)
        forms.move(matrix)
        middle, reach = forms._bounds(everything)
        exact = torch.einsum("ni,ij,nj->n", x, matrix, x).numpy()
        assert (np.abs(exact - middle) <= reach).all()


def test_estimates_spare_scores_where_matrices_are_noisy() -> None:
    chunk = clustered(4000, dim=40)
    x, generator = chunk.features["a_img"].double(), np.random.default_rng(0)
    samples = Samples("Test", MemorySource(chunk), make("vas_d", fraction=1, steps=1).requires)
    forms, left = LazyForms(samples), np.arange(4000)
    for _ in range(20):
        drawn = x[generator.choice(left, 800, replace=False)]
        forms.move(drawn.T @ drawn / 800)
        scores = torch.einsum("ni,ij,nj->n", x[left], forms._current(), x[left]).float().numpy()
        lowest = forms.lowest(left, 20)
        expected = keep_top(scores, chunk.uids[left], len(left) - 20) == 0
        np.testing.assert_array_equal(lowest, expected)
        left = left[~lowest]
    assert forms.scored < 0.3 * 20 * 3800


def test_exact_scores_are_those_of_float64_rounded() -> None:
    x = clustered(2000).features["a_img"]
    matrix = x.double().T @ x.double() / len(x)
    expected = np.einsum("ni,ij,nj->n", x.double(), matrix, x.double()).astype(np.float32)
    np.testing.assert_array_equal(elimination.exact_quadratic_form(x, matrix).numpy(), expected)


@pytest.mark.parametrize("many", [0, 100])
def test_rounding_of_float32_does_not_decide(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    # as much noise as float32 may have, on samples of which many are nearly equal
    generator = np.random.default_rng(0)
    chunk = clustered(200)
    features = chunk.features["a_img"]
    features[:] = features[:5].repeat(40, 1)
    features[:, 0] += torch.from_numpy(generator.integers(-1, 2, 200) * 2.0**-14).half()
    exact, low_rank = elimination.quadratic_form, elimination.low_rank_form

    def noisy(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        reach = 2 * len(matrix) * 2.0**-24 * float(torch.linalg.matrix_norm(matrix))
        return exact(x, matrix) + reach * torch.from_numpy(generator.uniform(-1, 1, len(x))).float()

    def noisy_estimate(x: torch.Tensor, basis: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        reach = 2 * len(basis) * 2.0**-24 * float(values.abs().sum())
        noise = torch.from_numpy(generator.uniform(-1, 1, len(x))).float()
        return low_rank(x, basis, values) + reach * noise

    monkeypatch.setattr(elimination, "quadratic_form", noisy)
    monkeypatch.setattr(elimination, "low_rank_form", noisy_estimate)
    monkeypatch.setattr(elimination, "_MANY_UNDECIDED", many)
    selector = make("vas_d", fraction=0.1, steps=20)
    choice = selector.select(MemorySource(chunk))
    assert choice.scores is not None
    np.testing.assert_array_equal(choice.scores.astype(int), eager(chunk, chunk.rows, selector))


@pytest.mark.parametrize("method", ["vas_d", "normsim_d"])
def test_ranks_chunks_and_memory_do_not_matter(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    chunk = clustered()

    monkeypatch.setattr(elimination, "_MANY_UNDECIDED", 0)

    def select(ranks: Ranks) -> Any:
        source = MemorySource(chunk, ranks=ranks, chunk_samples=17, part_samples=40)
        return make(method, fraction=0.3, steps=9).select(source)

    expected = run_on_ranks(1, select)[0]
    answers = [*run_on_ranks(2, select), *run_on_ranks(4, select)]
    monkeypatch.setattr(elimination, "MEMORY_BYTES", 1000)
    for choice in (*answers, *run_on_ranks(2, select)):
        np.testing.assert_array_equal(choice.scores, expected.scores)
        np.testing.assert_array_equal(choice.multiplicities, expected.multiplicities)


def test_more_ranks_than_samples(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]],
) -> None:
    chunk = clustered(50)

    def select(ranks: Ranks) -> Any:
        source = MemorySource(chunk, ranks=ranks).restrict(np.array([4, 9]))
        return VasD(features="a", fraction=0.02, steps=3).select(source)

    expected = run_on_ranks(1, select)[0]
    assert expected.multiplicities.sum() == 1
    for choice in run_on_ranks(4, select):
        np.testing.assert_array_equal(choice.scores, expected.scores)


def test_all_equal_samples_go_by_uid() -> None:
    uids = np.array([[0, 5], [0, 1], [0, 4], [0, 2], [0, 3]], dtype=np.uint64)
    chunk = Chunk(rows=np.arange(5), uids=uids, features={"a_img": torch.ones(5, 3) / 3**0.5})
    choice = VasD(features="a", fraction=0.4, steps=3).select(MemorySource(chunk))
    assert choice.scores is not None
    assert choice.scores.tolist() == [0, 3, 1, 3, 2]
    assert choice.multiplicities.tolist() == [0, 1, 0, 1, 0]


def test_unusable_samples_are_never_kept_and_in_no_covariance() -> None:
    chunk = clustered(100)
    features = chunk.features["a_img"]
    features[7], features[8, 0], features[9, 1] = 0, torch.nan, torch.inf
    good = np.setdiff1d(chunk.rows, [7, 8, 9])
    selector = make("vas_d", fraction=0.5, steps=4, initial="left")
    choice = selector.select(MemorySource(chunk))
    assert choice.scores is not None
    assert np.isnan(choice.scores[7:10]).all()
    assert choice.multiplicities[7:10].sum() == 0
    expected = selector.select(MemorySource(chunk).restrict(good)).scores
    np.testing.assert_array_equal(choice.scores[good], expected)
    pool = VasD(features="a", fraction=0.99, steps=1).select(MemorySource(chunk))
    assert pool.multiplicities.sum() == 97


class KeepingSource(MemorySource):
    """Remembers what was put, also for the next run."""

    def __init__(self, chunk: Chunk, kept: DictCache) -> None:
        super().__init__(chunk)
        self.kept = kept

    def cache(self, selector: object) -> DictCache:
        return self.kept


class Killed(Exception):
    pass


class KillingCache(DictCache):
    """Ends the run once a certain name is kept."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name: str | None = name

    def put(self, name: str, **arrays: np.ndarray) -> None:
        super().put(name, **arrays)
        if name == self.name:
            raise Killed


@pytest.mark.parametrize("method", ["vas_d", "normsim_d"])
def test_killed_run_continues(method: str) -> None:
    chunk = clustered()
    expected = make(method, fraction=0.3, steps=20).select(MemorySource(chunk))
    cache = KillingCache("step-12")
    with pytest.raises(Killed):
        make(method, fraction=0.3, steps=20).select(KeepingSource(chunk, cache))
    cache.name = None
    for name in [f"step-{step}" for step in range(2, 12, 2)]:
        del cache._kept[name]  # only the last one may be needed
    choice = make(method, fraction=0.3, steps=20).select(KeepingSource(chunk, cache))
    np.testing.assert_array_equal(choice.scores, expected.scores)
    assert "step-4" not in cache._kept  # what was done is not done again


def test_draws_are_fresh_at_each_step() -> None:
    selector = NormSimD(features="a", fraction=0.3, steps=3, seed=1)
    chunk = clustered(1000)
    first, second = (selector.drawn(chunk.rows, chunk.uids, step) for step in (0, 1))
    assert first.sum() == second.sum() == 100
    assert 0 < (first & second).sum() < 40
    other = NormSimD(features="a", fraction=0.3, steps=3, seed=2).drawn(chunk.rows, chunk.uids, 0)
    assert (first & other).sum() < 40
    assert selector.drawn(chunk.rows[:3], chunk.uids[:3], 0).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"initial": "all"}, "initial must be one of pool, left"),
        ({"sample_fraction": 0}, "sample_fraction"),
        ({"seed": -1}, "seed"),
    ],
)
def test_faults_of_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NormSimD(**{"features": "a", "fraction": 0.3, "steps": 3, "seed": 0, **options})


@pytest.mark.testbed
@pytest.mark.parametrize("name", ["vasd_l14_T1", "vasd_l14_T10", "vasd_l14_T50"])
def test_vas_d_agrees_with_released_code(
    name: str,
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
) -> None:
    expected = reference(name)
    source = reference_source(reference("inputs_l14"), "l14")
    left = source.restrict(np.sort(expected["rows_after_clip"]))
    selector = VasD(features="l14", fraction=0.3, steps=int(name.split("_T")[1]))
    check_removals(f"vas-d l14, T={selector.steps}", selector, left, expected, conformance)


@pytest.mark.testbed
@pytest.mark.parametrize("name", ["normsimd_l14_T10", "normsimd_l14_T50"])
def test_normsim_d_agrees_with_released_code(
    name: str,
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = reference(name)
    source = reference_source(reference("inputs_l14"), "l14")
    left = source.restrict(np.sort(expected["rows_after_clip"]))
    drawn = np.split(expected["sample_rows"], np.cumsum(expected["sample_len"])[:-1])
    selector = NormSimD(features="l14", fraction=0.2, steps=int(name.split("_T")[1]), seed=0)
    monkeypatch.setattr(selector, "drawn", lambda rows, uids, step: np.isin(rows, drawn[step]))
    check_removals(f"normsim-d l14, T={selector.steps}", selector, left, expected, conformance)


def check_removals(
    case: str,
    selector: VasD,
    left: Source,
    expected: Mapping[str, np.ndarray],
    conformance: Callable[..., None],
) -> None:
    choice = selector.select(left)
    assert choice.scores is not None
    removed = expected["removed_iter"][left.rows].astype(int)
    removed[removed == -1] = selector.steps
    conformance(
        case,
        scores=choice.scores,  # the step of the removal of each sample
        expected_scores=removed,
        limit=0,
        kept=left.rows[choice.multiplicities > 0],
        expected_kept=expected["rows_final"],
    )
