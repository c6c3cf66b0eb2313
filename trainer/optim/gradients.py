"""The gradients of one step: of a batch at once, or of micro-batches that share all negatives.

Nothing here knows Lightning, so that a step can be compared with open_clip's own training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from siftclip.datamodules.models.autocast import no_weight_cache
from siftclip.datamodules.models.typed import as_clip
from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import (
    ContrastiveLoss,
    LossInputs,
    caption_loss_sum,
    caption_tokens,
)

TeacherFeatures = Callable[[Batch], tuple[Tensor, Tensor] | None]


def no_teacher(batch: Batch) -> None:
    """Return no teacher, for objectives that have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised, and what it needs beside the model's own features."""

    loss: ContrastiveLoss
    teacher: TeacherFeatures = no_teacher  # image and text features [m, e] of a micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """How a step runs: where this process stands, and who takes the gradients."""

    rank: int = 0
    world_size: int = 1
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    unsynced: Callable[[], AbstractContextManager[Any]] = nullcontext  # gradients stay on the rank
    seeds: Sequence[int] | None = None  # of dropout, one a micro-batch


def compute_gradients(
    model: nn.Module,
    objective: Objective,
    micro_batches: Sequence[Batch],
    context: StepContext,
    *,
    features: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Add the gradients of this rank's batch to the model's parameters.

    With one micro-batch this is a forward and a backward pass. With several it is GradCache
    (arXiv 2101.06983): features of all are computed without a graph, the loss of the whole batch
    gives their gradients, and a second forward of each micro-batch carries those into the towers.
    The result is that of the whole batch, where open_clip's `--accum-freq` k multiplies the
    gradient of the logit scale by k. The second forward repeats the first one's dropout, batch
    norm statistics count once, and gradients are exchanged in the last backward only.

    Args:
        model: an open_clip model that returns dictionaries.
        objective: the losses.
        micro_batches: of equal size, on the model's device. Images that are still pixels are
            finished one micro-batch at a time.
        context: of this process.
        features: image and text features of all micro-batches that the model gives now, [b, d]
            each, where they are known; several micro-batches then need one forward instead of two.

    Returns:
        The value of each term, detached; their sum is `loss`. The mean over ranks is the value of
        the global batch.
    """
    caption_share = _caption_share(objective, micro_batches, context, model)
    if len(micro_batches) == 1:
        (batch,) = micro_batches
        batch = batch.finished()  # once: a teacher takes it, too
        _seed(context, 0, batch.images.device)
        outputs = model(_images(model, batch), batch.tokens)
        terms: dict[str, Tensor] = objective.loss(
            _loss_inputs(
                [batch],
                [_taught(objective, batch)],
                context,
                image=outputs["image_features"],
                text=outputs["text_features"],
                scale=outputs["logit_scale"],
                bias=outputs.get("logit_bias"),
            )
        )
        if caption_share is not None:
            terms["caption_loss"] = caption_share * _caption_sum(model, outputs, batch)
        total = _total(terms)
        context.backward(total)
        return {**{name: value.detach() for name, value in terms.items()}, "loss": total.detach()}
    return _cached_gradients(model, objective, micro_batches, context, caption_share, features)


def _cached_gradients(
    model: nn.Module,
    objective: Objective,
    micro_batches: Sequence[Batch],
    context: StepContext,
    caption_share: Tensor | None,
    features: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    clip = as_clip(model)
    images, texts = ([], []) if features is None else ([features[0]], [features[1]])
    with torch.no_grad(), no_weight_cache(), kept_statistics(model):
        for index, batch in enumerate(micro_batches if features is None else ()):
            _seed(context, index, batch.images.device)
            images.append(clip.encode_image(_images(model, batch), normalize=True))
            texts.append(clip.encode_text(batch.tokens, normalize=True))
        teachers = [_taught(objective, batch) for batch in micro_batches]
        scale, bias = clip.logit_scale.exp(), getattr(model, "logit_bias", None)
    leaves = {"image": torch.cat(images), "text": torch.cat(texts), "scale": scale}
    if bias is not None:
        leaves["bias"] = bias
    leaves = {name: _exact(value.detach()).requires_grad_() for name, value in leaves.items()}
    terms = objective.loss(_loss_inputs(micro_batches, teachers, context, **leaves))
    total = _total(terms)
    values = {name: value.detach() for name, value in terms.items()}
    wanted = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = dict(zip(leaves, wanted, strict=True))
    samples = len(micro_batches[0].rows)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        mine = slice(index * samples, (index + 1) * samples)
        with nullcontext() if last else context.unsynced():
            _seed(context, index, batch.images.device)
            outputs = model(_images(model, batch), batch.tokens)
            # The gradient of this sum is the chain rule through the features.
            surrogate = _along(outputs["image_features"], gradients["image"][mine]) + _along(
                outputs["text_features"], gradients["text"][mine]
            )
            if caption_share is not None:
                caption = caption_share * _caption_sum(model, outputs, batch)
                values["caption_loss"] = values.get("caption_loss", 0) + caption.detach()
                surrogate = surrogate + caption
            if last:
                for name, key in (("logit_scale", "scale"), ("logit_bias", "bias")):
                    if gradients.get(key) is not None:
                        surrogate = surrogate + _along(outputs[name], gradients[key])
            if surrogate.requires_grad:  # not with locked towers
                context.backward(surrogate)
    return {**values, "loss": _total(values)}


def _taught(objective: Objective, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Ask the teacher, with images as models take them unless it says `reads_images = False`."""
    teacher = objective.teacher
    if teacher is no_teacher:
        return None
    return teacher(batch.finished() if getattr(teacher, "reads_images", True) else batch)


def _total(terms: dict[str, Tensor]) -> Tensor:
    first, *others = terms.values()
    return sum(others, start=first)


def _along(output: Tensor, gradient: Tensor) -> Tensor:
    return (_exact(output) * gradient).sum()


def _exact(values: Tensor) -> Tensor:
    """Cast to float32 at least, as the losses compute."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _loss_inputs(
    micro_batches: Sequence[Batch],
    teachers: Sequence[tuple[Tensor, Tensor] | None],
    context: StepContext,
    *,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
) -> LossInputs:
    taught = [pair for pair in teachers if pair is not None]
    return LossInputs(
        image_features=image,
        text_features=text,
        logit_scale=scale,
        logit_bias=bias,
        rows=torch.cat([batch.rows for batch in micro_batches]),
        copies=any(batch.copies for batch in micro_batches),
        weights=_weights(micro_batches),
        teacher_image=_unit([pair[0] for pair in taught]),
        teacher_text=_unit([pair[1] for pair in taught]),
        rank=context.rank,
        world_size=context.world_size,
    )


def _weights(micro_batches: Sequence[Batch]) -> Tensor | None:
    """Join the weights of all samples, float [b]; None where they count alike."""
    weights = [batch.weights for batch in micro_batches if batch.weights is not None]
    return torch.cat(weights) if weights else None


def _unit(parts: Sequence[Tensor]) -> Tensor | None:
    # cached features may be stored as half precision, or not normalised
    # autocast to bfloat16 refuses to join half precision
    return F.normalize(torch.cat([_exact(part) for part in parts]), dim=-1) if parts else None


def _caption_share(
    objective: Objective, micro_batches: Sequence[Batch], context: StepContext, model: nn.Module
) -> Tensor | None:
    """Compute what a token's cross entropy counts on this rank; None for models without captions.

    With weights, the caption loss is the mean over all tokens in which each counts as much as its
    sample does in the contrastive loss.
    """
    if not hasattr(model, "text_decoder"):
        return None
    labels = torch.cat([batch.tokens[:, 1:] for batch in micro_batches])
    return (
        objective.loss.caption_weight
        * context.world_size
        / caption_tokens(
            labels,
            world_size=context.world_size,
            weights=_weights(micro_batches),
            pad_token=_pad_token(model),
        )
    )


def _caption_sum(model: nn.Module, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    return caption_loss_sum(
        outputs["logits"], outputs["labels"], batch.weights, pad_token=_pad_token(model)
    )


def _pad_token(model: nn.Module) -> int:
    from open_clip.hf_model import HFTextEncoder

    tower: Any = model.text
    is_hugging_face = isinstance(tower, HFTextEncoder)
    pad_token: int = tower.config.pad_token_id if is_hugging_face else tower.pad_id
    return pad_token


def _images(model: nn.Module, batch: Batch) -> Tensor:
    """Return finished images in the type of the weights: pure bf16 has no autocast."""
    images = batch.finished().images
    return images if torch.is_autocast_enabled(images.device.type) else images.to(_dtype(model))


def _dtype(model: nn.Module) -> torch.dtype:
    return next(as_clip(model).visual.parameters()).dtype


def _seed(context: StepContext, index: int, device: torch.device) -> None:
    if context.seeds is None:
        return
    # torch.manual_seed also walks over accelerators that are not used: 1.5 ms a step
    torch.default_generator.manual_seed(context.seeds[index])
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(context.seeds[index])


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers of the batch norms of a model, which a forward pass changes."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in module.buffers(recurse=False)
    ]


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Keep running statistics from moving twice where batch norms see the batch once more."""
    buffers = running_statistics(model)
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
