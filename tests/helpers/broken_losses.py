"""Losses that break the contract, each in one way; a module that other processes can import."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siftclip.trainer import Copies
from siftclip.trainer.losses import (
    ContrastiveLoss,
    LossInputs,
    SigLipLoss,
    SoftmaxLoss,
    gather_features,
    mean_over_ranks,
)


class Bilinear(ContrastiveLoss):
    """A sound loss that is easily broken: the mean of 1 - similarity, and of its square."""

    gives_sample_losses = True

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        losses = self.losses(inputs)
        self.sample_losses = losses.detach()
        return {"contrastive_loss": self.mean(losses, inputs)}

    def losses(self, inputs: LossInputs) -> Tensor:
        similarities = (inputs.image_features * inputs.text_features).sum(1)
        return (1 - similarities * inputs.logit_scale / 5) ** 2

    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        return mean_over_ranks(losses, inputs.weights, world_size=inputs.world_size)


# ---- check_declarations -------------------------------------------------------------------------
class WithParameters(Bilinear):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))


class UnknownTeacher(Bilinear):
    teacher = "perhaps"  # type: ignore[assignment]


class NumberForTruth(Bilinear):
    takes_weights = 1  # type: ignore[assignment]


# ---- check_terms --------------------------------------------------------------------------------
class OneTermASample(Bilinear):
    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        return losses


class NotFinite(Bilinear):
    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        return losses.mean() / 0


class ReservedName(Bilinear):
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        return {"loss": super().terms(inputs)["contrastive_loss"]}


class NoTerm(Bilinear):
    needs_logit_bias = True

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        super().terms(inputs)
        return {}


class SinglePrecision(Bilinear):
    needs_logit_bias = True  # one that is not needed is added in its own precision

    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        return super().mean(losses, inputs).float()


# ---- check_sample_losses ------------------------------------------------------------------------
class UndeclaredSampleLosses(Bilinear):
    gives_sample_losses = False


class MissingSampleLosses(Bilinear):
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        return {"contrastive_loss": self.mean(self.losses(inputs), inputs)}


class SampleLossesWithGradient(Bilinear):
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        terms = super().terms(inputs)
        self.sample_losses = (self.losses(inputs) + torch.zeros((), requires_grad=True)).float()
        return terms


class SameForAll(Bilinear):
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        terms = super().terms(inputs)
        self.sample_losses = torch.ones(len(inputs.image_features))
        return terms


# ---- check_sample_order -------------------------------------------------------------------------
class FirstCountsMore(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        losses = super().losses(inputs)
        return losses * (1 + (torch.arange(len(losses)) == 0))


class SortedSampleLosses(Bilinear):
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        terms = super().terms(inputs)
        self.sample_losses = self.losses(inputs).detach().sort().values
        return terms


# ---- check_copies -------------------------------------------------------------------------------
class CrossEntropy(ContrastiveLoss):
    """A sound loss with logits of its own, from which copies are left out as `Copies` says."""

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        losses = torch.stack(
            [
                self.direction(inputs, inputs.image_features, inputs.text_features),
                self.direction(inputs, inputs.text_features, inputs.image_features),
            ]
        ).mean(0)
        mean = mean_over_ranks(losses, inputs.weights, world_size=inputs.world_size)
        return {"contrastive_loss": mean}

    def direction(self, inputs: LossInputs, ours: Tensor, others: Tensor) -> Tensor:
        gathered = gather_features(others, rank=inputs.rank, world_size=inputs.world_size)
        logits = inputs.logit_scale * ours @ gathered.T
        own = torch.arange(len(ours)) + inputs.rank * len(ours)
        return F.cross_entropy(self.without_copies(logits, inputs), own, reduction="none")

    def without_copies(self, logits: Tensor, inputs: LossInputs) -> Tensor:
        copies = Copies.of(inputs)
        if copies is None:
            return logits
        everything = slice(0, len(logits)), slice(0, logits.shape[1])
        return logits.masked_fill(copies.mask(*everything), -1e30)


class PlainCrossEntropy(CrossEntropy):
    def without_copies(self, logits: Tensor, inputs: LossInputs) -> Tensor:
        return logits


class CopiesOfTheRank(CrossEntropy):
    """Leaves out the copies of its rank, and not those of other ranks."""

    def without_copies(self, logits: Tensor, inputs: LossInputs) -> Tensor:
        if not inputs.copies or inputs.rows is None:
            return logits
        count = len(logits)
        mask = torch.zeros_like(logits, dtype=torch.bool)
        is_copy = (inputs.rows[:, None] == inputs.rows).fill_diagonal_(False)
        mask[:, inputs.rank * count : (inputs.rank + 1) * count] = is_copy
        return logits.masked_fill(mask, -1e30)


class TakesNeighboursForCopies(CrossEntropy):
    def without_copies(self, logits: Tensor, inputs: LossInputs) -> Tensor:
        logits = super().without_copies(logits, inputs)
        neighbours = torch.ones_like(logits, dtype=torch.bool).triu(1).tril(1)
        return logits.masked_fill(neighbours, -1e30) if inputs.copies else logits


# ---- check_gradients ----------------------------------------------------------------------------
class DetachedFactor(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        losses = super().losses(inputs)
        return losses * losses.detach()


class NoScale(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        return (1 - (inputs.image_features * inputs.text_features).sum(1)) ** 2


class NoGradient(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        return super().losses(inputs).detach()


class InfiniteGradient(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        return super().losses(inputs) + (inputs.logit_scale - inputs.logit_scale).sqrt()


# ---- check_weights ------------------------------------------------------------------------------
class IgnoresWeights(Bilinear):
    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        return losses.mean()


class SumOfWeighted(Bilinear):
    """Equal weights change nothing; of others the sum counts as well as the ratios."""

    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        return losses.mean() if inputs.weights is None else (losses * inputs.weights).mean()


class TakesThemAllTheSame(Bilinear):
    takes_weights = False

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        return self.terms(inputs)


# ---- check_precision ----------------------------------------------------------------------------
class UnderAutocast(Bilinear):
    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        return self.terms(inputs)


# ---- check_no_global_randomness -----------------------------------------------------------------
class TorchNoise(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        return super().losses(inputs) + torch.rand(())


class NumpyNoise(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        return super().losses(inputs) + float(np.random.rand())


class PythonNoise(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        return super().losses(inputs) + random.random()


class OwnNoise(Bilinear):
    """A generator of its own is no excuse: its seed differs between two losses."""

    calls = 0

    def losses(self, inputs: LossInputs) -> Tensor:
        OwnNoise.calls += 1
        return super().losses(inputs) + OwnNoise.calls


# ---- check_inputs_untouched ---------------------------------------------------------------------
class InPlace(Bilinear):
    def losses(self, inputs: LossInputs) -> Tensor:
        with torch.no_grad():
            inputs.image_features.mul_(2)
        return super().losses(inputs)


# ---- check_state --------------------------------------------------------------------------------
class AverageInAnAttribute(Bilinear):
    """A moving average of the loss, which it subtracts, outside of any buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.zeros((), dtype=torch.float64)

    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        mean = super().mean(losses, inputs)
        self.average = 0.5 * self.average + 0.5 * mean.detach()
        return mean - self.average


