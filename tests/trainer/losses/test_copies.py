"""A sample that is in a batch several times is no negative of itself, in any of the losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from siftclip.trainer.losses import (
    ContrastiveLoss,
    DistillLoss,
    LossInputs,
    ReferenceGuidedLoss,
    SigLipLoss,
    SoftmaxLoss,
    tiles,
)

TEACHER_SCALE = 20.0
Loop = Callable[[LossInputs], Tensor]


def make_inputs(rows: list[int], *, copies: bool) -> LossInputs:
    """A batch of pool rows; copies have one text, and images that augmentation has changed."""
    generator = torch.Generator().manual_seed(len(rows))

    def normal(count: int, dim: int) -> Tensor:
        return torch.randn(count, dim, generator=generator, dtype=torch.float64)

    ids = torch.tensor(rows)
    text, teacher = normal(50, 5)[ids], normal(50, 4)[ids]
    return LossInputs(
        image_features=F.normalize(normal(len(rows), 5), dim=1).requires_grad_(),
        text_features=F.normalize(text, dim=1).requires_grad_(),
        logit_scale=torch.tensor(9.0, dtype=torch.float64, requires_grad=True),
        logit_bias=torch.tensor(-2.0, dtype=torch.float64, requires_grad=True),
        rows=ids,
        copies=copies,
        teacher_image=F.normalize(normal(len(rows), 4), dim=1),
        teacher_text=F.normalize(teacher, dim=1),
    )


def others(inputs: LossInputs, i: int) -> list[int]:
    assert inputs.rows is not None
    rows = inputs.rows.tolist()
    return [j for j in range(len(rows)) if rows[j] != rows[i]]


def directions(image: Tensor, text: Tensor, i: int, places: list[int]) -> list[Tensor]:
    """Similarities of sample i with others: its image with their texts, and the reverse."""
    return [
        torch.stack([image[i] @ text[j] for j in places]),
        torch.stack([image[j] @ text[i] for j in places]),
    ]


def loop_softmax(inputs: LossInputs) -> Tensor:
    losses = []
    for i in range(len(inputs.image_features)):
        places = [i, *others(inputs, i)]
        for logits in directions(inputs.image_features, inputs.text_features, i, places):
            losses.append(-(logits * inputs.logit_scale).log_softmax(0)[0])
    return torch.stack(losses).mean()


def loop_distill(inputs: LossInputs) -> Tensor:
    assert inputs.teacher_image is not None
    assert inputs.teacher_text is not None
    losses = []
    for i in range(len(inputs.image_features)):
        places = [i, *others(inputs, i)]
        students = directions(inputs.image_features, inputs.text_features, i, places)
        teachers = directions(inputs.teacher_image, inputs.teacher_text, i, places)
        for student, teacher in zip(students, teachers, strict=True):
            wanted = (teacher * TEACHER_SCALE).softmax(0)
            losses.append(-(wanted * (student * inputs.logit_scale).log_softmax(0)).sum())
    return loop_softmax(inputs) + torch.stack(losses).mean()


def loop_siglip(inputs: LossInputs) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    assert inputs.logit_bias is not None
    for i, image in enumerate(inputs.image_features):
        for j in [i, *others(inputs, i)]:
            logit = inputs.logit_scale * image @ inputs.text_features[j] + inputs.logit_bias
            total = total - F.logsigmoid(logit if i == j else -logit)
    return total / len(inputs.image_features)


def loop_reference(inputs: LossInputs, epsilon: float | None) -> Tensor:
    assert inputs.teacher_image is not None
    assert inputs.teacher_text is not None
    losses = []
    for i in range(len(inputs.image_features)):
        places = [i, *others(inputs, i)]
        n = max(1, len(places) - 1)
        ours = directions(inputs.image_features, inputs.text_features, i, places)
        theirs = directions(inputs.teacher_image, inputs.teacher_text, i, places)
        for s, r in zip(ours, theirs, strict=True):
            gained = (s - r) - (s[0] - r[0])
            mean = (inputs.logit_scale * gained[1:]).exp().sum() / n
            losses.append((mean + (1 / n if epsilon is None else epsilon)).log() + math.log(n))
    return torch.stack(losses).mean()


CASES: list[tuple[ContrastiveLoss, Loop]] = [
    (SoftmaxLoss(), loop_softmax),
    (DistillLoss(TEACHER_SCALE), loop_distill),
    (SigLipLoss(), loop_siglip),
    (ReferenceGuidedLoss(), lambda inputs: loop_reference(inputs, None)),
    (ReferenceGuidedLoss(epsilon=1e-3), lambda inputs: loop_reference(inputs, 1e-3)),
]


def values(total: Tensor, inputs: LossInputs) -> list[Tensor]:
    assert inputs.logit_bias is not None
    leaves = [inputs.image_features, inputs.text_features, inputs.logit_scale, inputs.logit_bias]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    found = [
        torch.zeros_like(a) if g is None else g for a, g in zip(leaves, gradients, strict=True)
    ]
    return [total.detach(), *found]


def total_of(objective: ContrastiveLoss, inputs: LossInputs) -> Tensor:
    return torch.stack(list(objective(inputs).values())).sum()


@pytest.mark.parametrize(("objective", "loop"), CASES)
@given(
    rows=st.lists(st.integers(0, 5), min_size=2, max_size=9),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.just(tiles.CPU_TILE),
)
def test_equals_a_loop_over_the_others(
    objective: ContrastiveLoss, loop: Loop, rows: list[int], tile: tuple[int, int]
) -> None:
    inputs = make_inputs(rows, copies=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_TILE", tile)
        found = values(total_of(objective, inputs), inputs)
    for ours, expected in zip(found, values(loop(inputs), inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("objective", [case[0] for case in CASES])
def test_without_copies_the_look_for_them_changes_nothing(objective: ContrastiveLoss) -> None:
    rows = [9, 3, 4, 0, 7, 21, 2]
    plain, looked = (make_inputs(rows, copies=copies) for copies in (False, True))
    found, expected = (values(total_of(objective, i), i) for i in (looked, plain))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("objective", [case[0] for case in CASES])
def test_copies_do_matter_where_nobody_looks(objective: ContrastiveLoss) -> None:
    rows = [1, 1, 2, 2, 2, 3]
    plain, looked = (make_inputs(rows, copies=copies) for copies in (False, True))
    assert float(total_of(objective, plain).detach()) != pytest.approx(
        float(total_of(objective, looked).detach()), rel=1e-3
    )
