"""What a loss is computed from, and the checks of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from siftclip.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Features of the samples of this rank, and what else the losses need.

    b is the number of samples of this rank, the same on every rank. What `terms` gets is float32
    (float64 of float64 features), and scalars have the shape [].

    Attributes:
        image_features: float [b, d], unit norm, not scaled.
        text_features: float [b, d], unit norm: text i is that of image i.
        logit_scale: scalar or [1], already exponentiated: the inverse of the temperature.
        logit_bias: scalar or [1], added to every logit; None of a model without one.
        rows: int64 [b], the rows of the pool that the samples are, from 0; None if not known.
        copies: whether a row may be in the batch of all ranks more than once; the same on every
            rank. Pairs of a sample with its copies are then left out, see `Copies`.
        weights: float [b], at least 0, or None for equal ones; the loss becomes the mean over all
            ranks with these weights (`mean_over_ranks`).
        teacher_image: float [b, e], unit norm, of a teacher or reference model; None without one.
        teacher_text: float [b, e], unit norm.
        rank: of this process.
        world_size: number of ranks, each with b samples.
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    rows: Tensor | None = None
    copies: bool = False
    weights: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    rank: int = 0
    world_size: int = 1


def check_shapes(inputs: LossInputs, owner: str) -> None:
    """Raise InputError where shapes do not fit; reads no value, so that no device has to wait."""
    image, text = inputs.image_features, inputs.text_features
    if image.ndim != 2 or image.shape != text.shape or len(image) == 0:
        raise InputError(
            f"{owner}: image_features and text_features must have one shape [samples, dim] with at "
            f"least one sample. Got {list(image.shape)} and {list(text.shape)}."
        )
    for name in ("logit_scale", "logit_bias"):
        scalar = getattr(inputs, name)
        if scalar is not None and scalar.numel() != 1:
            raise InputError(f"{owner}: {name} must hold one number. Got {list(scalar.shape)}.")
    for name in ("rows", "weights"):
        column = getattr(inputs, name)
        if column is not None and column.shape != image.shape[:1]:
            raise InputError(
                f"{owner}: {name} must have one entry for each of the {len(image)} samples. "
                f"Got the shape {list(column.shape)}."
            )
    if inputs.weights is not None and inputs.weights.device.type == "cpu":
        check_weights(inputs.weights, owner)


def check_weights(weights: Tensor, owner: str) -> None:
    """Raise InputError for weights below 0, infinite or NaN.

    The losses call it for weights on the CPU only, because elsewhere it would wait for the device
    in every step; whoever makes weights calls it where they are made.
    """
    bad = ~((weights >= 0) & torch.isfinite(weights))
    if bad.any():
        raise InputError(
            f"{owner}: sample weights must be finite and at least 0. Got {float(weights[bad][0])} "
            f"at position {int(bad.nonzero()[0])}."
        )


def require_teacher(inputs: LossInputs, owner: str) -> tuple[Tensor, Tensor]:
    """Return the image and text features of the teacher, [b, e] each, detached."""
    image, text = inputs.teacher_image, inputs.teacher_text
    if image is None or text is None:
        raise InputError(
            f"{owner} needs the features of a teacher or reference model for every sample, and "
            f"teacher_image or teacher_text is missing: name a model or cached features, or train "
            f"with another loss."
        )
    if image.ndim != 2 or image.shape != text.shape or len(image) != len(inputs.image_features):
        raise InputError(
            f"{owner}: teacher_image and teacher_text must have one shape [samples, dim] with "
            f"{len(inputs.image_features)} samples. Got {list(image.shape)} and "
            f"{list(text.shape)}."
        )
    return image.detach(), text.detach()


def in_loss_precision(inputs: LossInputs) -> LossInputs:
    """Cast to float32, or float64 where the features are; scalars get the shape []."""
    dtype = torch.promote_types(inputs.image_features.dtype, torch.float32)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return replace(
        inputs,
        image_features=inputs.image_features.to(dtype),
        text_features=inputs.text_features.to(dtype),
        logit_scale=inputs.logit_scale.to(dtype).reshape(()),
        logit_bias=None if inputs.logit_bias is None else inputs.logit_bias.to(dtype).reshape(()),
        weights=cast(inputs.weights),
        teacher_image=cast(inputs.teacher_image),
        teacher_text=cast(inputs.teacher_text),
    )
