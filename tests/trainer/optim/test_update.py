"""Steps with gradients that are not finite are skipped; norms and clipping are torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from siftclip.trainer.loop.meter import WindowMeter
from siftclip.trainer.optim.update import clip_gradients, gradient_norm, step_if_finite


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model(torch.randn(4, 5)).square().sum().backward()
    return model


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_norm_and_clipping_are_torchs(max_norm: float) -> None:
    model = make_model()
    expected = copy.deepcopy(model)
    for parameter, twin in zip(model.parameters(), expected.parameters(), strict=True):
        assert parameter.grad is not None
        twin.grad = parameter.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
    parameters = [*model.parameters(), nn.Parameter(torch.ones(2))]  # one without a gradient
    found = gradient_norm(parameters)
    torch.testing.assert_close(found, norm)
    clip_gradients(parameters, found, max_norm)
    for parameter, twin in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    taken: list[int] = []

    def step() -> None:
        taken.append(1)
        optimizer.step()

    def attempt() -> None:
        finite = torch.isfinite(gradient_norm(model.parameters()))
        step_if_finite(optimizer, finite, step)

    gradients = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    attempt()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    next(model.parameters()).grad[0, 0] = bad  # type: ignore[index]
    assert not torch.isfinite(gradient_norm(model.parameters()))
    attempt()
    after = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    attempt()  # the next good step is taken again
    assert not torch.equal(next(iter(model.parameters())), next(iter(before[0].values())))
    assert len(taken) == 3


def test_means_of_a_window_leave_out_what_is_not_finite() -> None:
    meter = WindowMeter(torch.device("cpu"))
    good = torch.tensor(True)
    for loss in (1.0, 3.0):
        meter.add(
            {"contrastive_loss": torch.tensor(loss), "loss": torch.tensor(loss)},
            torch.tensor(2.0),
            good,
        )
    nan = torch.tensor(float("nan"))
    meter.add({"contrastive_loss": nan, "loss": nan}, nan, ~good)
    meter.stepped()
    found = meter.close(lambda sums: sums)
    assert found["loss"] == found["contrastive_loss"] == 2.0
    assert found["skipped_steps"] == 1
    meter.add(
        {"contrastive_loss": torch.tensor(5.0), "loss": torch.tensor(5.0)}, torch.tensor(7.0), good
    )
    found = meter.close(lambda sums: sums)
    assert (found["loss"], found["grad_norm"], found["skipped_steps"]) == (5.0, 7.0, 1.0)
