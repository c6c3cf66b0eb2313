"""Models that judge a super-batch take its images as pixels, and finish one part at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from siftclip.datamodules.streaming import pixels
from siftclip.datamodules.streaming.batches import Batch
from siftclip.datamodules.streaming.pixels import Normalization
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.online.scoring_models import ScoredModel
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients

TEXT = {"context_length": 12, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
NORMALIZATION = Normalization(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
PARTS = 4


class Finished:
    """How many batches of finished images there are at a time."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0

    def note(self, images: Tensor) -> None:
        self.all += 1
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(images, self._gone)

    def _gone(self) -> None:
        self.now -= 1


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Finished:
    count, finish = Finished(), pixels.Normalization.__call__

    def note(self: Normalization, batch: Tensor) -> Tensor:
        images = finish(self, batch)
        count.note(images)
        return images

    monkeypatch.setattr(pixels.Normalization, "__call__", note)
    return count


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return CLIP(16, VIT, TEXT, output_dict=True)


def parts() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for number in range(PARTS):
        images = torch.randint(0, 256, (3, 16, 16, 3), generator=generator, dtype=torch.uint8)
        yield Batch(
            images=images.permute(0, 3, 1, 2),
            tokens=torch.randint(1, 64, (3, 12), generator=generator),
            rows=torch.arange(3 * number, 3 * number + 3),
            valid=torch.ones(3, dtype=torch.bool),
            normalization=NORMALIZATION,
        )


def test_parts_are_finished_one_at_a_time_while_they_are_scored(
    model: nn.Module, finished: Finished
) -> None:
    scored = ScoredModel(name="learner", model=lambda: model, config=ScoringConfig())
    found = scored.features([*parts()], range(PARTS))
    assert (finished.all, finished.most, finished.now) == (PARTS, 1, 0)
    expected = scored.features([part.finished() for part in parts()], range(PARTS))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("micro_batches", [1, PARTS])
def test_a_teacher_gets_images_as_models_take_them(model: nn.Module, micro_batches: int) -> None:
    given = [*parts()][:micro_batches]
    expected = [part.finished().images for part in given]
    seen: list[Tensor] = []

    def teacher(batch: Batch) -> None:
        seen.append(batch.images)

    objective = Objective(loss=SoftmaxLoss(), teacher=teacher)
    compute_gradients(model, objective, given, StepContext())
    assert all(map(torch.equal, seen, expected))
    assert len(seen) == micro_batches


def test_micro_batches_are_finished_one_at_a_time_while_they_are_trained_on(
    model: nn.Module, finished: Finished
) -> None:
    objective = Objective(loss=SoftmaxLoss())
    terms = compute_gradients(model, objective, [*parts()], StepContext())
    assert finished.all == 2 * PARTS  # a pass without a graph, and one with
    assert (finished.most, finished.now) == (1, 0)
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    floats = [part.finished() for part in parts()]
    expected = compute_gradients(model, objective, floats, StepContext())
    assert torch.equal(terms["loss"], expected["loss"])
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad)
