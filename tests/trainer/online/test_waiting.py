"""How often a step waits for the device, and whether its values meet on one: a simulated GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from simulated_cuda import GPU, MIX, WAIT, module_on_gpu, simulated_cuda
from torch import nn
from torch.nn.functional import normalize

from siftclip.datamodules.streaming import pixels
from siftclip.datamodules.streaming.batches import Batch, StepBatch
from siftclip.datamodules.streaming.crops import CropRoom, PackedCrops
from siftclip.datamodules.streaming.pixels import Normalization
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.selectors.core.source import Logits
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.jest.jest import JEST
from siftclip.selectors.methods.jest.learnability import Learnability, ModelFeatures
from siftclip.selectors.methods.running_covariance import RunningVas
from siftclip.trainer.loop.meter import WindowMeter
from siftclip.trainer.losses import DistillLoss, ReferenceGuidedLoss, SigLipLoss, SoftmaxLoss
from siftclip.trainer.online.in_loop import CachedFirstStage, Chosen, InLoopSelection, StepDraw
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.online.scoring_models import CachedModel, ScoredModel
from siftclip.trainer.online.super_batch import PoolData
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients
from siftclip.trainer.optim.optimizer import clamp_logit_scale, make_optimizer
from siftclip.trainer.optim.update import clip_gradients, gradient_norm, step_if_finite
from siftclip.trainer.settings.optim import OptimSettings

SIZE, LENGTH, WORDS, WIDTH = 32, 16, 512, 48
NORMALIZATION = Normalization(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def tiny(bias: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": SIZE, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": 64, "heads": 2, "layers": 2}
    model = open_clip.CLIP(64, vision, text, init_logit_bias=bias, output_dict=True)
    return model.train()


@pytest.fixture(autouse=True)
def constants() -> Iterator[None]:
    """What images are normalised with is copied to the device once, before the first step."""
    with simulated_cuda():
        batch(0).to("cuda").finished()
    yield
    pixels._constants.cache_clear()


def batch(start: int, samples: int = 8) -> Batch:
    random = torch.Generator().manual_seed(start)
    tokens = torch.randint(1, WORDS - 2, (samples, LENGTH), generator=random)
    tokens[:, -1] = WORDS - 1
    return Batch(
        images=torch.randint(256, (samples, 3, SIZE, SIZE), generator=random).to(torch.uint8),
        normalization=NORMALIZATION,
        tokens=tokens,
        rows=torch.arange(start, start + samples),
        valid=torch.ones(samples, dtype=torch.bool),
        references={
            key: normalize(torch.randn(samples, WIDTH, generator=random), dim=1).half()
            for key in ("there_img", "there_txt")
        },
    )


def cropped(start: int) -> Batch:
    """A batch of crops, which the device resizes."""
    whole, packed = batch(start), PackedCrops(8, SIZE, CropRoom())
    for index, image in enumerate(whole.images):
        packed.put(index, image[:, index:, : SIZE - 2 * index])
    images, crops = packed.finish(whole.valid)
    return replace(whole, images=images, crops=crops)


def batches(count: int, make: Callable[[int], Batch] = batch) -> list[Batch]:
    step = StepBatch([make(8 * number) for number in range(count)]).to("cuda", non_blocking=True)
    step.resize()
    return [*step.micro_batches]


# ---- a step -------------------------------------------------------------------------------------
def teacher(part: Batch) -> Any:
    return part.references["there_img"], part.references["there_txt"]


LOSSES: dict[str, tuple[Callable[[], Any], float | None]] = {
    "softmax": (SoftmaxLoss, None),
    "sigmoid": (SigLipLoss, -10.0),
    "distill": (lambda: DistillLoss(100.0), None),
    "reference": (ReferenceGuidedLoss, None),
}


@pytest.mark.parametrize("of_loader", [batch, cropped])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_wait_for_the_device(
    name: str, parts: int, of_loader: Callable[[int], Batch]
) -> None:
    make, bias = LOSSES[name]
    with simulated_cuda() as events:
        model = module_on_gpu(tiny(bias))
        loss = module_on_gpu(make())
        optimizer = make_optimizer(model, OptimSettings(), fused=True)
        meter = WindowMeter(GPU)
        events.clear()
        for step in range(2):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                terms = compute_gradients(
                    model,
                    Objective(loss=loss, teacher=teacher),
                    batches(parts, of_loader),
                    StepContext(seeds=[step] * parts),
                )
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            norm = gradient_norm(weights)
            clip_gradients(weights, norm, 1.0)
            finite = torch.isfinite(norm)
            step_if_finite(optimizer, finite, optimizer.step)
            clamp_logit_scale(model)
            meter.add(terms, norm, finite)
        assert events.of(MIX) == {}
        assert events.of(WAIT) == {}


# ---- a step that selects ------------------------------------------------------------------------
LEARNER, REFERENCE = ModelFeatures(name="learner"), ModelFeatures(name="reference")
BOTH: dict[str, Any] = {"learner": LEARNER, "reference": REFERENCE, "fraction": 0.5}
SELECTORS: dict[str, Callable[[], Any]] = {
    "jest, sigmoid": lambda: JEST(**BOTH, loss="sigmoid", chunks=4),
    "jest, softmax": lambda: JEST(**BOTH, loss="softmax", chunks=4),
    "learnability": lambda: Learnability(**BOTH),
    "clip_score": lambda: ClipScore(features="learner", fraction=0.5),
    "running_vas": lambda: RunningVas(fraction=0.5),
}
# The sums that it moves are checked, since they must be exact, and counted
MOST_WAITS = {"running_vas": 7}
UIDS = np.random.default_rng(0).integers(0, 2**63, (64, 2)).astype(np.uint64)


def choose(selector: Any, model: nn.Module, parts: list[Batch], *, is_gpu: bool) -> Chosen:
    device = GPU if is_gpu else torch.device("cpu")
    live = [
        ScoredModel(name="learner", model=lambda: model, config=ScoringConfig()),
        CachedModel(
            name="reference",
            keys=("there_img", "there_txt"),
            known_logits=Logits(scale=20.0, bias=-5.0, has_bias=True),
        ),
    ]
    pool: Any = SimpleNamespace(uids=UIDS, device=device)
    selection = InLoopSelection(
        draw=StepDraw(
            selector=selector, schedule=Schedule(filter_ratio=0.5), total_steps=10, groups=1, seed=0
        ),
        plan=StepPlan(trained=16, drawn=np.full(10, 32), read=np.full(10, 32)),
        live=live,
        carried=(),
        data=PoolData(source=pool, files={}),
        reuses_forward=False,
        micro_batch=8,
    )
    return selection.choose(parts, step=0, rank=0, world_size=1)


@pytest.mark.parametrize("name", SELECTORS)
def test_selecting_waits_once(name: str) -> None:
    """For what was chosen: the next forward pass is of these samples."""
    expected = choose(
        SELECTORS[name](), tiny(-6.0), [batch(8 * number) for number in range(4)], is_gpu=False
    )
    with simulated_cuda() as events:
        model = module_on_gpu(tiny(-6.0))
        parts = batches(4)
        chosen = choose(SELECTORS[name](), model, parts, is_gpu=True)
        assert events.of(MIX) == {}
        waits = events.of(WAIT)
        assert chosen.batches[0].images.is_cuda
    assert sum(waits.values()) <= MOST_WAITS.get(name, 1), waits
    for own, other in zip(chosen.batches, expected.batches, strict=True):
        assert own.rows.tolist() == other.rows.tolist()


class Cached:
    """Cached features of a pool of 64 samples."""

    def gather(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        drawn = torch.Generator().manual_seed(7)
        images, texts = (normalize(torch.randn(64, 8, generator=drawn)) for _ in range(2))
        return {"b32_img": images[rows], "b32_txt": texts[rows]}


def narrowed(device: torch.device) -> np.ndarray:
    pool: Any = SimpleNamespace(uids=UIDS, device=device)
    schedule = Schedule(filter_ratio=0.5)
    stage = CachedFirstStage(
        draw=StepDraw(
            selector=ClipScore(features="b32", fraction=0.5),
            schedule=schedule,
            total_steps=10,
            groups=1,
            seed=0,
        ),
        data=PoolData(source=pool, files={}),
        keys={"b32_img": "b32_img", "b32_txt": "b32_txt"},
        features=[Cached()],  # type: ignore[list-item]
        logits={},
    )
    return stage(3, np.arange(40), 20)


def test_a_first_stage_waits_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = narrowed(torch.device("cpu"))
    streams: list[Any] = []

    @contextmanager
    def entered(stream: Any) -> Iterator[None]:
        streams.append(stream)
        yield
        assert events.of(MIX) == {}
        events.clear()  # what is left afterwards was outside

    with simulated_cuda() as events:
        monkeypatch.setattr(torch.cuda, "stream", entered)
        chosen = narrowed(GPU)
        assert len(streams) == 1
        assert events.of(WAIT) == {}
    assert chosen.tolist() == expected.tolist()
