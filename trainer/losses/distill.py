"""The softmax loss with distillation from a teacher's logits, as in open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from siftclip.errors import InputError, call_by_name, require_finite
from siftclip.trainer.losses.base import ContrastiveLoss, LossRun, mean_over_ranks
from siftclip.trainer.losses.collectives import (
    gather_features,
    log_sum_exp_over_ranks,
    sum_to_owner,
)
from siftclip.trainer.losses.copies import Copies
from siftclip.trainer.losses.inputs import LossInputs, require_teacher
from siftclip.trainer.losses.paired import paired_expectation, paired_log_sum_exp
from siftclip.trainer.losses.softmax import PairedTerms, paired_terms

D = TypeVar("D", bound="DistillLoss")


class DistillLoss(ContrastiveLoss):
    """The softmax loss plus the cross entropy of the student's softmaxes under the teacher's.

    With weights of 1 equal to open_clip's DistillClipLoss(local_loss=True, gather_with_grad=True),
    without its matrices. Sample weights apply to both terms.

    Args:
        teacher_logit_scale: exponentiated; that of the teacher's training, 100 for OpenAI's CLIP.
        contrastive_weight: factor of the softmax loss, at least 0.
        distill_weight: factor of the distillation, at least 0.

    Raises:
        InputError: a number is not finite or negative.
    """

    gives_sample_losses = True
    teacher = "model_or_features"

    def __init__(
        self,
        teacher_logit_scale: float,
        *,
        contrastive_weight: float = 1.0,
        distill_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.teacher_logit_scale = _at_least_0("teacher_logit_scale", teacher_logit_scale)
        self.contrastive_weight = _at_least_0("contrastive_weight", contrastive_weight)
        self.distill_weight = _at_least_0("distill_weight", distill_weight)

    @classmethod
    def for_run(cls: type[D], run: LossRun, parameters: Mapping[str, Any]) -> D:
        """Build the loss with the scale of the run's teacher."""
        return call_by_name(cls, {"teacher_logit_scale": run.teacher_logit_scale, **parameters})

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Compute `contrastive_loss` and `distill_loss`, each times its weight."""
        teacher_image, teacher_text = require_teacher(inputs, "DistillLoss")
        rank, world_size = inputs.rank, inputs.world_size
        copies = Copies.of(inputs)
        student = paired_terms(
            inputs.image_features,
            inputs.text_features,
            inputs.logit_scale,
            copies=copies,
            rank=rank,
            world_size=world_size,
        )
        distill = distillation(
            student,
            teacher_image * self.teacher_logit_scale,
            teacher_text,
            copies=copies,
            rank=rank,
            world_size=world_size,
        )
        losses = student.cross_entropies().mean(0)
        self.sample_losses = losses.detach()
        contrastive = mean_over_ranks(losses, inputs.weights, world_size=world_size)
        distilled = mean_over_ranks(distill, inputs.weights, world_size=world_size)
        return {
            "contrastive_loss": self.contrastive_weight * contrastive,
            "distill_loss": self.distill_weight * distilled,
        }


def distillation(
    student: PairedTerms,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    copies: Copies | None = None,
    rank: int,
    world_size: int,
) -> Tensor:
    """Compute -sum softmax(teacher) * log_softmax(student) of each sample, mean of both directions.

    Args:
        student: of this rank's samples.
        teacher_image: float [b, e], times the teacher's logit scale.
        teacher_text: float [b, e].
        copies: of the batch, which the teacher's softmaxes leave out as those of the student do.
        rank: of this process.
        world_size: number of ranks.

    Returns:
        float [b].
    """
    with torch.no_grad():
        all_text = gather_features(teacher_text, rank=rank, world_size=world_size)
        row_lse, partial = paired_log_sum_exp(teacher_image, all_text, copies=copies)
        column_lse = log_sum_exp_over_ranks(partial, world_size=world_size)
    row_mean, column_partial = paired_expectation(
        student.image,
        student.all_text,
        teacher_image,
        all_text,
        row_lse,
        column_lse,
        copies=copies,
    )
    column_mean = sum_to_owner(column_partial, rank=rank, world_size=world_size)
    log_sum_exps = student.cross_entropies() + student.own
    return (log_sum_exps - torch.stack([row_mean, column_mean])).mean(0)


def _at_least_0(name: str, value: float) -> float:
    number = require_finite(f"DistillLoss: {name}", value)
    if number < 0:
        raise InputError(f"DistillLoss: {name} must be at least 0. Got {value!r}.")
    return number
