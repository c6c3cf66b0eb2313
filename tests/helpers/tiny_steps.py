"""A tiny CLIP, batches for it, and what one step of them does: values on the CPU, to compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import ContrastiveLoss
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients

VOCABULARY = 99
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1}


def tiny_clip(*, logit_bias: float | None = None) -> nn.Module:
    """The same small CLIP each time, in training mode, with a bias of its logits or without."""
    architecture = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    if logit_bias is not None:
        architecture |= {"init_logit_bias": logit_bias}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = load_clip_model("tiny", architecture=architecture).model
    model.output_dict = True  # type: ignore[assignment]
    return model.train()


def make_batch(samples: int, *, seed: int = 1) -> Batch:
    """Noise, with features of a teacher: references `image` and `text`, float16 [b, 8]."""
    generator = torch.Generator().manual_seed(seed)
    unit = [F.normalize(torch.randn(samples, 8, generator=generator), dim=-1) for _ in range(2)]
    return Batch(
        images=torch.randn(samples, 3, 32, 32, generator=generator),
        tokens=torch.randint(1, VOCABULARY, (samples, 16), generator=generator),
        rows=torch.arange(samples),
        valid=torch.ones(samples, dtype=torch.bool),
        references=dict(zip(("image", "text"), (values.half() for values in unit), strict=True)),
    )


def cut(batch: Batch, pieces: int) -> list[Batch]:
    """Micro-batches of equal size."""
    size = len(batch.rows) // pieces
    return [
        batch._map(lambda tensor, at=at: tensor[at : at + size])  # type: ignore[misc]
        for at in range(0, size * pieces, size)
    ]


def teacher_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """The cached features of a batch."""
    return batch.references["image"], batch.references["text"]


def step_gradients(
    model: nn.Module,
    loss: Callable[[], ContrastiveLoss],
    batches: Sequence[Batch],
    *,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    teacher: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step of a copy of the model, and the gradients of its weights, on the CPU.

    With a precision it runs under a plain autocast, as somebody else's loop would open one: with
    the cache of weights.
    """
    model = copy.deepcopy(model).to(device)
    objective = Objective(loss=loss().to(device))
    if teacher:
        objective = Objective(loss=objective.loss, teacher=teacher_of)
    moved = [batch.to(device) for batch in batches]
    with torch.autocast(torch.device(device).type, precision, enabled=precision is not None):
        terms = compute_gradients(model, objective, moved, StepContext())
    gradients = {
        name: parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(terms["loss"]), gradients


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of all differences, in parts of the norm of what is expected."""
    assert found.keys() == expected.keys()
    one, other = (
        torch.cat([of[name].flatten().double() for name in expected]) for of in (found, expected)
    )
    return float((one - other).norm() / other.norm())
