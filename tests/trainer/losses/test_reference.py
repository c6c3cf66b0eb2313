"""The reference-guided loss against its definition, one pair at a time, and its state."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siftclip.errors import InputError
from siftclip.trainer.losses import (
    LossInputs,
    ReferenceGuidedLoss,
    SoftmaxLoss,
    tiles,
)


def unit(samples: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(samples, dim, generator=generator).double(), dim=1)


def make_inputs(samples: int, seed: int, rows: Tensor | None = None) -> LossInputs:
    return LossInputs(
        image_features=unit(samples, 5, seed).requires_grad_(),
        text_features=unit(samples, 5, seed + 1).requires_grad_(),
        logit_scale=torch.tensor(12.0, dtype=torch.float64, requires_grad=True),
        rows=rows,
        teacher_image=unit(samples, 3, seed + 2),
        teacher_text=unit(samples, 3, seed + 3),
    )


def gradients(loss: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        loss, (inputs.image_features, inputs.text_features, inputs.logit_scale)
    )


def compare(found: Tensor, expected: Tensor, inputs: LossInputs) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


class Loops:
    """The authors' algorithm: u is a moving average of epsilon + mean exp in plain numbers."""

    def __init__(self, gamma: float, epsilon: float, rho: float | None) -> None:
        self.gamma, self.epsilon, self.rho = gamma, epsilon, rho
        self.averages: dict[tuple[str, int], float] = {}

    def loss(self, inputs: LossInputs) -> Tensor:
        image, text, scale = inputs.image_features, inputs.text_features, inputs.logit_scale
        reference_image, reference_text = inputs.teacher_image, inputs.teacher_text
        assert reference_image is not None
        assert reference_text is not None
        count = len(image)
        model = [[image[i] @ text[j] for j in range(count)] for i in range(count)]
        reference = [
            [reference_image[i] @ reference_text[j] for j in range(count)] for i in range(count)
        ]
        losses = []
        for direction in ("image", "text"):
            for i in range(count):
                differences = []
                for j in range(count):
                    if j != i:
                        a, b = (i, j) if direction == "image" else (j, i)
                        own = model[i][i] - reference[i][i]
                        differences.append(scale * (model[a][b] - reference[a][b] - own))
                mean = self.epsilon + torch.stack(differences).exp().sum() / (count - 1)
                row = i if inputs.rows is None else int(inputs.rows[i])
                u = self.averages.get((direction, row), float(mean.detach()))
                u = (1 - self.gamma) * u + self.gamma * float(mean.detach())
                self.averages[direction, row] = u
                losses.append(math.log(u) + (mean - mean.detach()) / u)
        loss = torch.stack(losses).mean()
        return loss + math.log(count - 1) if self.rho is None else (loss + self.rho) / scale


@pytest.mark.parametrize("tile", [tiles.CPU_TILE, (2, 3)])
def test_without_reference_and_average_it_is_the_softmax_loss(
    tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    inputs = make_inputs(7, 0)
    nothing = torch.zeros(7, 3, dtype=torch.float64)
    blind = LossInputs(
        image_features=inputs.image_features,
        text_features=inputs.text_features,
        logit_scale=inputs.logit_scale,
        weights=torch.arange(1.0, 8.0).double(),
        teacher_image=nothing,
        teacher_text=nothing,
    )
    found = ReferenceGuidedLoss()(blind)["contrastive_loss"]
    compare(found, SoftmaxLoss()(blind)["contrastive_loss"], blind)


@pytest.mark.parametrize("rho", [None, 11.0])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("epsilon", [1e-14, 1e-2])
def test_equals_the_definition_over_several_steps(
    epsilon: float, gamma: float, rho: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", (2, 3))
    selected = np.array([40, 7, 19, 3, 22, 8, 31, 5])
    loops = Loops(gamma, epsilon, rho)
    loss = ReferenceGuidedLoss(selected_rows=selected, gamma=gamma, epsilon=epsilon, rho=rho)
    for step, rows in enumerate([[7, 40, 3, 19, 5], [3, 31, 7, 8, 22], [40, 31, 3, 5, 7]]):
        inputs = make_inputs(5, 10 * step, torch.tensor(rows))
        found = loss(inputs)["contrastive_loss"]
        expected = loops.loss(inputs)
        # The averages are kept in float32.
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-6, atol=1e-7)
        for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-8)
    if gamma < 1:
        for (direction, row), u in loops.averages.items():
            position = sorted(selected.tolist()).index(row)
            found = getattr(loss, f"log_mean_{direction}")[position]
            assert float(found) == pytest.approx(math.log(u), rel=1e-5)


