"""Choices in the loop are the same on a GPU as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_steps import make_batch, tiny_clip
from torch import Tensor

from siftclip.selectors import JEST, ClipScore, Learnability, ModelFeatures, RunningVas, Selector
from siftclip.trainer import choose_sub_batch
from siftclip.trainer.online.scoring import scoring_features
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.stages.train import train_stage

MODELS = {
    "learner": ModelFeatures(name="learner", logit_scale=20.0, logit_bias=-10.0),
    "reference": ModelFeatures(name="reference", logit_scale=50.0, logit_bias=-10.0),
}
SELECTORS: dict[str, Callable[[], Selector]] = {
    "clip_score": lambda: ClipScore(features="learner", fraction=0.2),
    "jest, sigmoid": lambda: JEST(**MODELS, loss="sigmoid", fraction=0.2),
    "jest, softmax": lambda: JEST(**MODELS, loss="softmax", fraction=0.2),
    "learnability": lambda: Learnability(**MODELS, fraction=0.2),
    "learnability, softmax": lambda: Learnability(**MODELS, loss="softmax", fraction=0.2),
    "running_vas": lambda: RunningVas(key="learner_img", fraction=0.2),
}
CONFIGS = {
    "whole": ScoringConfig(),
    "half the size": ScoringConfig(image_size=16),
    "bf16": ScoringConfig(precision="bf16"),
    "train": ScoringConfig(mode="train"),
}
EVERY_STEP = [
    "selector=random",
    "selector.fraction=1",
    "online=every_step",
    "online.selector.fraction=0.25",
    "online.diagnostics.record_chosen=true",
    "trainer.precision=32-true",
]

pytestmark = pytest.mark.gpu


def features(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(320, 32, generator=generator)
    text = 0.5 * image + torch.randn(320, 32, generator=generator)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


@pytest.mark.parametrize("name", SELECTORS)
def test_sub_batch_is_that_of_the_cpu(name: str, device: torch.device) -> None:
    answers = []
    for place in (device, torch.device("cpu")):
        selector = SELECTORS[name]()
        pairs = {
            model: tuple(values.to(place) for values in features(seed))
            for seed, model in enumerate(MODELS)
        }
        steps = [
            choose_sub_batch(selector, pairs, keep=64, step=step, groups=2)  # type: ignore[arg-type]
            for step in range(3)
        ]
        assert all(step.device.type == place.type for step in steps)
        answers.append([step.tolist() for step in steps])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_scoring_features_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    model, batch, config = tiny_clip(), make_batch(8), CONFIGS[name]
    expected = scoring_features(model, batch.images, batch.tokens, config, 0)
    moved = batch.to(device)
    found = scoring_features(model.to(device), moved.images, moved.tokens, config, 0)
    limit = 0.05 if config.precision == "bf16" else 1e-5
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == device.type
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=limit)


def test_dropout_while_scoring_leaves_the_state_of_the_device(device: torch.device) -> None:
    model, batch = tiny_clip().to(device), make_batch(8).to(device)
    config = ScoringConfig(patch_dropout=0.5, mode="train")

    def score(seed: int) -> Tensor:
        return scoring_features(model, batch.images, batch.tokens, config, seed)[0]

    torch.manual_seed(7)
    first = score(1)
    drawn = torch.rand(3, device=device)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3, device=device))
    assert torch.equal(first, score(1))
    assert not torch.equal(first, score(2))


def test_a_run_chooses_as_on_the_cpu(
    base: list[str], compose: Callable[..., Any], device: torch.device, tmp_path: Path
) -> None:
    accelerators = {"found": "gpu" if device.type == "cuda" else "cpu", "expected": "cpu"}
    chosen, losses = [], []
    for name, accelerator in accelerators.items():
        place = [f"trainer.accelerator={accelerator}", f"output_dir={tmp_path / name}"]
        run = train_stage(compose("train", [*base, *EVERY_STEP, *place]))
        chosen.append(np.load(run.path / "chosen.npy"))
        losses.append(run.metrics["train/loss"].dropna().tolist())
    assert np.array_equal(chosen[0][0], chosen[1][0])
    same = np.mean(
        [len(np.intersect1d(*rows)) / len(rows[0]) for rows in zip(*chosen, strict=True)]
    )
    assert same > 0.9  # later weights differ in their last bits
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
