"""NormSim and the search for the largest product, against loops and the authors' outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import FeatureFile, Requirements
from siftclip.selectors.core.checks import check_selector, synthetic_chunk
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.fitting.covariance import quadratic_form
from siftclip.selectors.kernels.hardware import int8_is_fast
from siftclip.selectors.kernels.largest_product import (
    GROUP,
    Int8Targets,
    largest_product,
)
from siftclip.selectors.methods.normsim import NormSim, normsim, normsim_2

FILE = FeatureFile(path="t.npz")
needs_int8 = pytest.mark.usefixtures("int8")
pytestmark = pytest.mark.usefixtures("int8_where_exact")


@pytest.mark.parametrize("p", [1, 2, 3.5, "inf"])
def test_contract(p: float) -> None:
    check_selector(
        lambda: NormSim(features="a", target=FeatureFile(path="t.npz"), p=p, fraction=0.3)
    )


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 50, math.inf])
@pytest.mark.parametrize("targets", [1, 7])
def test_equals_loop(p: float, targets: int) -> None:
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.standard_normal((6, 4)).astype("f2"))
    g = torch.from_numpy(generator.standard_normal((targets, 4)).astype("f2"))
    for row, score in zip(x, normsim(x, g, p), strict=True):
        products = [abs(sum(float(a) * float(b) for a, b in zip(row, t, strict=True))) for t in g]
        expected = max(products) if p == math.inf else sum(v**p for v in products) ** (1 / p)
        assert score.item() == pytest.approx(expected, rel=2e-5)


def test_blocks_of_targets_are_joined() -> None:
    generator = np.random.default_rng(1)
    x, g = (torch.from_numpy(generator.standard_normal((n, 3))) / 3 for n in (2, 9000))
    for p in (3.0, 80.0):
        expected = torch.linalg.vector_norm(x @ g.T, ord=p, dim=1)
        torch.testing.assert_close(normsim(x, g, p).double(), expected, rtol=1e-4, atol=0)


def test_small_similarities_have_a_norm() -> None:
    # 0.001^30 is too small for float32
    x = torch.tensor([[0.001, 0.0]])
    assert normsim(x, torch.eye(2), 30).item() == pytest.approx(0.001)
    assert normsim(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), 3).item() == 0


def test_samples_orthogonal_to_the_target_score_next_to_nothing() -> None:
    """The form is 0, and its rounding of either sign: no sample may become NaN."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(40, 32, generator=generator)
    g[:, 24:] = 0
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator).double())
    x = torch.zeros(500, 32)
    x[:, 24:] = torch.nn.functional.normalize(torch.randn(500, 8, generator=generator))
    moment = (turn @ (g.double().T @ g.double()) @ turn.T).float()
    x = (x.double() @ turn.T).float()
    assert (quadratic_form(x, moment) < 0).any()  # else nothing is tested
    scores = normsim_2(x, moment)
    assert bool((scores >= 0).all())
    # d roundings of a float32 sum, under a square root
    assert float(scores.max()) <= math.sqrt(32 * 2.0**-24 * float(torch.linalg.matrix_norm(moment)))


