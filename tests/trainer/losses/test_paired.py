"""The tiled log-sum-exps and expectations against dense ones, and their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from siftclip.trainer.losses import DistillLoss, LossInputs, ReferenceGuidedLoss, SoftmaxLoss, tiles
from siftclip.trainer.losses.paired import paired_expectation, paired_log_sum_exp

SIZES = {"rows": st.integers(1, 9), "columns": st.integers(1, 11), "dim": st.integers(1, 4)}
TILES = st.tuples(st.integers(1, 5), st.integers(1, 5))
SCALES = st.sampled_from([0.01, 1.0, 14.3, 100.0, 3000.0])  # logits of some ten thousand


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_log_sum_exp(
    image: Tensor, text: Tensor, skip_diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """One logit at a time."""
    rows, columns = range(len(image)), range(len(text))
    logits = {
        (i, j): image[i] @ text[j]
        for i in rows
        for j in columns
        if skip_diagonal is None or j != i + skip_diagonal
    }

    def over(terms: list[Tensor]) -> Tensor:
        return (
            torch.stack(terms).logsumexp(0) if terms else torch.tensor(-1e30, dtype=torch.float64)
        )

    return (
        torch.stack([over([logits[i, j] for j in columns if (i, j) in logits]) for i in rows]),
        torch.stack([over([logits[i, j] for i in rows if (i, j) in logits]) for j in columns]),
    )


def with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor, only: tuple[bool, bool]
) -> list[Tensor]:
    """Both results, and the gradients of a mixture of them for the first two tensors."""
    leaves = [tensor.clone() for tensor in tensors]
    for leaf, wanted in zip(leaves, only, strict=False):
        leaf.requires_grad_(wanted)
    rows, columns = function(*leaves)
    row_weights = normal(len(rows), seed=8) * (rows > -1e29)
    column_weights = normal(len(columns), seed=9) * (columns > -1e29)
    ((rows * row_weights).sum() + (columns * column_weights).sum()).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.requires_grad]
    return [rows.detach(), columns.detach(), *gradients]


@given(
    **SIZES,
    tile=TILES,
    scale=SCALES,
    skip=st.none() | st.integers(0, 6),
    only=st.sampled_from([(True, True), (True, False), (False, True)]),
)
@example(rows=1, columns=1, dim=2, tile=(1, 1), scale=1.0, skip=0, only=(True, True))
@example(rows=9, columns=9, dim=2, tile=(4, 3), scale=100.0, skip=0, only=(True, True))
def test_log_sum_exps_equal_dense_ones(
    rows: int,
    columns: int,
    dim: int,
    tile: tuple[int, int],
    scale: float,
    skip: int | None,
    only: tuple[bool, bool],
) -> None:
    image, text = normal(rows, dim, seed=1, scale=scale), normal(columns, dim, seed=2)
    found = with_gradients(
        lambda a, b: paired_log_sum_exp(a, b, skip_diagonal=skip, tile=tile),
        image,
        text,
        only=only,
    )
    if (rows, columns, skip) == (1, 1, 0):  # no logit is left
        assert torch.equal(found[0], torch.tensor([-1e30], dtype=torch.float64))
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found[2:])
        return
    expected = with_gradients(lambda a, b: dense_log_sum_exp(a, b, skip), image, text, only=only)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def dense_expectation(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    image, text, teacher_image, teacher_text, row_lse, column_lse = tensors
    rows, columns = [torch.zeros(()).double()] * len(image), [torch.zeros(()).double()] * len(text)
    for i in range(len(image)):
        for j in range(len(text)):
            logit, teacher = image[i] @ text[j], teacher_image[i] @ teacher_text[j]
            rows[i] = rows[i] + (teacher - row_lse[i]).exp() * logit
            columns[j] = columns[j] + (teacher - column_lse[j]).exp() * logit
    return torch.stack(rows), torch.stack(columns)


@given(
    **SIZES,
    tile=TILES,
    scale=SCALES,
    only=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_expectations_equal_dense_ones(
    rows: int,
    columns: int,
    dim: int,
    tile: tuple[int, int],
    scale: float,
    only: tuple[bool, bool],
) -> None:
    image, text = normal(rows, dim, seed=1), normal(columns, dim, seed=2)
    teacher_image = normal(rows, dim + 1, seed=3, scale=scale)
    teacher_text = normal(columns, dim + 1, seed=4)
    lses = paired_log_sum_exp(teacher_image, teacher_text)
    tensors = (image, text, teacher_image, teacher_text, lses[0], lses[1] + 0.3)
    found = with_gradients(lambda *args: paired_expectation(*args, tile=tile), *tensors, only=only)
    expected = with_gradients(dense_expectation, *tensors, only=only)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("skip", [None, 0, 2])
def test_gradcheck(skip: int | None) -> None:
    image = normal(5, 3, seed=1).requires_grad_()
    text = normal(7, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: paired_log_sum_exp(a, b, skip_diagonal=skip, tile=(2, 3)), (image, text)
    )
    teacher = (normal(5, 2, seed=3), normal(7, 2, seed=4), normal(5, seed=5), normal(7, seed=6))
    assert torch.autograd.gradcheck(
        lambda a, b: paired_expectation(a, b, *teacher, tile=(2, 3)), (image, text)
    )


def test_rows_far_apart_lose_nothing_in_float32() -> None:
    # One row's logits lie 20,000 above the other's; a common shift would leave it no digits.
    image = torch.tensor([[1e4, 0.0], [-1e4, 1.0], [0.0, 3.0]])
    text = torch.tensor([[1.0, 0.5], [1.0, -0.5], [-1.0, 2.0], [-1.0, 1.0]])
    rows, columns = paired_log_sum_exp(image, text, tile=(2, 3))
    exact = (image.double() @ text.double().T).logsumexp(1)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-6, atol=0)
    exact = (image.double() @ text.double().T).logsumexp(0)
    torch.testing.assert_close(columns.double(), exact, rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(
    "objective", [SoftmaxLoss(), DistillLoss(20.0), ReferenceGuidedLoss(epsilon=1e-4)]
)
def test_no_tensor_is_larger_than_features_and_tiles(
    objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, dim, tile = 300, 8, (40, 64)
    features = [
        F.normalize(normal(samples, dim, seed=seed), dim=1).requires_grad_() for seed in range(4)
    ]

    def largest() -> int:
        with LargestTensor() as watch:
            terms = objective(
                LossInputs(
                    image_features=features[0],
                    text_features=features[1],
                    logit_scale=torch.tensor(30.0, requires_grad=True),
                    teacher_image=features[2],
                    teacher_text=features[3],
                )
            )
            sum(terms.values()).backward()
        return watch.elements

    assert largest() >= samples * samples  # of which the usual tile holds all
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    assert largest() <= max(2 * samples * dim, tile[0] * tile[1])