class StateThatIsNoTensor(Bilinear):
    def get_extra_state(self) -> Any:
        return Bilinear

    def set_extra_state(self, state: Any) -> None:
        pass


# ---- check_micro_batches ------------------------------------------------------------------------
class NeedsTheGraph(Bilinear):
    """Asks what made the features; of micro-batches they come as they are."""

    def losses(self, inputs: LossInputs) -> Tensor:
        return super().losses(inputs) * (1 if inputs.image_features.grad_fn is None else 2)


# ---- check_ranks --------------------------------------------------------------------------------
class NegativesOfTheRank(SoftmaxLoss):
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        logits = inputs.image_features @ inputs.text_features.T * inputs.logit_scale
        losses = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()) / 2
        self.sample_losses = losses.detach()
        return {
            "contrastive_loss": mean_over_ranks(
                losses, inputs.weights, world_size=inputs.world_size
            )
        }


class MeanOfTheRank(Bilinear):
    """Weights are divided by their sum on this rank."""

    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        return mean_over_ranks(losses, inputs.weights, world_size=1)


class StateOfTheRank(Bilinear):
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))

    def mean(self, losses: Tensor, inputs: LossInputs) -> Tensor:
        self.average.mul_(0.5).add_(0.5 * losses.detach().mean())
        return super().mean(losses, inputs)


class SampleLossesOfAllRanks(Bilinear):
    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        terms = super().forward(inputs)
        if self.sample_losses is not None:
            self.sample_losses = gather_features(
                self.sample_losses, rank=inputs.rank, world_size=inputs.world_size
            )
        return terms


class FailsOnRanks(SigLipLoss):
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        if inputs.rank == 1:
            raise RuntimeError("no second rank")
        return super().terms(inputs)
