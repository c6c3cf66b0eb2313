"""All built-in losses pass the public checks, and for each check there is a loss that fails it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broken_losses as broken
import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.trainer import check_loss
from siftclip.trainer.losses import (
    CocaLoss,
    ContrastiveLoss,
    DistillLoss,
    ReferenceGuidedLoss,
    SigLipLoss,
    SoftmaxLoss,
)
from siftclip.trainer.losses.table import BUILT_IN
from siftclip.trainer.optim.loss_checks import CHECKS, check_ranks
from siftclip.trainer.optim.loss_samples import ROWS

Make = Callable[[], ContrastiveLoss]


def averages() -> ContrastiveLoss:
    return ReferenceGuidedLoss(selected_rows=np.arange(ROWS), gamma=0.6, epsilon=1e-3, rho=11.0)


SOUND: dict[str, Make] = {
    "softmax": SoftmaxLoss,
    "siglip": SigLipLoss,
    "coca": lambda: CocaLoss(contrastive_weight=2.0),
    "distill": lambda: DistillLoss(20.0, contrastive_weight=0.5),
    "drrho": ReferenceGuidedLoss,
    "drrho with averages": averages,
    "bilinear": broken.Bilinear,  # what the broken ones are made of
    "cross entropy": broken.CrossEntropy,
}
BROKEN: list[tuple[str, Make, str]] = [
    ("declarations", broken.WithParameters, r"no optimiser would train \['temperature'\]"),
    ("declarations", broken.UnknownTeacher, r"teacher must be one of none, features, .*'perhaps'"),
    ("declarations", broken.NumberForTruth, r"takes_weights must be True or False"),
    ("declarations", lambda: SHARED, r"each call must build another loss"),
    ("terms", broken.OneTermASample, r"must be a scalar. Got the shape \[16\]"),
    ("terms", broken.NotFinite, r"contrastive_loss must be finite. Got inf"),
    ("terms", broken.ReservedName, r"loss is the name of a term that training adds"),
    ("terms", broken.NoTerm, r"at least one term"),
    ("terms", broken.SinglePrecision, r"float64 features is torch\.float32"),
    ("sample_losses", broken.UndeclaredSampleLosses, r"declare gives_sample_losses = True"),
    ("sample_losses", broken.MissingSampleLosses, r"InputError: MissingSampleLosses declares"),
    ("sample_losses", broken.SampleLossesWithGradient, r"must have no gradient"),
    ("sample_losses", broken.SameForAll, r"the same for all samples"),
    ("sample_order", broken.FirstCountsMore, r"contrastive_loss changes with the order"),
    ("sample_order", broken.SortedSampleLosses, r"sample_losses do not follow the samples"),
    ("copies", broken.PlainCrossEntropy, r"compares a sample with copies of itself.*PairedTerms"),
    (
        "copies",
        broken.TakesNeighboursForCopies,
        r"changes with copies=True where no sample has a copy",
    ),
    ("gradients", broken.DetachedFactor, r"image_features is not that of the value"),
    ("gradients", broken.NoScale, r"logit_scale gets no gradient"),
    ("gradients", broken.NoGradient, r"image_features gets no gradient"),
    ("gradients", broken.InfiniteGradient, r"the gradient of logit_scale is not finite"),
    ("weights", broken.IgnoresWeights, r"weights have no effect"),
    ("weights", broken.SumOfWeighted, r"divided by the sum of the weights"),
    ("weights", broken.TakesThemAllTheSame, r"takes_weights is False, and weights are not"),
    ("precision", broken.UnderAutocast, r"bfloat16"),
    ("no_global_randomness", broken.TorchNoise, r"random state of torch was used"),
    ("no_global_randomness", broken.NumpyNoise, r"random state of numpy was used"),
    ("no_global_randomness", broken.PythonNoise, r"random state of random was used"),
    ("no_global_randomness", broken.OwnNoise, r"differs between two fresh losses"),
    ("inputs_untouched", broken.InPlace, r"image_features was modified"),
    ("state", broken.AverageInAnAttribute, r"what it depends on must be in buffers"),
    ("state", broken.StateThatIsNoTensor, r"the state cannot be loaded again"),
    ("micro_batches", broken.NeedsTheGraph, r"differs in 2 micro-batches"),
]
BROKEN_ON_RANKS: list[tuple[Make, str]] = [
    (broken.NegativesOfTheRank, r"the mean of the term contrastive_loss on 2 ranks, step 0"),
    (broken.CopiesOfTheRank, r"the mean of the term contrastive_loss on 2 ranks, step 1"),
    (broken.MeanOfTheRank, r"contrastive_loss on 2 ranks, weighted, step 0"),
    (broken.StateOfTheRank, r"the state average on 2 ranks, step 0"),
    (broken.SampleLossesOfAllRanks, r"sample_losses on 2 ranks, step 0 are not those of the rank"),
    (broken.FailsOnRanks, r"RuntimeError: no second rank"),
]
SHARED = SoftmaxLoss()
QUICK = [check for check in CHECKS if check is not check_ranks]


def only(name: str) -> dict[str, str]:
    """All checks but one, with a reason to leave them out."""
    return {
        check.__name__: "is not the one that is tested"
        for check in CHECKS
        if check.__name__ != f"check_{name}"
    }


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SOUND)
def test_built_in_losses_pass(name: str, check: Callable[[Make], None]) -> None:
    check(SOUND[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_built_in_losses_pass_all_checks_also_on_ranks(name: str) -> None:
    check_loss(SOUND[name])


def test_every_built_in_loss_is_checked() -> None:
    sound = {type(make()) for make in SOUND.values()} - {broken.Bilinear, broken.CrossEntropy}
    assert sound == set(BUILT_IN.values())


@pytest.mark.parametrize(
    ("name", "make", "message"), BROKEN, ids=[f"{name}-{message}" for name, _, message in BROKEN]
)
def test_a_broken_loss_fails(name: str, make: Make, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^check_{name}: .*{message}"):
        check_loss(make, without=only(name))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "message"), BROKEN_ON_RANKS)
def test_a_loss_that_is_broken_on_ranks_fails(make: Make, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^check_ranks: .*{message}"):
        check_loss(make, without=only("ranks"))


def test_a_loss_without_copies_passes_until_ranks_share_a_sample() -> None:
    check_loss(broken.CopiesOfTheRank, without={"check_ranks": "is what finds it"})


def test_each_check_has_a_loss_that_fails_it() -> None:
    tested = {f"check_{name}" for name, *_ in BROKEN}
    assert tested == {check.__name__ for check in QUICK}


def test_a_loss_that_other_processes_cannot_build_is_told() -> None:
    class Local(SoftmaxLoss):
        pass

    with pytest.raises(AssertionError, match=r"^check_ranks: Local cannot go to other processes"):
        check_loss(Local, without=only("ranks"))


@pytest.mark.slow
def test_a_loss_whose_module_other_processes_cannot_import_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys
    import types

    module: Any = types.ModuleType("made_here")
    monkeypatch.setitem(sys.modules, "made_here", module)
    module.MadeHere = type("MadeHere", (SoftmaxLoss,), {"__module__": "made_here"})
    message = r"(?s)cannot go to other processes: ModuleNotFoundError.*Define its class in a module"
    with pytest.raises(AssertionError, match=message):
        check_loss(module.MadeHere, without=only("ranks"))


def test_checks_are_left_out_by_name_and_with_a_reason() -> None:
    without = {"check_ranks": "takes seconds", "check_gradients": "the factor is detached"}
    check_loss(broken.DetachedFactor, without=without)
    with pytest.raises(InputError, match=r"check_loss: without must be one of check_declarations"):
        check_loss(SoftmaxLoss, without={"check_speed": "slow"})
    with pytest.raises(InputError, match=r"needs a reason for check_ranks"):
        check_loss(SoftmaxLoss, without={"check_ranks": ""})
