"""Small batches and a small model on which losses are checked, all in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import ContrastiveLoss, LossInputs
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients

ROWS = 64  # of the pool that samples are drawn from: a loss that keeps rows is built with these
SAMPLES = 16  # of a batch; in four parts on four ranks
STEPS = 2  # the second meets the state that the first has left
TOLERANCE = 1e-6  # relative, of float64: states may be float32
_SIDE, _WORDS, _DIM, _TEACHER_DIM = 2, 12, 8, 6
_DISTINCT = 6  # of a batch with copies: each sample is there two or three times
_TEACHER = ("teacher_img", "teacher_txt")


def synthetic_batch(
    loss: ContrastiveLoss, step: int = 0, *, weighted: bool = False, copies: bool = False
) -> Batch:
    """Draw a batch of distinct samples, with features of a teacher if the loss needs one.

    With `copies` each is said to be one of a few samples, with an image and a text of its own.
    """
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)

    images = normal(3, _SIDE, _SIDE)
    tokens = torch.randint(1, 50, (SAMPLES, _WORDS), generator=generator)
    rows = torch.randperm(ROWS, generator=generator)[:SAMPLES]
    return Batch(
        images=images,
        tokens=tokens,
        rows=torch.arange(SAMPLES) % _DISTINCT if copies else rows,
        copies=copies,
        valid=torch.ones(SAMPLES, dtype=torch.bool),
        references={}
        if loss.teacher == "none"
        else {name: F.normalize(normal(_TEACHER_DIM), dim=1) for name in _TEACHER},
        weights=0.1 + 3 * torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
        if weighted
        else None,
    )


def parts_of(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into parts of equal size."""

    def cut(values: Tensor) -> tuple[Tensor, ...]:
        return values.chunk(parts)

    weights = [None] * parts if batch.weights is None else cut(batch.weights)
    references = {name: cut(values) for name, values in batch.references.items()}
    columns = zip(
        *(cut(values) for values in (batch.images, batch.tokens, batch.rows, batch.valid)),
        weights,
        strict=True,
    )
    return [
        Batch(
            images=images,
            tokens=tokens,
            rows=rows,
            valid=valid,
            copies=batch.copies,
            weights=weight,
            references={name: values[part] for name, values in references.items()},
        )
        for part, (images, tokens, rows, valid, weight) in enumerate(columns)
    ]


class Towers(nn.Module):
    """The smallest model that is trained as open_clip's are."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.visual = nn.Linear(3 * _SIDE**2, _DIM, bias=False, dtype=torch.float64)
            self.text = nn.Linear(_WORDS, _DIM, bias=False, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor(1.6, dtype=torch.float64))
        start = torch.tensor(-2.0, dtype=torch.float64)
        self.logit_bias = nn.Parameter(start) if bias else None

    def encode_image(self, images: Tensor, *, normalize: bool) -> Tensor:
        """Encode images, [b, 3, h, w], to unit features [b, d]."""
        return F.normalize(self.visual(images.flatten(1)), dim=1)

    def encode_text(self, tokens: Tensor, *, normalize: bool) -> Tensor:
        """Encode tokens, int64 [b, length], to unit features [b, d]."""
        return F.normalize(self.text(tokens.double().sub(25) / 10), dim=1)

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor | None]:
        """Compute what open_clip's models return."""
        return {
            "image_features": self.encode_image(images, normalize=True),
            "text_features": self.encode_text(tokens, normalize=True),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def synthetic_inputs(
    loss: ContrastiveLoss, step: int = 0, *, weighted: bool = False, bias: bool = True
) -> LossInputs:
    """Compute what the loss would be given of a synthetic batch, without gradients, in float64."""
    batch, model = synthetic_batch(loss, step, weighted=weighted), Towers(bias=bias)
    teacher_image, teacher_text = _teacher(batch) or (None, None)
    with torch.no_grad():
        outputs = model(batch.images, batch.tokens)
    return LossInputs(
        **outputs,
        rows=batch.rows,
        weights=batch.weights,
        teacher_image=teacher_image,
        teacher_text=teacher_text,
    )


def inputs_with_copies(
    loss: ContrastiveLoss, similarity: float, *, bias: bool = True
) -> LossInputs:
    """Build inputs with copies, where only images and texts of copies have the similarity.

    Those of all other pairs do not depend on it, nor does the norm of any vector. So a loss that
    leaves copies out does not, either.

    Args:
        loss: for which a teacher is made, if it needs one.
        similarity: in [-0.4, 0.4], of the image of a sample with the texts of its copies.
        bias: whether the model has one.
    """
    inputs, batch = synthetic_inputs(loss, bias=bias), synthetic_batch(loss, copies=True)
    images, texts = _by_similarity(batch.rows, similarity, seed=0)
    teacher_images, teacher_texts = _by_similarity(batch.rows, similarity, seed=1)
    has_teacher = inputs.teacher_image is not None
    return replace(
        inputs,
        image_features=images,
        text_features=texts,
        rows=batch.rows,
        copies=True,
        teacher_image=teacher_images if has_teacher else None,
        teacher_text=teacher_texts if has_teacher else None,
    )


def _by_similarity(rows: Tensor, similarity: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Build unit vectors of images and texts, float64 [b, 2b], of wanted similarities.

    Images are the first axes, so that a text's coordinates there are its similarities with them.
    Each text has an axis of its own for what is left of its length.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(rows)
    similarities = 0.4 * torch.rand(count, count, generator=generator, dtype=torch.float64) - 0.2
    is_copy = (rows[:, None] == rows) & ~torch.eye(count, dtype=torch.bool)
    similarities[is_copy] = similarity
    axes = torch.eye(2 * count, dtype=torch.float64)
    rest = (1 - similarities.square().sum(0)).sqrt()
    return axes[:count], torch.cat([similarities.T, rest.diag()], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAnswer:
    """What a step of training computes."""

    shared: Mapping[str, Tensor]
    """Values of terms, and gradients of parameters; the mean over ranks is what counts."""
    sample_losses: Tensor | None
    """[b], of this rank's samples."""


def train_step(
    loss: ContrastiveLoss,
    micro_batches: Sequence[Batch],
    *,
    bias: bool,
    rank: int = 0,
    world_size: int = 1,
) -> StepAnswer:
    """Compute terms and gradients of a step as training does, with a fresh model."""
    model = Towers(bias=bias)
    context = StepContext(rank=rank, world_size=world_size)
    objective = Objective(loss=loss, teacher=_teacher)
    terms = compute_gradients(model, objective, micro_batches, context)
    gradients = {
        f"the gradient of {name}": torch.zeros_like(parameter)
        if parameter.grad is None
        else parameter.grad
        for name, parameter in model.named_parameters()
    }
    return StepAnswer(
        shared={**{f"the term {name}": value for name, value in terms.items()}, **gradients},
        sample_losses=loss.sample_losses,
    )


def biases_of(loss: ContrastiveLoss) -> tuple[bool, ...]:
    """Return whether the loss trains models with a logit bias, and those without."""
    return (True,) if loss.needs_logit_bias else (True, False)


def assert_close(found: Tensor, expected: Tensor, message: str, *, rtol: float = TOLERANCE) -> None:
    """Assert that two tensors are equal but for rounding."""
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=1e-8, msg=lambda text: f"{message}: {text}"
    )


def _teacher(batch: Batch) -> tuple[Tensor, Tensor] | None:
    if not batch.references:
        return None
    image, text = (batch.references[name] for name in _TEACHER)
    return image, text