def clustered(samples: int, dim: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((5, dim))
    values = centres[generator.integers(0, 5, samples)]
    values = values + 0.7 * generator.standard_normal((samples, dim)) + shift
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return torch.from_numpy(values.astype(np.float16))


@needs_int8
@given(
    samples=st.integers(1, 40),
    targets=st.integers(1, 700),
    dim=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    shift=st.sampled_from([0.0, 1.0, -20.0]),
)
@settings(max_examples=25, deadline=None)
def test_int8_search_is_exact(
    samples: int, targets: int, dim: int, seed: int, shift: float
) -> None:
    x, g = clustered(samples, dim, seed), clustered(targets, dim, seed + 1, shift=shift)
    expected = (x.double() @ g.double().T).abs().amax(1)
    for found in (Int8Targets(g).search(x), largest_product(x, g)):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@needs_int8
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_int8_search_of_unusual_targets(scale: float) -> None:
    x = clustered(30, 16, 0).float()
    x[3] = 0
    x[4] *= 50
    for g in (
        torch.full((5, 16), scale),
        -scale * clustered(100, 16, 1).float(),  # the largest product is negative
        scale * torch.cat([torch.eye(16) * 30, clustered(500, 16, 2).float()]),  # outliers
        torch.zeros(3, 16),
    ):
        expected = (x.double() @ g.double().T).abs().amax(1)
        found = Int8Targets(g).search(x).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


@needs_int8
def test_int8_search_skips_most_targets() -> None:
    x, g = clustered(200, 64, 0), clustered(3000, 64, 1)
    search, multiplied = Int8Targets(g), 0
    improve = search._improve

    def counting(best: Any, features: Any, groups: torch.Tensor, start: int) -> None:
        nonlocal multiplied
        multiplied += int(groups.sum())
        improve(best, features, groups, start)

    search._improve = counting  # type: ignore[method-assign]
    search.search(x)
    assert multiplied < 0.5 * 200 * 3000 / GROUP


@needs_int8
def test_int8_search_leaves_bad_samples_to_themselves() -> None:
    x, g = clustered(5, 8, 0).float(), clustered(64, 8, 1)
    expected = Int8Targets(g).search(x)
    x[1, 0], x[3, 2] = torch.nan, torch.inf
    found = Int8Targets(g).search(x)
    # products of other shapes: the last bit of a sum is up to the CPU
    torch.testing.assert_close(found[[0, 2, 4]], expected[[0, 2, 4]], rtol=0, atol=2.0**-22)
    assert found[[1, 3]].isnan().all()
    assert Int8Targets(g).search(x[[1]]).isnan().all()


@pytest.mark.parametrize("p", [2, "inf"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]], p: Any, ranks: int
) -> None:
    chunk = synthetic_chunk(Requirements(features=("a_img",)))
    files = {FILE: clustered(1500, 16, 3)}

    def select(ranks: Ranks) -> Any:
        selector = NormSim(features="a", target=FeatureFile(path="t.npz"), p=p, fraction=0.3)
        return selector.select(MemorySource(chunk, files=files, ranks=ranks, part_samples=60))

    expected = run_on_ranks(1, select)[0]
    for choice in run_on_ranks(ranks, select):
        np.testing.assert_array_equal(choice.scores, expected.scores)
        np.testing.assert_array_equal(choice.multiplicities, expected.multiplicities)


@pytest.mark.parametrize("p", [2, 3, "inf"])
def test_bad_targets_are_left_out(p: Any) -> None:
    chunk = synthetic_chunk(Requirements(features=("a_img",)))
    good = clustered(50, 16, 0)
    bad = torch.full((2, 16), torch.nan, dtype=torch.float16)
    bad[1] = 0

    def scores(target: torch.Tensor) -> np.ndarray:
        selector = NormSim(features="a", target=FeatureFile(path="t.npz"), p=p, fraction=0.3)
        return selector.scores(MemorySource(chunk, files={FILE: target}))

    np.testing.assert_array_equal(scores(torch.cat([bad, good])), scores(good))
    with pytest.raises(InputError, match=r"t\.npz has no rows that are finite"):
        scores(bad)
    with pytest.raises(InputError, match=r"have 16 components.*8.*another model"):
        scores(good[:, :8])


@pytest.mark.parametrize("p", [0.5, True, "two", math.nan])
def test_faults_of_p(p: Any) -> None:
    with pytest.raises(InputError, match=r"p must be a number of at least 1, or inf"):
        NormSim(features="a", target=FeatureFile(path="t"), p=p, fraction=0.3)


@pytest.mark.testbed
@pytest.mark.parametrize("arch", ["l14", "b32"])
@pytest.mark.parametrize("p", [1, 2, 3, "inf"])
def test_agrees_with_released_code(
    arch: str,
    p: Any,
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
) -> None:
    inputs, expected = reference(f"inputs_{arch}"), reference(f"normsim_{arch}")
    source = reference_source(inputs, arch)
    source._files = {FILE: torch.from_numpy(inputs["tgt_img"])}
    choice = NormSim(features=arch, target=FeatureFile(path="t.npz"), p=p, fraction=0.2).select(
        source
    )
    name = "inf" if p == "inf" else f"p{p}"
    assert choice.scores is not None
    rows = expected.get(f"rows_top20_{name}")
    conformance(
        f"normsim {arch} {name}" + ("" if rows is None else ", top 20 %"),
        scores=choice.scores,
        expected_scores=expected[name],
        limit=2e-6 * max(1.0, float(expected[name].max())),
        kept=None if rows is None else np.flatnonzero(choice.multiplicities),
        expected_kept=rows,
        cut_limit=2e-6 * max(1.0, float(expected[name].max())),
    )
    if p == "inf" and int8_is_fast():
        found = Int8Targets(source._files[FILE]).search(torch.from_numpy(inputs["img"]))
        np.testing.assert_allclose(found.numpy(), expected["inf"], rtol=0, atol=2e-6)