def test_softmax_form_has_an_epsilon_of_one_over_the_others() -> None:
    inputs = make_inputs(6, 3)
    compare(
        ReferenceGuidedLoss()(inputs)["contrastive_loss"],
        Loops(1.0, 1 / 5, None).loss(inputs),
        inputs,
    )


def test_averages_do_not_overflow() -> None:
    loss = ReferenceGuidedLoss(selected_rows=np.arange(4), gamma=0.5, epsilon=1e-14)
    image = torch.eye(4)
    inputs = LossInputs(
        image_features=image.clone().requires_grad_(),
        text_features=-image,  # each pair is the worst there is: exponents of 100 and above
        logit_scale=torch.tensor(150.0),
        rows=torch.arange(4),
        teacher_image=image,
        teacher_text=image,
    )
    for _ in range(2):
        value = loss(inputs)["contrastive_loss"]
        (gradient,) = torch.autograd.grad(value, inputs.image_features)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
    assert float(loss.log_mean_image[0]) == pytest.approx(300.0)


def test_state_changes_in_training_only_and_goes_through_checkpoints() -> None:
    selected = np.arange(10, 20)
    loss = ReferenceGuidedLoss(selected_rows=selected, gamma=0.5)
    rows = torch.tensor([12, 15, 19])
    loss.eval()(make_inputs(3, 0, rows))
    assert bool((loss.log_mean_image == -torch.inf).all())
    loss.train()(make_inputs(3, 0, rows))
    seen = (loss.log_mean_text > -torch.inf).nonzero().flatten()
    assert seen.tolist() == [2, 5, 9]
    resumed = ReferenceGuidedLoss(selected_rows=selected, gamma=0.5)
    resumed.load_state_dict(loss.state_dict())
    again = make_inputs(3, 5, torch.tensor([15, 10, 12]))
    first, second = (one(again)["contrastive_loss"] for one in (loss, resumed))
    assert torch.equal(first, second)
    other = ReferenceGuidedLoss(selected_rows=selected + 1, gamma=0.5)
    with pytest.raises(InputError, match=r"Resume\s+with the selection of the checkpoint"):
        other.load_state_dict(loss.state_dict())
    assert not ReferenceGuidedLoss().state_dict()


def test_a_row_twice_in_a_batch_keeps_the_larger_value() -> None:
    inputs = make_inputs(3, 0, torch.tensor([1, 1, 2]))
    apart = ReferenceGuidedLoss(selected_rows=np.arange(3), gamma=0.5)
    apart(replace(inputs, rows=torch.arange(3)))
    of_samples = {name: getattr(apart, name) for name in ("log_mean_image", "log_mean_text")}
    values = {}
    for order in ([0, 1, 2], [1, 0, 2]):
        loss = ReferenceGuidedLoss(selected_rows=np.arange(3), gamma=0.5)
        loss(
            LossInputs(
                image_features=inputs.image_features[order],
                text_features=inputs.text_features[order],
                logit_scale=inputs.logit_scale,
                rows=inputs.rows,
                teacher_image=None if inputs.teacher_image is None else inputs.teacher_image[order],
                teacher_text=None if inputs.teacher_text is None else inputs.teacher_text[order],
            )
        )
        values[tuple(order)] = loss.log_mean_image
        for name, alone in of_samples.items():
            expected = torch.stack([torch.tensor(-torch.inf), alone[:2].max(), alone[2]])
            torch.testing.assert_close(getattr(loss, name), expected)
    first, second = values.values()
    torch.testing.assert_close(first, second)


def test_refuses() -> None:
    with pytest.raises(InputError, match=r"epsilon must be above 0"):
        ReferenceGuidedLoss(epsilon=0.0)
    with pytest.raises(InputError, match=r"gamma must be a number in the range \(0, 1\]"):
        ReferenceGuidedLoss(gamma=1.5)
    with pytest.raises(InputError, match=r"needs\s+selected_rows.* Got gamma=0\.5"):
        ReferenceGuidedLoss(gamma=0.5)
    loss = ReferenceGuidedLoss(selected_rows=np.array([2, 4, 9]), gamma=0.5)
    with pytest.raises(InputError, match=r"needs the rows of the samples"):
        loss(make_inputs(2, 0))
    with pytest.raises(InputError, match=r"among its 3 selected_rows\. Got 5"):
        loss(make_inputs(2, 0, torch.tensor([4, 5])))
    with pytest.raises(InputError, match=r"among its 3 selected_rows\. Got 10"):
        loss(make_inputs(2, 0, torch.tensor([10, 2])))
    with pytest.raises(InputError, match=r"at least 2 samples"):
        loss(make_inputs(1, 0, torch.tensor([2])))
