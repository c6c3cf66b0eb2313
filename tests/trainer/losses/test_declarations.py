"""What classes declare decides which models, inputs and runs they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import broken_losses as broken
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from siftclip.errors import InputError
from siftclip.trainer import PairedTerms
from siftclip.trainer.losses import (
    CocaLoss,
    ContrastiveLoss,
    DistillLoss,
    LossInputs,
    LossRun,
    ReferenceGuidedLoss,
    SigLipLoss,
    SoftmaxLoss,
)
from siftclip.trainer.losses.softmax import paired_terms
from siftclip.trainer.optim.loss_samples import Towers, synthetic_inputs

RUN = LossRun(selected_rows=np.array([3, 5]), teacher_logit_scale=7.0)


def captioning(*, bias: bool = False) -> nn.Module:
    model = Towers(bias=bias)
    model.text_decoder = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("loss", "model", "message"),
    [
        (SoftmaxLoss(), captioning(), r"^SoftmaxLoss does not go with .* is a CoCa: use loss=coca"),
        (CocaLoss(), Towers(bias=False), r"^CocaLoss does not go with .* no text decoder"),
        (SigLipLoss(), Towers(bias=False), r"^SigLipLoss needs a model with a logit bias\. Set"),
        (broken.WithParameters(), Towers(bias=True), r"parameters of its own.*Register buffers"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    loss: ContrastiveLoss, model: nn.Module, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loss.check(model)


def test_models_that_fit() -> None:
    SoftmaxLoss().check(Towers(bias=False))
    SoftmaxLoss().check(Towers(bias=True))
    SigLipLoss().check(Towers(bias=True))
    CocaLoss().check(captioning())


@pytest.mark.parametrize(
    ("kind", "parameters", "attributes"),
    [
        (SoftmaxLoss, {}, {}),
        (SigLipLoss, {"dist_impl": "shift"}, {}),
        (CocaLoss, {"contrastive_weight": 3}, {"contrastive_weight": 3.0, "caption_weight": 2.0}),
        (DistillLoss, {}, {"teacher_logit_scale": 7.0}),
        (DistillLoss, {"teacher_logit_scale": 2}, {"teacher_logit_scale": 2.0}),
        (ReferenceGuidedLoss, {"gamma": 0.5, "logit_scale": 100}, {"fixed_logit_scale": 100.0}),
        (ReferenceGuidedLoss, {"logit_scale": None}, {"fixed_logit_scale": None}),
    ],
)
def test_losses_of_a_run(
    kind: type[ContrastiveLoss], parameters: dict[str, Any], attributes: dict[str, Any]
) -> None:
    loss = kind.for_run(RUN, parameters)
    assert type(loss) is kind
    assert {name: getattr(loss, name) for name in attributes} == attributes
    if isinstance(loss, ReferenceGuidedLoss) and loss.gamma < 1:
        assert isinstance(loss.selected_rows, Tensor)
        assert loss.selected_rows.tolist() == [3, 5]


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        (SoftmaxLoss, {"gamma": 1}, r"gamma is not a parameter of SoftmaxLoss\. It has none"),
        (CocaLoss, {"caption_wait": 1}, r"Did you mean caption_weight\?"),
        (CocaLoss, {"caption_weight": 0}, r"^CocaLoss: caption_weight must be above 0\. Got 0"),
        (ReferenceGuidedLoss, {"logit_scale": -1}, r"logit_scale must be above 0\. Got -1"),
    ],
)
def test_parameters_that_a_class_does_not_take_are_named(
    kind: type[ContrastiveLoss], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        kind.for_run(RUN, parameters)


def test_sample_losses_are_those_of_the_last_call() -> None:
    class EveryOther(SoftmaxLoss):
        calls = 0

        def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
            terms = super().terms(inputs)
            self.calls += 1
            if self.calls == 2:
                self.sample_losses = None
            return terms

    loss = EveryOther()
    inputs = synthetic_inputs(loss)
    loss(inputs)
    with pytest.raises(InputError, match=r"EveryOther declares gives_sample_losses.* Got none"):
        loss(inputs)


def test_a_bias_that_has_no_effect_gets_a_gradient_of_zero() -> None:
    inputs = synthetic_inputs(SoftmaxLoss())
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    SoftmaxLoss()(replace(inputs, logit_bias=bias))["contrastive_loss"].backward()
    assert bias.grad is not None
    assert float(bias.grad) == 0


def test_terms_of_inputs_are_those_of_their_parts() -> None:
    inputs = synthetic_inputs(SoftmaxLoss())
    features = (inputs.image_features, inputs.text_features, inputs.logit_scale)
    expected = paired_terms(*features, rank=0, world_size=1)
    torch.testing.assert_close(PairedTerms.of(inputs).margins, expected.margins)
