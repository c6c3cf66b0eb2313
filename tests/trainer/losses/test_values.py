"""Each loss in one process: against open_clip's code, in precision, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss
from open_clip.loss import SigLipLoss as OpenClipSigLipLoss
from torch import Tensor

from siftclip.errors import InputError
from siftclip.trainer.losses import (
    ContrastiveLoss,
    DistillLoss,
    LossInputs,
    ReferenceGuidedLoss,
    SigLipLoss,
    SoftmaxLoss,
    caption_loss_sum,
    caption_tokens,
    tiles,
)

TINY_TILE = (3, 5)


@pytest.mark.parametrize(
    ("rows", "columns", "fits"),
    [(3, 5, True), (5, 3, True), (1, 15, True), (4, 4, False), (16, 1, False), (0, 99, True)],
)
def test_a_matrix_fits_a_tile_by_its_size(rows: int, columns: int, fits: bool) -> None:
    assert tiles.fits_one_tile(rows, columns, TINY_TILE) is fits


def unit(samples: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    return F.normalize(values, dim=1).to(dtype)


def make_inputs(
    samples: int, dtype: torch.dtype = torch.float64, scale: float = 14.3, **changes: Any
) -> LossInputs:
    values: dict[str, Any] = {
        "image_features": unit(samples, 6, 1, dtype).requires_grad_(),
        "text_features": unit(samples, 6, 2, dtype).requires_grad_(),
        "logit_scale": torch.tensor(scale, dtype=dtype, requires_grad=True),
        "logit_bias": torch.tensor(-3.0, dtype=dtype, requires_grad=True),
        "teacher_image": unit(samples, 4, 3, dtype),
        "teacher_text": unit(samples, 4, 4, dtype),
    }
    return LossInputs(**(values | changes))


def leaves(inputs: LossInputs) -> list[Tensor]:
    tensors = [inputs.image_features, inputs.text_features, inputs.logit_scale]
    return tensors if inputs.logit_bias is None else [*tensors, inputs.logit_bias]


def with_gradients(terms: dict[str, Tensor], inputs: LossInputs) -> list[Tensor]:
    """The terms, and the gradients of their sum; a tensor that takes no part has zeros."""
    total = torch.stack(list(terms.values())).sum()
    gradients = torch.autograd.grad(total, leaves(inputs), allow_unused=True)
    return [
        *(term.detach() for term in terms.values()),
        *(
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves(inputs), gradients, strict=True)
        ),
    ]


def open_clip_terms(objective: ContrastiveLoss, inputs: LossInputs) -> dict[str, Tensor]:
    features = (inputs.image_features, inputs.text_features, inputs.logit_scale)
    if isinstance(objective, SoftmaxLoss):
        return ClipLoss()(*features, inputs.logit_bias, output_dict=True)
    if isinstance(objective, SigLipLoss):
        return OpenClipSigLipLoss()(*features, inputs.logit_bias, output_dict=True)
    teacher = (inputs.teacher_image, inputs.teacher_text, objective.teacher_logit_scale)
    return DistillClipLoss()(*features, *teacher, output_dict=True)


@pytest.mark.parametrize("tile", [tiles.CPU_TILE, TINY_TILE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", [1, 2, 7, 64])
@pytest.mark.parametrize("objective", [SoftmaxLoss(), SigLipLoss(), DistillLoss(50.0)])
def test_equals_open_clip(
    objective: ContrastiveLoss,
    samples: int,
    dtype: torch.dtype,
    tile: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    inputs = make_inputs(samples, dtype)
    terms = objective(inputs)
    reference = open_clip_terms(objective, inputs)
    assert list(terms) == list(reference)
    found, expected = with_gradients(terms, inputs), with_gradients(reference, inputs)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {}
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 1e-4, "atol": 2e-6}))


def loop_softmax(inputs: LossInputs, weights: Tensor) -> Tensor:
    """The weighted mean of both cross entropies, one sample at a time."""
    image, text, scale = inputs.image_features, inputs.text_features, inputs.logit_scale
    losses = []
    for i in range(len(image)):
        by_image = torch.stack([scale * image[i] @ other for other in text])
        by_text = torch.stack([scale * other @ text[i] for other in image])
        losses.append((by_image.logsumexp(0) - by_image[i] + by_text.logsumexp(0) - by_text[i]) / 2)
    return (torch.stack(losses) * weights).sum() / weights.sum()


@given(
    samples=st.integers(1, 12),
    scale=st.sampled_from([0.5, 14.3, 100.0]),
    tile=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    weights=st.lists(st.sampled_from([0.0, 0.3, 1.0, 5.0]), min_size=12, max_size=12),
)
def test_weighted_softmax_equals_a_loop(
    samples: int, scale: float, tile: tuple[int, int], weights: list[float]
) -> None:
    column = torch.tensor([*weights[: samples - 1], 2.0], dtype=torch.float64)
    inputs = make_inputs(samples, scale=scale, weights=column)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_TILE", tile)
        found = with_gradients(SoftmaxLoss()(inputs), inputs)
    expected = with_gradients({"loss": loop_softmax(inputs, column)}, inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "objective", [SoftmaxLoss(), DistillLoss(50.0), ReferenceGuidedLoss(epsilon=1e-3)]
)
def test_equal_weights_change_nothing(objective: ContrastiveLoss) -> None:
    plain, weighted = make_inputs(9), make_inputs(9, weights=torch.full((9,), 0.7).double())
    found = with_gradients(objective(weighted), weighted)
    for one, other in zip(found, with_gradients(objective(plain), plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_distillation_weights_samples_and_terms() -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    inputs = make_inputs(5)
    terms = DistillLoss(50.0, contrastive_weight=0.25, distill_weight=3.0)(
        make_inputs(5, weights=weights)
    )
    logits = inputs.logit_scale * inputs.image_features @ inputs.text_features.T
    assert inputs.teacher_image is not None
    assert inputs.teacher_text is not None
    teacher = 50.0 * inputs.teacher_image @ inputs.teacher_text.T
    each = sum(
        -(t.softmax(1) * s.log_softmax(1)).sum(1)
        for s, t in [(logits, teacher), (logits.T, teacher.T)]
    )
    expected = 3.0 * (each * weights).sum() / weights.sum() / 2
    torch.testing.assert_close(terms["distill_loss"], expected)
    contrastive = 0.25 * loop_softmax(inputs, weights)
    torch.testing.assert_close(terms["contrastive_loss"], contrastive)


@pytest.mark.parametrize("noise", [3.0, 1.0, 0.7])
def test_float32_is_exact_at_logit_scale_100(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where pairs are told apart so well that the loss is 15, 0.014, and 0.00007."""
    monkeypatch.setattr(tiles, "CPU_TILE", (20, 30))
    image = unit(128, 32, 1, torch.float32)
    text = F.normalize(image + noise * unit(128, 32, 2, torch.float32), dim=1)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = make_inputs(
            128,
            dtype,
            100.0,
            image_features=image.to(dtype).requires_grad_(),
            text_features=text.to(dtype).requires_grad_(),
        )
        results.append([value.double() for value in with_gradients(SoftmaxLoss()(inputs), inputs)])
    for one, other in zip(*results, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_and_autocast_are_computed_in_float32(dtype: torch.dtype) -> None:
    half = make_inputs(32, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = DistillLoss(50.0)(half)
    scalars, features = ("logit_scale", "logit_bias"), ("image_features", "text_features")
    names = (*scalars, *features, "teacher_image", "teacher_text")
    exact = {name: getattr(half, name).detach().float() for name in names}
    for name, value in DistillLoss(50.0)(LossInputs(**exact)).items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value)
    sum(found.values()).backward()
    assert half.image_features.grad is not None
    assert half.image_features.grad.dtype == dtype


def test_scale_and_bias_may_be_vectors_of_one() -> None:
    inputs = make_inputs(4)
    assert inputs.logit_bias is not None
    vectors = make_inputs(
        4, logit_scale=inputs.logit_scale[None], logit_bias=inputs.logit_bias[None]
    )
    for objective in (SoftmaxLoss(), SigLipLoss()):
        (found,), (expected,) = objective(vectors).values(), objective(inputs).values()
        assert found.shape == expected.shape == ()
        assert torch.equal(found, expected)


def test_caption_sums_of_micro_batches_are_the_mean_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 11, generator=generator)
    labels = torch.randint(1, 11, (6, 5), generator=generator)
    for sample, length in enumerate([5, 1, 0, 2, 5, 3]):
        labels[sample, length:] = 0
    tokens = caption_tokens(labels, world_size=1)
    assert int(tokens) == 16
    parts = [caption_loss_sum(logits[i : i + 2], labels[i : i + 2]) / tokens for i in (0, 2, 4)]
    loss = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0)
    _, expected = loss(logits[:, 0], logits[:, 0], logits, labels, torch.tensor(1.0))
    torch.testing.assert_close(torch.stack(parts).sum(), expected)
    assert float(caption_loss_sum(logits, 0 * labels)) == 0
    assert int(caption_tokens(0 * labels, world_size=1)) == 1


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (SoftmaxLoss(), {"text_features": unit(3, 6, 2)}, r"one shape .* Got \[4, 6\] and \[3, 6"),
        (SoftmaxLoss(), {"logit_scale": torch.ones(2)}, r"logit_scale must hold one number"),
        (SoftmaxLoss(), {"weights": torch.ones(3)}, r"weights must have one entry .* 4 samples"),
        (SoftmaxLoss(), {"weights": torch.tensor([1, -2.0, 1, 1])}, r"Got -2\.0 at position 1"),
        (SoftmaxLoss(), {"weights": torch.tensor([1, 1, torch.nan, 1])}, r"Got nan at position 2"),
        (SoftmaxLoss(), {"weights": torch.zeros(4)}, r"sum to 0 over all ranks"),
        (SoftmaxLoss(), {"rows": torch.arange(5)}, r"rows must have one entry"),
        (SigLipLoss(), {"weights": torch.ones(4)}, r"Train with SoftmaxLoss"),
        (SigLipLoss(), {"logit_bias": None}, r"SigLipLoss needs a model with a logit bias"),
        (DistillLoss(1.0), {"teacher_text": None}, r"DistillLoss needs the features of a teacher"),
        (DistillLoss(1.0), {"teacher_image": unit(4, 3, 1)}, r"Got \[4, 3\] and \[4, 4\]"),
        (ReferenceGuidedLoss(), {"teacher_image": None}, r"ReferenceGuidedLoss needs the feat"),
    ],
)
def test_refuses(objective: ContrastiveLoss, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(make_inputs(4, **changes))


def test_refuses_options() -> None:
    with pytest.raises(InputError, match=r"dist_impl must be one of bidir.* Got 'ring'"):
        SigLipLoss("ring")  # type: ignore[arg-type]  # what the test is about
    with pytest.raises(InputError, match=r"distill_weight must be at least 0\. Got -1"):
        DistillLoss(1.0, distill_weight=-1)
    with pytest.raises(InputError, match=r"teacher_logit_scale must be a finite number"):
        DistillLoss(float("nan"))
