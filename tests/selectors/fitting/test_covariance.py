"""Exact second moments and the quadratic forms, against loops and float64."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import siftclip.selectors.fitting.covariance as covariance
from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import Chunk, FeatureFile, Requirements
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import DictCache
from siftclip.selectors.fitting.covariance import (
    UNIT,
    bilinear_form,
    file_moment,
    kept_moment,
    large_part,
    low_rank_form,
    mean_moment,
    pool_moment,
    quadratic_form,
    rows_of,
    second_moment,
)

IMAGE = Requirements(features=("a_img",))

needs_int8 = pytest.mark.usefixtures("int8")


def unit(samples: int, dim: int, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng([seed, samples, dim]).standard_normal((samples, dim))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return torch.from_numpy(values.astype(np.float16))


def source(features: torch.Tensor, **options: Any) -> MemorySource:
    count = len(features)
    uids = np.stack([np.zeros(count), np.arange(count)], axis=1).astype(np.uint64)
    chunk = Chunk(rows=np.arange(count), uids=uids, features={"a_img": features})
    return MemorySource(chunk, trusted=True, **options)  # also vectors of other lengths


def test_second_moment_is_the_sum_of_rounded_products() -> None:
    x = unit(7, 3)
    for i in range(3):
        for j in range(3):
            expected = sum(
                round(Fraction(float(row[i])) / Fraction(UNIT))
                * round(Fraction(float(row[j])) / Fraction(UNIT))
                for row in x
            )
            assert second_moment(x)[i, j].item() == expected


@pytest.mark.parametrize("dim", [1, 127, 128, 300])
def test_second_moment_is_close_to_float64(dim: int) -> None:
    x, y = unit(500, dim), unit(500, 5, seed=1)
    mean = mean_moment(second_moment(x), 500)
    torch.testing.assert_close(mean, x.double().T @ x.double() / 500, rtol=0, atol=1e-7)
    torch.testing.assert_close(mean, mean.T, rtol=0, atol=0)
    cross = mean_moment(second_moment(x, y), 500)
    torch.testing.assert_close(cross, x.double().T @ y.double() / 500, rtol=0, atol=1e-7)


@given(st.integers(0, 5000), st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_sum_depends_neither_on_order_nor_on_pieces(cut: int, seed: int) -> None:
    x = unit(5000, 9)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(5000))
    parts = second_moment(x[order][:cut]) + second_moment(x[order][cut:])
    assert torch.equal(parts, second_moment(x))


def test_unusable_samples_are_left_out() -> None:
    x = unit(4, 3)
    bad = torch.tensor([[torch.nan, 0, 0], [torch.inf, 1, 0], [0, 0, 0]], dtype=torch.float16)
    mixed = torch.cat([bad[:1], x, bad[1:]])
    assert torch.equal(second_moment(mixed), second_moment(x))
    assert torch.equal(second_moment(mixed, mixed), second_moment(x, x))
    _, count = pool_moment("Test", source(mixed), np.arange(7), IMAGE)
    assert count == 4


@pytest.mark.parametrize("dim", [1, 63, 64, 65, 200])
def test_quadratic_form(dim: int) -> None:
    x = unit(700, dim)
    matrix = torch.from_numpy(np.random.default_rng(3).standard_normal((dim, dim)))
    expected = torch.einsum("ni,ij,nj->n", x.double(), matrix, x.double())
    scores = quadratic_form(x, matrix)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-6 * dim**0.5)
    y = unit(700, 4, seed=2)
    expected = torch.einsum("ni,ij,nj->n", x.double(), matrix[:, :1].expand(dim, 4), y.double())
    got = bilinear_form(x, y, matrix[:, :1].expand(dim, 4))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6 * dim**0.5)


def test_quadratic_form_of_no_samples() -> None:
    assert quadratic_form(torch.empty(0, 4), torch.eye(4)).shape == (0,)


@needs_int8
@pytest.mark.parametrize("dim", [1, 5, 130, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 3.0, 20.0])
def test_digits_give_the_same_sums_as_float64(
    monkeypatch: pytest.MonkeyPatch, dim: int, dtype: torch.dtype, scale: float
) -> None:
    x = unit(200, dim).to(dtype) * scale
    x[3], x[4, 0] = 0, torch.nan
    whole = (x[5:].double() / UNIT).round()
    whole = torch.cat([(x[:3].double() / UNIT).round(), whole])
    monkeypatch.setattr(covariance, "int8_is_fast", lambda: False)
    plain = second_moment(x)
    monkeypatch.setattr(covariance, "int8_is_fast", lambda: True)
    assert torch.equal(second_moment(x), plain)
    assert torch.equal(plain, (whole.T @ whole).long())


def test_digits_and_their_sums_are_right_for_all_whole_numbers() -> None:
    largest = int(3.9 / UNIT)
    whole = torch.arange(-largest, largest + 1)
    a, b, c, *sums = covariance._digits((whole * UNIT)[:, None].float())
    assert torch.equal((a.int() * 2**14 + b.int() * 2**7 + c.int())[:, 0], whole.int())
    for (left, right), total in zip([(a, b), (a, c), (b, c)], sums, strict=True):
        assert torch.equal(left.int() + right.int(), total.int())


@needs_int8
@pytest.mark.parametrize("value", [3.9, -3.9, 1.0, 2.0**-5, 2.0**-18 * 63, 2.0**-18 * 64])
def test_digits_of_a_full_piece_do_not_overflow(value: float) -> None:
    x = torch.full((4096, 3), value, dtype=torch.float64)
    x[:, 1] *= -1
    whole = round(value / UNIT)
    expected = 4096 * whole * whole
    assert second_moment(x).tolist() == [
        [expected, -expected, expected],
        [-expected, expected, -expected],
        [expected, -expected, expected],
    ]


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-6, 1e6),
    dim=st.integers(2, 60),
    decay=st.floats(0, 1),
    guesses=st.integers(1, 8),
)
@settings(max_examples=40, deadline=None)
def test_rest_of_a_large_part_is_within_its_bound(
    seed: int, scale: float, dim: int, decay: float, guesses: int
) -> None:
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.standard_normal((dim, dim)))[0]
    eigenvalues = generator.standard_normal(dim) * scale * np.arange(1, dim + 1.0) ** (-3 * decay)
    matrix = torch.from_numpy((turn * eigenvalues) @ turn.T)
    start = torch.from_numpy(generator.standard_normal((dim, min(dim, guesses)))).float()
    basis, values, bound = large_part(matrix, start)
    rest = matrix - (basis.double() * values.double()) @ basis.double().T
    assert torch.linalg.matrix_norm(rest, 2) <= bound
    assert bound <= dim**0.25 * torch.linalg.matrix_norm(rest, 2) + 1e-4 * scale * dim
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(values)), rtol=0, atol=1e-5)


def test_large_part_of_few_directions_is_all() -> None:
    basis = torch.linalg.qr(unit(40, 3).double())[0]
    matrix = (basis * torch.tensor([2.0, -1.0, 0.5])) @ basis.T
    found, values, bound = large_part(matrix, unit(40, 5, seed=1).float())
    assert bound < 1e-4
    torch.testing.assert_close(
        values.sort().values, torch.tensor([-1.0, 0, 0, 0.5, 2.0]), rtol=0, atol=1e-5
    )
    _, values, bound = large_part(matrix * 0, found)
    assert (bound, values.abs().sum()) == (0.0, 0.0)


def test_low_rank_form_is_that_of_float64() -> None:
    x, basis, values = unit(700, 30), unit(30, 4).float(), torch.tensor([2.0, -1.0, 0.0, 3.0])
    expected = ((x.double() @ basis.double()) ** 2 * values.double()).sum(1)
    torch.testing.assert_close(low_rank_form(x, basis, values), expected.float(), rtol=0, atol=1e-5)
    assert low_rank_form(x[:0], basis, values).shape == (0,)


def test_moments_are_equal_on_any_number_of_ranks(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]],
) -> None:
    features, target = unit(33, 5), unit(23, 5, seed=1)
    file = FeatureFile(path="t.npz")

    def moments(ranks: Ranks, size: int = 4) -> tuple[Any, ...]:
        pool = source(features, ranks=ranks, chunk_samples=size, files={file: target})
        rows = rows_of(pool, IMAGE)
        few = pool_moment("Test", pool, rows[:2], IMAGE)  # some ranks have none
        return *pool_moment("Test", pool, rows, IMAGE), *few, *file_moment("Test", pool, (file,))

    expected = run_on_ranks(1, moments)[0]
    assert expected[1::2] == (33, 2, 23)
    assert torch.equal(expected[0], second_moment(features))
    assert torch.equal(expected[4], second_moment(target))
    for answer in (*run_on_ranks(2, moments), *run_on_ranks(4, moments)):
        assert answer[1::2] == expected[1::2]
        assert all(map(torch.equal, answer[::2], expected[::2]))


def test_target_arrays_must_be_aligned() -> None:
    files = (FeatureFile(path="t.npz", key="img"), FeatureFile(path="t.npz", key="txt"))
    for count in (4, 8, 9):
        pool = source(
            unit(3, 5), chunk_samples=4, files={files[0]: unit(5, 5), files[1]: unit(count, 5)}
        )
        with pytest.raises(InputError, match=r"t\.npz \(img\) and t\.npz \(txt\).*as many rows"):
            file_moment("Test", pool, files)


def test_too_large_features_are_refused() -> None:
    with pytest.raises(InputError, match="Test: the features are too large"):
        pool_moment("Test", source(torch.full((40, 2), 9000.0)), np.arange(40), IMAGE)


def test_kept_moment_is_not_computed_again() -> None:
    cache, pool = DictCache(), source(unit(3, 2))
    sums = second_moment(unit(3, 2))
    assert kept_moment(pool, cache, "m", lambda: (sums, 3))[1] == 3

    def never() -> Any:
        raise AssertionError

    again, count = kept_moment(pool, cache, "m", never)
    assert count == 3
    assert torch.equal(again, sums)
