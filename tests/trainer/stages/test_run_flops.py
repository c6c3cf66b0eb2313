"""What a run says that it cost, against torch's counter over all of its real steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from siftclip.errors import InputError
from siftclip.trainer.builders.assembly import new_model
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.losses import ContrastiveLoss, LossInputs
from siftclip.trainer.online import sample_flops
from siftclip.trainer.online.in_loop import StepDraw
from siftclip.trainer.stages.train import plan_stage, train_stage

Compose = Callable[..., DictConfig]
SHORT = ["scale.samples_seen=32", "optim.warmup_steps=0", "selector=random", "selector.fraction=1"]
EVERY_STEP = ["online=every_step", "online.selector.fraction=0.5"]
MICRO = ["trainer.micro_batch_size=4"]
SCORER = [
    *EVERY_STEP,
    "online.selector.learner.name=scorer",
    "online.scorer.name=tiny",
    "+online.scorer.architecture={embed_dim: 16, text_cfg: '${model.architecture.text_cfg}', "
    "vision_cfg: {layers: 1, width: 32, head_width: 16, patch_size: 8, image_size: 16}}",
]


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Torch's counter, with attention as products that it knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
    torch.backends.mha.set_fastpath_enabled(fast)


def loss_flops(loss: ContrastiveLoss, inputs: LossInputs) -> int:
    """Of the products in a loss, there and back."""
    names = ("image_features", "text_features", "logit_scale")
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    with torch.enable_grad(), counting() as counter:
        terms = loss(replace(inputs, **leaves))
        torch.stack(list(terms.values())).sum().backward()
    return counter.get_total_flops()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The FLOPs of all training steps, without those of losses and of choosing."""
    counters: list[FlopCounterMode] = []
    losses: list[tuple[ContrastiveLoss, LossInputs]] = []
    choosing = 0
    step, forward, draw = (
        ClipTraining.training_step,
        ContrastiveLoss.forward,
        StepDraw.__call__,
    )

    def spied_step(module: ClipTraining, *args: Any) -> None:
        with counting() as counter:
            counters.append(counter)
            step(module, *args)

    def spied_loss(loss: ContrastiveLoss, inputs: LossInputs) -> Any:
        losses.append((loss, inputs))
        return forward(loss, inputs)

    def spied_draw(self: StepDraw, *args: Any) -> Any:
        nonlocal choosing
        before = counters[-1].get_total_flops()
        choice = draw(self, *args)
        choosing += counters[-1].get_total_flops() - before
        return choice

    monkeypatch.setattr(ClipTraining, "training_step", spied_step)
    monkeypatch.setattr(ContrastiveLoss, "forward", spied_loss)
    monkeypatch.setattr(StepDraw, "__call__", spied_draw)

    def total() -> int:
        monkeypatch.setattr(ContrastiveLoss, "forward", forward)
        steps = sum(counter.get_total_flops() for counter in counters)
        return steps - choosing - sum(loss_flops(*call) for call in losses)

    return total


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="plain"),
        pytest.param(["trainer.grad_checkpointing=true"], id="checkpointing"),
        pytest.param(MICRO, id="micro-batches"),
        pytest.param([*MICRO, "model.options.force_patch_dropout=0.5"], id="patch dropout"),
        pytest.param(
            [*MICRO, "trainer.grad_checkpointing=true", "model.lock.text=true",
             "model.lock.image=true", "model.lock.image_unlocked_groups=2"],
            id="locked",
        ),
        pytest.param(EVERY_STEP, id="scoring"),
        pytest.param([*EVERY_STEP, *MICRO], id="scoring is the first pass"),
        pytest.param(
            [*EVERY_STEP, *MICRO, "online.scoring.image_size=16",
             "trainer.grad_checkpointing=true"],
            id="cheap scoring",
        ),
        pytest.param([*SCORER, *MICRO, "trainer.grad_checkpointing=true"], id="scorer"),
    ],
)  # fmt: skip
def test_the_costs_are_those_of_the_steps(
    options: list[str], base: list[str], compose: Compose, counted: Callable[[], int]
) -> None:
    run = train_stage(compose("train", [*base, *SHORT, *options]))
    assert run.summary is not None
    assert run.summary["flops"] == counted()


def test_a_new_model_has_its_checkpointing_on_when_it_is_counted(
    base: list[str], compose: Compose
) -> None:
    settings = compose("train", base).model
    model: Any = new_model(settings, seed=0, grad_checkpointing=True).model
    assert model.visual.transformer.grad_checkpointing
    plain: Any = new_model(settings, seed=0, grad_checkpointing=False).model
    assert not plain.transformer.grad_checkpointing


def test_a_live_teacher_and_reference_are_counted(
    base: list[str], compose: Compose, counted: Callable[[], int], model_folder: Path
) -> None:
    options = [
        *EVERY_STEP,
        *MICRO,
        "loss=distill",
        f"loss.teacher.model.name={model_folder}",
        f"online.reference.model.name={model_folder}",
    ]
    run = train_stage(compose("train", [*base, *SHORT, *options]))
    assert run.summary is not None
    assert run.summary["flops"] == counted()


@pytest.fixture
def uncountable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **named: Any) -> int:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(sample_flops, "training_flops", fail)


@pytest.mark.usefixtures("uncountable")
@pytest.mark.parametrize("options", [[], EVERY_STEP])
def test_a_run_goes_on_where_its_flops_cannot_be_counted(
    options: list[str], base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = train_stage(compose("train", [*base, *SHORT, *options]))
    assert "FLOPs of this run are unknown" in caplog.text
    assert "IndexError: index out of range" in caplog.text
    assert run.summary is not None
    assert run.summary["trained_samples"] == 32
    assert not [name for name in run.summary if "flops" in name]
    assert "unknown FLOPs" in run.cost_line()


@pytest.mark.usefixtures("uncountable")
def test_what_needs_the_flops_says_that_they_are_unknown(
    base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    import siftclip.trainer.stages.planning as planning

    with pytest.raises(InputError, match=r"budget\.flops=1e\+12 needs the FLOPs of a sample"):
        train_stage(compose("train", [*base, *SHORT, "budget.flops=1e12"]))
    monkeypatch.setattr(planning, "STEPS", 3)
    monkeypatch.setattr(planning, "ROUNDS", 1)
    plan = plan_stage(compose("train", [*base, *SHORT]))
    assert "FLOPs of models: unknown training, unknown scoring" in plan.table()
    assert "flops" not in plan.record()
