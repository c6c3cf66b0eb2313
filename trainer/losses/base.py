"""The base class of the losses: what one declares, and the mean over the samples of all ranks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from siftclip.errors import InputError, ParameterError, call_by_name
from siftclip.selectors.core.description import Behind, describe, stored_name
from siftclip.trainer.losses.inputs import (
    LossInputs,
    check_shapes,
    in_loss_precision,
    require_teacher,
)

L = TypeVar("L", bound="ContrastiveLoss")
_OF_TORCH = (*vars(nn.Module()), "sample_losses")  # attributes that are no parameters

TeacherKind: TypeAlias = Literal["none", "features", "model_or_features"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRun:
    """What a run knows when it builds its loss.

    Attributes:
        selected_rows: int64 [n], distinct and sorted: the rows of the pool that are trained on.
        teacher_logit_scale: that of the teacher's training, exponentiated; None without a teacher
            that has one.
    """

    selected_rows: np.ndarray
    teacher_logit_scale: float | None = None


class ContrastiveLoss(nn.Module, ABC):
    """A loss of image and text features; a subclass declares what it needs and computes its terms.

    A subclass writes `terms`, of `LossInputs`; `PairedTerms`, `gather_features`, `Copies` and
    `mean_over_ranks` are what it is made of. All methods that are not named here are torch's.

    Example:
        >>> from siftclip.trainer import ContrastiveLoss, PairedTerms, mean_over_ranks
        >>> class Clip(ContrastiveLoss):
        ...     def terms(self, inputs):
        ...         losses = PairedTerms.of(inputs).cross_entropies().mean(0)
        ...         mean = mean_over_ranks(losses, inputs.weights, world_size=inputs.world_size)
        ...         return {"contrastive_loss": mean}
        >>> Clip().takes_weights
        True

    DDP averages gradients over ranks. On every rank a term is a value whose mean over ranks is the
    loss of the whole batch, and whose averaged gradients are those of one process with the whole
    batch, those of logit scale and bias included. State is kept in buffers, equal on all ranks;
    there are no parameters, because the optimiser has those of the model alone.

    `siftclip.trainer.check_loss` checks all of this. A class declares the first five attributes;
    the others are set by its objects.

    Attributes:
        takes_weights: whether it is a mean over samples that `LossInputs.weights` can weigh. False:
            options and selectors that weigh samples are refused.
        gives_sample_losses: whether `terms` sets `sample_losses`, which selection in the loop can
            read. False: selectors that read them are refused.
        needs_logit_bias: whether the model must have a logit bias, as SigLIP's.
        needs_captions: whether the model must have a text decoder, as CoCa's, to whose caption loss
            the terms are added. False: a model with one is refused.
        teacher: what teacher the run must name: none, cached features of one, or either a model or
            cached features. Its features are in `LossInputs`.
        sample_losses: what the last call charged to each sample of this rank, float [b] without
            gradient; None for losses whose terms belong to pairs of samples.
        caption_weight: weight of the caption loss of models that have one.
        fixed_logit_scale: the logit scale of the model is kept at this; None: it is learned.
    """

    takes_weights: ClassVar[bool] = True
    gives_sample_losses: ClassVar[bool] = False
    needs_logit_bias: ClassVar[bool] = False
    needs_captions: ClassVar[bool] = False
    teacher: ClassVar[TeacherKind] = "none"
    loaded_ns: ClassVar[int]  # since the epoch

    sample_losses: Tensor | None = None
    caption_weight: float = 2.0
    fixed_logit_scale: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take note of when the code was loaded: what its file says later is not what runs."""
        super().__init_subclass__(**kwargs)
        cls.loaded_ns = time.time_ns()

    @classmethod
    def for_run(cls: type[L], run: LossRun, parameters: Mapping[str, Any]) -> L:
        """Build the loss of a run; a subclass that needs what the run knows takes it from there.

        Options are checked with a loss that is built for a run of a few rows and computes the terms
        of a few random features, before any file is read.

        Args:
            run: what it knows.
            parameters: options of the user, by the names of arguments.

        Raises:
            InputError: a parameter is wrong, missing or unknown.
        """
        return call_by_name(cls, parameters)

    def check(self, model: nn.Module) -> None:
        """Check that the loss can train an open_clip model.

        Raises:
            InputError: the model lacks what the loss needs, or has what it has no use for.
        """
        if next(self.parameters(), None) is not None:
            raise ParameterError(
                "has parameters of its own, which no optimiser would train",
                owner=self,
                way_out="Register buffers instead.",
            )
        if self.needs_logit_bias and getattr(model, "logit_bias", None) is None:
            raise ParameterError(
                "needs a model with a logit bias",
                owner=self,
                way_out="Set open_clip's init_logit_bias=-10 and init_logit_scale=2.3026 "
                "(model.options on the command line; loss=siglip sets both unless model.options is "
                "overridden).",
            )
        has_captions = hasattr(model, "text_decoder")
        if has_captions and not self.needs_captions:
            raise ParameterError(
                "does not go with this model, which is a CoCa: use loss=coca, or another loss with "
                "needs_captions",
                owner=self,
            )
        if self.needs_captions and not has_captions:
            raise ParameterError(
                "does not go with this model, which has no text decoder: use loss=clip, or a CoCa",
                owner=self,
            )

    def description(self, behind: Behind) -> dict[str, Any]:
        """Describe the loss in plain JSON types, by which a run with this object is known.

        Args:
            behind: takes up the code and the texts that it consists of.

        Raises:
            TypeError: nothing tells one of its attributes from others, such as a lambda.
        """
        behind.code.add(type(self))
        parts = {
            path: {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
            for path, module in self.named_modules()
        }
        described: dict[str, Any] = describe({"parts": parts, "state": self.state_dict()}, behind)
        return {"class": stored_name(type(self)), **described}

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute the terms, scalars under open_clip's names, whose sum is to be minimised.

        Computed in float32 (float64 for float64 features), whatever autocast says.

        Raises:
            InputError: a tensor is missing or has the wrong shape, or, for tensors on the CPU, a
                wrong value.
        """
        name = type(self).__name__
        check_shapes(inputs, name)
        self._check_given(inputs)
        self.sample_losses = None
        with torch.autocast(inputs.image_features.device.type, enabled=False):
            exact = in_loss_precision(inputs)
            terms = dict(self.terms(exact))
            if not self.needs_logit_bias:
                terms = _with_bias(terms, exact.logit_bias)
        losses = self.sample_losses
        shape = inputs.image_features.shape[:1]
        if self.gives_sample_losses and (losses is None or losses.shape != shape):
            found = "none" if losses is None else f"the shape {list(losses.shape)}"
            raise InputError(
                f"{name} declares gives_sample_losses, so that terms() must set sample_losses, one "
                f"for each of the {shape[0]} samples. Got {found}."
            )
        return terms

    @abstractmethod
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute the terms of inputs that are checked and of one precision."""

    def _check_given(self, inputs: LossInputs) -> None:
        """Check that the inputs hold what the class declares."""
        name = type(self).__name__
        if inputs.weights is not None and not self.takes_weights:
            raise InputError(
                f"{name} takes no sample weights, which have no agreed meaning where terms belong "
                "to pairs of samples. Train with SoftmaxLoss, or select samples instead of "
                "weighting them."
            )
        if inputs.logit_bias is None and self.needs_logit_bias:
            raise InputError(
                f"{name} needs a model with a logit bias: set init_logit_bias (-10 in the paper) "
                "in the architecture. Got a model without one."
            )
        if self.teacher != "none":
            require_teacher(inputs, name)


def mean_over_ranks(values: Tensor, weights: Tensor | None, *, world_size: int) -> Tensor:
    """Return a scalar of this rank whose mean over ranks is the weighted mean over all samples.

    Args:
        values: float [b], of this rank's samples.
        weights: float [b] or None for equal ones; divided by their sum over all ranks.
        world_size: number of ranks.

    Raises:
        InputError: weights on the CPU are all zero. On another device the result is NaN then.
    """
    if weights is None:
        return values.mean()
    total = weights.detach().sum()
    if world_size > 1:
        dist.all_reduce(total)
    if total.device.type == "cpu" and total == 0:
        raise InputError(
            "The sample weights of a batch sum to 0 over all ranks, so it has no weighted mean: "
            "leave samples without weight out of the selection. Got only zeros."
        )
    return (values * weights).sum() * (world_size / total)


def _with_bias(terms: dict[str, Tensor], logit_bias: Tensor | None) -> dict[str, Tensor]:
    """Return the terms, with the gradient zero for a bias that cancels in them.

    A softmax does not change when all logits grow by the same number. DDP still waits for a
    gradient of each parameter.
    """
    if logit_bias is None:
        return terms
    (name, first), *others = terms.items()
    return {name: first + 0 * logit_bias, **dict(others)}
