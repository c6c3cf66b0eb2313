"""Reference-guided contrastive loss: DRRho-CLIP (arXiv 2505.06699) on FastCLIP (2407.01445)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import (
    InputError,
    call_by_name,
    require_finite,
    require_fraction,
    require_positive,
)
from siftclip.trainer.losses.base import ContrastiveLoss, LossRun, mean_over_ranks
from siftclip.trainer.losses.collectives import gather_features
from siftclip.trainer.losses.copies import Copies
from siftclip.trainer.losses.inputs import LossInputs, require_teacher
from siftclip.trainer.losses.softmax import paired_terms

R = TypeVar("R", bound="ReferenceGuidedLoss")


class ReferenceGuidedLoss(ContrastiveLoss):
    """A softmax loss of how much better than a reference model each pair is told from the others.

    With s and r the similarities of model and reference (teacher_image, teacher_text), N + 1
    samples in the global batch, and m_ij = (s_ij - r_ij) - (s_ii - r_ii), a sample's loss is the
    mean over both directions of

        log(epsilon + mean over j != i of exp(scale * m_ij)).

    Copies of a sample are not among its others. The scale is that of the model for both
    similarities; the authors train with a constant one of 100. Compared with their code: the mean
    divides by N also inside the moving average (theirs by N + 1 there, by N in the gradient), and
    both directions are averaged (theirs are added up, and averaged only in the gradient of the
    temperature).

    Args:
        selected_rows: int64 [n], the rows of the pool that are trained on; needed for gamma < 1.
        gamma: below 1 the gradient of a sample is divided by a moving average, over the steps that
            it took part in, of epsilon + mean exp, in which the newest has this weight. None or 1
            divides by that of the batch alone: the plain softmax.
        epsilon: above 0; 1e-4 for the authors' DRRho runs. None means 1 / N, which is what the
            sample's own pair adds to the sum of a softmax.
        rho: None leaves the loss as it is and adds log N, so that without reference it is
            SoftmaxLoss. A number multiplies loss + rho with the temperature, as the authors do
            (rho 11): the constraint of distributionally robust optimisation, which matters where
            the temperature is learned.
        logit_scale: at which the model's is kept; None: it is learned.

    The averages are buffers, in the order of the sorted rows and equal on every rank, and so part
    of a checkpoint. They change in training mode only.

    Raises:
        InputError: a number is out of its range, or gamma < 1 comes without rows.
    """

    teacher = "features"

    selected_rows: Tensor | None
    log_mean_image: Tensor
    log_mean_text: Tensor

    def __init__(
        self,
        *,
        selected_rows: np.ndarray | None = None,
        gamma: float | None = None,
        epsilon: float | None = None,
        rho: float | None = None,
        logit_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.fixed_logit_scale = (
            None
            if logit_scale is None
            else require_positive("logit_scale", logit_scale, owner=self)
        )
        self.gamma = 1.0 if gamma is None else require_fraction("ReferenceGuidedLoss: gamma", gamma)
        self.rho = None if rho is None else require_finite("ReferenceGuidedLoss: rho", rho)
        self.epsilon = (
            None if epsilon is None else require_finite("ReferenceGuidedLoss: epsilon", epsilon)
        )
        if self.epsilon is not None and self.epsilon <= 0:
            raise InputError(
                f"ReferenceGuidedLoss: epsilon must be above 0, for example 1e-4. Got {epsilon!r}."
            )
        if self.gamma < 1 and selected_rows is None:
            raise InputError(
                "ReferenceGuidedLoss: gamma below 1 keeps an average for each sample and needs "
                f"selected_rows; gamma=null needs none. Got gamma={gamma!r}."
            )
        if self.gamma == 1 or selected_rows is None:
            self.register_buffer("selected_rows", None)
            return
        rows = torch.from_numpy(np.unique(np.asarray(selected_rows, dtype=np.int64)))
        self.register_buffer("selected_rows", rows)
        for name in ("log_mean_image", "log_mean_text"):
            # -inf, the logarithm of nothing, says that a sample has not been seen yet.
            self.register_buffer(name, torch.full((len(rows),), -torch.inf))
        # torch ships it without types
        self.register_load_state_dict_pre_hook(_require_same_rows)  # type: ignore[no-untyped-call]

    @classmethod
    def for_run(cls: type[R], run: LossRun, parameters: Mapping[str, Any]) -> R:
        """Build the loss with averages for the rows of the run."""
        return call_by_name(cls, {"selected_rows": run.selected_rows, **parameters})

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute `contrastive_loss`."""
        reference_image, reference_text = require_teacher(inputs, "ReferenceGuidedLoss")
        others = inputs.world_size * len(reference_image) - 1
        if others == 0:
            raise InputError(
                "ReferenceGuidedLoss compares a sample with the others of its batch and needs a "
                "global batch of at least 2 samples. Got 1."
            )
        copies = Copies.of(inputs)
        pairs = paired_terms(
            torch.cat([inputs.image_features, reference_image], dim=1),
            torch.cat([inputs.text_features, -reference_text], dim=1),
            inputs.logit_scale,
            copies=copies,
            rank=inputs.rank,
            world_size=inputs.world_size,
        )
        log_others: float | Tensor = math.log(others)
        if copies is not None:  # a sample without any other has a margin of nothing, too
            log_others = copies.others().clamp(min=1).to(pairs.margins.dtype).log()
        log_epsilon = -log_others if self.epsilon is None else math.log(self.epsilon)
        log_means = pairs.margins - log_others
        log_means = torch.logaddexp(log_means, log_means.new_zeros(()) + log_epsilon)
        if self.selected_rows is not None and self.training:
            average = self._update(log_means.detach(), inputs)
            # The gradient of exp(log mean), divided by the average instead of by the mean.
            factor = (log_means.detach() - average).exp_()
            log_means = average + factor * (log_means - log_means.detach())
        losses = log_means.mean(0)
        if self.rho is None and copies is not None:
            losses = losses + log_others
        loss = mean_over_ranks(losses, inputs.weights, world_size=inputs.world_size)
        if self.rho is not None:
            loss = (loss + self.rho) / inputs.logit_scale
        elif copies is None:
            loss = loss + log_others
        return {"contrastive_loss": loss}

    @torch.no_grad()
    def _update(self, log_means: Tensor, inputs: LossInputs) -> Tensor:
        """Update this rank's averages, [2, b], and with those of all ranks the buffers."""
        if inputs.rows is None:
            raise InputError(
                "ReferenceGuidedLoss: gamma below 1 needs the rows of the samples of each batch. "
                "Got none."
            )
        positions = self._positions(inputs.rows)
        old = torch.stack([self.log_mean_image[positions], self.log_mean_text[positions]])
        average = log_means
        if self.gamma < 1:
            mixed = torch.logaddexp(
                old.to(log_means.dtype) + math.log1p(-self.gamma),
                log_means + math.log(self.gamma),
            )
            average = torch.where(old == -torch.inf, log_means, mixed)
        ranks = {"rank": inputs.rank, "world_size": inputs.world_size}
        all_positions = gather_features(positions, **ranks)
        new = gather_features(average.T, **ranks).to(old.dtype)
        for column, buffer in enumerate((self.log_mean_image, self.log_mean_text)):
            # The average of a step that is not finite, and therefore skipped, stays what it was. Of
            # a row that is twice in one batch the larger stays, in whatever order they come.
            values = new[:, column].where(new[:, column].isfinite(), buffer[all_positions])
            buffer.scatter_reduce_(0, all_positions, values, "amax", include_self=False)
        return average

    def _positions(self, rows: Tensor) -> Tensor:
        selected = self.selected_rows
        assert selected is not None  # _update is called with a state only
        positions = torch.searchsorted(selected, rows).clamp_(max=len(selected) - 1)
        # On another device the comparison would wait for it in every step.
        if rows.device.type == "cpu" and not torch.equal(selected[positions], rows):
            strange = rows[selected[positions] != rows]
            raise InputError(
                f"ReferenceGuidedLoss: the rows of a batch must be among its "
                f"{len(selected)} selected_rows. Got {int(strange[0])}."
            )
        return positions


def _require_same_rows(
    module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    saved = state.get(f"{prefix}selected_rows")
    rows = module.selected_rows
    if (
        isinstance(saved, Tensor)
        and isinstance(rows, Tensor)
        and not torch.equal(saved.to(rows.device), rows)
    ):
        raise InputError(
            f"ReferenceGuidedLoss: a checkpoint keeps its averages for the {len(saved)} rows that "
            f"it was trained on; this run trains on {len(rows)} rows, other ones. Resume with the "
            f"selection of the checkpoint."
        )
