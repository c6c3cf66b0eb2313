"""Log-sum-exps of rows and columns, against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from siftclip.selectors.kernels import pair_log_sums as module
from siftclip.selectors.kernels.hardware import int8_is_fast
from siftclip.selectors.kernels.pair_log_sums import pair_log_sums, screened_log_sums

needs_int8 = pytest.mark.usefixtures("int8")
pytestmark = pytest.mark.usefixtures("int8_where_exact")


def slow_log_sums(query: Tensor, keys: Tensor, temperature: float) -> np.ndarray:
    sums = []
    for q in query.double().numpy():
        exponents = [float(q @ k) / temperature for k in keys.double().numpy()]
        top = max(exponents)
        sums.append(top + math.log(sum(math.exp(x - top) for x in exponents)))
    return np.array(sums)


def clip_like(
    samples: int, dim: int, seed: int, *, mean: float = 1.0, outliers: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Unit image and text features about two means, float16; some pairs agree, some do not."""
    generator = np.random.default_rng([seed, samples, dim])
    image = generator.standard_normal((samples, dim))
    agreement = generator.uniform(0, 0.7, (samples, 1))
    text = agreement * image + generator.standard_normal((samples, dim))
    features = []
    for values in (image, text):
        values = values / np.linalg.norm(values, axis=1, keepdims=True)
        direction = generator.standard_normal(dim)
        values += mean * direction / np.linalg.norm(direction)
        values[:, 0] += outliers
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        features.append(torch.from_numpy(values.astype(np.float16)))
    return features[0], features[1]


def check(image: Tensor, text: Tensor, temperature: float, atol: float = 1e-5) -> None:
    """In units of the score, half a temperature times the logarithm."""
    answers = pair_log_sums(image, text, temperature)
    expected = slow_log_sums(image, text, temperature), slow_log_sums(text, image, temperature)
    for answer, right in zip(answers, expected, strict=True):
        assert answer.dtype == torch.float32
        np.testing.assert_allclose(
            temperature / 2 * answer.numpy(), temperature / 2 * right, rtol=1e-6, atol=atol
        )


def check_screened(image: Tensor, text: Tensor, temperature: float) -> float:
    """The errors bound the difference; returns the largest error in units of the score."""
    sums = screened_log_sums(image, text, temperature)
    for value, error, own, other in (
        (sums.row, sums.row_error, image, text),
        (sums.column, sums.column_error, text, image),
    ):
        assert value.dtype == error.dtype == torch.float32
        assert (error >= 0).all()
        difference = np.abs(value.double().numpy() - slow_log_sums(own, other, temperature))
        assert (difference <= error.double().numpy()).all(), (difference, error)
    return temperature / 2 * float(torch.maximum(sums.row_error.max(), sums.column_error.max()))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dim=st.sampled_from([2, 3, 8, 16, 33]),
    temperature=st.sampled_from([0.01, 0.07, 1.0]),
    size=st.sampled_from([0.01, 1.0, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_equals_loops_for_any_shape_and_norm(
    rows: int, columns: int, dim: int, temperature: float, size: float, seed: int
) -> None:
    image, text = clip_like(max(rows, columns), dim, seed)
    image, text = size * image[:rows].float(), size * text[:columns].float()
    check(image, text, temperature, atol=2e-6 * max(1, size**2))
    if int8_is_fast():
        check_screened(image, text, temperature)


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (1, 20), (20, 1), (7, 19)])
def test_tiles_are_joined(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_TILE", 3)
    monkeypatch.setattr(module, "INTEGER_TILE", 4)
    image, text = clip_like(20, 16, 1)
    check(image[:rows], text[:columns], 0.01, atol=1e-6)
    if int8_is_fast():
        check_screened(image[:rows], text[:columns], 0.01)


def test_similarities_that_overflow_the_released_code() -> None:
    image = torch.eye(4)[[0, 0, 1, 2]]
    assert torch.exp(image[0] @ image[0] / 0.01).isinf()  # what the released code computes
    check(image, image, 0.01, atol=1e-6)
    check(image, -image, 0.01, atol=1e-6)
    if int8_is_fast():
        check_screened(image, image, 0.01)


def test_rows_far_below_the_largest_norm() -> None:
    image, text = (x.float() for x in clip_like(30, 8, 2))
    image[3] *= 1000
    text[5] *= 1000
    image[7] *= 1e-6
    check(image, text, 0.01, atol=1e-4)  # float32 rounding of products of 1000
    if int8_is_fast():
        check_screened(image, text, 0.01)


def test_norms_beyond_float32_are_not_trusted() -> None:
    image, text = (x.float() for x in clip_like(5, 8, 3))
    image[2] *= 1e30
    sums = screened_log_sums(image, text * 1e20, 0.01)
    assert sums.row_error.isinf().all()
    assert not sums.row.isnan().any()


def test_an_empty_side() -> None:
    row, column = pair_log_sums(torch.zeros(0, 4), torch.ones(3, 4), 0.1)
    assert row.shape == (0,)
    assert column.tolist() == [-math.inf] * 3


def test_float16_is_read_as_it_is() -> None:
    image, text = clip_like(25, 16, 4)
    row, column = pair_log_sums(image, text, 0.05)
    expected = pair_log_sums(image.float(), text.float(), 0.05)
    assert torch.equal(row, expected[0])
    assert torch.equal(column, expected[1])


@needs_int8
@pytest.mark.parametrize("outliers", [0.0, 3.0])
def test_screening_is_sharp_on_features_with_a_mean(outliers: float) -> None:
    image, text = clip_like(300, 64, 5, outliers=outliers)
    assert check_screened(image, text, 0.01) < 0.02
    # without the mean taken off, one large component would set every step
    centred = screened_log_sums(image, text, 0.01)
    exact, _ = pair_log_sums(image, text, 0.01)
    assert 0.005 * (centred.row - exact).abs().max() < 0.002


@needs_int8
def test_screening_of_equal_vectors() -> None:
    image = torch.full((9, 5), 0.4)
    assert check_screened(image, image, 0.01) < 1e-4  # nothing is left of them but the mean


@needs_int8
def test_a_sample_with_a_large_error_does_not_spoil_the_others() -> None:
    image, text = (x.float() for x in clip_like(200, 64, 6))
    before = screened_log_sums(image, text, 0.01).row_error.median()
    text[17] = -torch.eye(64)[0]  # alike to nothing, and badly rounded beside its one component
    after = screened_log_sums(image, text, 0.01).row_error.median()
    assert after < 1.3 * before
    check_screened(image, text, 0.01)
