"""Similarities of at most a threshold, against the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from siftclip.selectors.kernels import low_similarities as module
from siftclip.selectors.kernels.low_similarities import BFLOAT16_ERROR, low_similarities


def features(seed: int, count: int, *, offset: float, dim: int = 24) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal((count, dim)) + offset
    return torch.from_numpy(values / np.linalg.norm(values, axis=1, keepdims=True)).half()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("tile", [(1024, 4096), (7, 5)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, -2.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 0.4, 3.0])
def test_equals_whole_matrix(
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
    tile: tuple[int, int],
    threshold: float,
    offset: float,
) -> None:
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda device: fast)
    monkeypatch.setattr(module, "TILE", tile)
    images, texts = features(1, 40, offset=offset), features(2, 29, offset=offset)
    matrix = images.double() @ texts.double().T
    low = matrix <= threshold
    found = low_similarities(images, texts, threshold)
    expected = matrix.masked_fill(~low, 0.0)
    torch.testing.assert_close(found.image_sums, expected.sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_sums, expected.sum(0), rtol=0, atol=1e-5)
    assert torch.equal(found.image_low, low.any(1))
    assert torch.equal(found.text_low, low.any(0))


def test_bound_covers_bfloat16() -> None:
    # every rounding goes down: 1 + 2^-8 - 2^-11 becomes 1
    for dim in (1, 64, 768):
        worst = torch.full((1, dim), 1 + 2.0**-8 - 2.0**-11)
        product = float((worst.bfloat16() @ worst.bfloat16().T).float())
        exact = float(worst.double() @ worst.double().T)
        assert abs(product - exact) <= BFLOAT16_ERROR * exact
    images, texts = features(3, 300, offset=0.2), features(4, 300, offset=0.1)
    error = (images.bfloat16() @ texts.bfloat16().T).double() - images.double() @ texts.double().T
    assert float(error.abs().max()) < BFLOAT16_ERROR * 1.001  # norms are 1 but for float16


def test_entries_that_bfloat16_misjudges_are_found() -> None:
    # the product is 0 in bfloat16, and below zero
    images = torch.tensor([[1.0, 1.0 + 2.0**-10]], dtype=torch.float16)
    texts = torch.tensor([[1.0, -1.0]], dtype=torch.float16)
    found = low_similarities(images, texts, 0.0)
    assert found.image_sums.tolist() == [-(2.0**-10)]
    assert found.text_low.tolist() == [True]
