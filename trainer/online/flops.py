"""Floating point operations of one sample, counted operator by operator.

A multiplication with an addition counts as two, as in open_clip's published profiles. Counted are
matrix products, convolutions and attention of the towers (and of a caption decoder in training).
Not counted are norms, activations, the resizing of images, the contrastive loss and its matrix of
similarities, selection, and the optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError, require_int
from siftclip.reading import reason_of
from siftclip.trainer.online.scoring import model_mode, scoring_features, seeded_dropout
from siftclip.trainer.online.scoring_config import ScoringConfig

SAMPLES = 2  # batch norms in training refuse one value a channel

ImageSize = int | tuple[int, int]  # pixels a side, or height and width


class InputSizes(TypedDict):
    """What a sample of a batch measures."""

    image_size: ImageSize
    context_length: int  # tokens


def input_sizes(clip: ClipModel) -> InputSizes:
    """Return the sizes that the transform and the tokenizer of a model make of a sample."""
    size = clip.config["preprocess_cfg"]["size"]
    return {
        "image_size": size if isinstance(size, int) else (int(size[0]), int(size[1])),
        "context_length": clip.tokenizer(["a"]).shape[1],
    }


def require_forward(clip: ClipModel) -> None:
    """Let a model compute on a blank image and a caption of the sizes that it says it takes.

    open_clip builds models of any sizes, such as patches larger than the image.

    Raises:
        InputError: it cannot.
    """
    sizes = input_sizes(clip)
    try:
        images, _ = blank_samples(clip.model, **sizes)
        tokens = clip.tokenizer(["a caption"] * SAMPLES).to(images.device)
        with torch.no_grad(), model_mode(clip.model, training=False):
            clip.model(images, tokens)
    except (RuntimeError, ValueError, IndexError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise InputError(
            "model: it cannot compute on what it is made for, images of "
            f"{sizes['image_size']} pixels and captions of {sizes['context_length']} tokens: "
            f"{reason_of(error)}. Check model.architecture and model.options."
        ) from error


def forward_flops(
    model: nn.Module,
    *,
    scoring: ScoringConfig | None = None,
    image_size: ImageSize | None = None,
    context_length: int | None = None,
) -> int:
    """Count the FLOPs of the forward of one sample through both towers, without gradients.

    The forward is run on two blank samples on the model's device. Of ViT-B-32 it gives
    14.78e9 and of RN50 18.18e9, as open_clip's `docs/model_profile.csv`.

    Args:
        model: the bare open_clip model, left as it was found; not sharded.
        scoring: of `scoring_features`; None for a plain forward in evaluation mode.
        image_size: of the images; None for the model's own.
        context_length: tokens of a caption; None for the model's own, and of a text tower of
            Hugging Face, which takes captions of any length, for that of open_clip's tokenizers.
    """
    config = scoring or ScoringConfig()
    images, tokens = blank_samples(model, image_size, context_length)
    with _counting() as counter:
        scoring_features(model, images, tokens, config, 0)
    return int(counter.get_total_flops()) // SAMPLES


def training_flops(
    model: nn.Module, *, image_size: ImageSize | None = None, context_length: int | None = None
) -> int:
    """Count the FLOPs of forward and backward of one sample, in training mode.

    They are measured: about 3 times the forward, less what needs no gradient, such as the images,
    or the weights of a locked tower. What gradient checkpointing computes again is counted, and
    what patch dropout leaves out is not. The first forward of micro-batches is `forward_flops` in
    training mode.

    Args:
        model: the bare open_clip model, left as it was found; not sharded.
        image_size: as of `forward_flops`.
        context_length: as of `forward_flops`.
    """
    images, tokens = blank_samples(model, image_size, context_length)
    with (
        _kept_gradients(model),
        model_mode(model, training=True),
        seeded_dropout(0, images.device),
        torch.enable_grad(),
        _counting() as counter,
    ):
        outputs = model(images, tokens)
        values = outputs.values() if isinstance(outputs, dict) else outputs
        parts = [value.float().sum() for value in values if _has_graph(value)]
        if parts:  # not with everything locked
            torch.autograd.backward(torch.stack(parts).sum())
    return int(counter.get_total_flops()) // SAMPLES


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count what can be counted: fused kernels for attention are not, or differ by device.

    torch's fast path of MultiheadAttention in evaluation is one operator without a formula, which
    would hide a third of a vision transformer. The backward of a fused attention computes its
    matrix again; the plain one does not.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _TotalFlops() as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _TotalFlops(FlopCounterMode):
    """Counts without asking which module an operator belongs to, and convolutions by their groups.

    torch's hooks for modules fail where a parameter is the input of one: the queries of attention
    pooling in timm's SigLIP and PE towers, and in CoCa. Its count of the gradient of weights takes
    every convolution for one of a single group: a thousand times too much of a depthwise one.
    """

    def __init__(self) -> None:
        backward = {torch.ops.aten.convolution_backward: _convolution_backward}
        super().__init__(display=False, custom_mapping=backward)
        self.mod_tracker: Any = _NoModules()


def _convolution_backward(
    gradient: Sequence[int],
    inputs: Sequence[int],
    weight: Sequence[int],
    *others: Any,
    **named: Any,
) -> int:
    """Count as much as the forward for each gradient: each weight times each place of a map."""
    of_inputs: bool
    of_weight: bool
    _, _, _, _, transposed, _, _, (of_inputs, of_weight, _) = others
    places = inputs if transposed else gradient
    forward = 2 * places[0] * math.prod(weight) * math.prod(places[2:])
    return forward * (of_inputs + of_weight)


class _NoModules:
    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


@contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _has_graph(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def blank_samples(
    model: nn.Module,
    image_size: ImageSize | None,
    context_length: int | None,
    *,
    samples: int = SAMPLES,
) -> tuple[Tensor, Tensor]:
    """Return images [samples, 3, h, w] in the weights' type, and tokens; on the model's device."""
    clip: Any = model
    tower = getattr(clip, "text", clip)
    limit = DEFAULT_CONTEXT_LENGTH if isinstance(tower, HFTextEncoder) else tower.context_length
    size = clip.visual.image_size if image_size is None else image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    length = limit if context_length is None else context_length
    for option, value in (
        ("image_size", height),
        ("image_size", width),
        ("context_length", length),
    ):
        require_int(option, value, minimum=1)
    weight = next(clip.visual.parameters())
    images = torch.zeros(samples, 3, height, width, device=weight.device, dtype=weight.dtype)
    tokens = torch.full((samples, length), 2, device=weight.device)  # neither padding nor the first
    return images, tokens
