"""Chooses sub-batches on the ranks of torchrun; run by test_choosing.py.

    python choosing_on_ranks.py FOLDER

Each rank takes its part of one super-batch, and writes its choices to FOLDER, counted from the
beginning of the super-batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from siftclip.selectors import JEST, ClipScore, Logits, ModelFeatures, Selector
from siftclip.trainer import choose_sub_batch

SAMPLES, GROUPS, STEPS = 24, 2, 3


def selectors() -> dict[str, Selector]:
    models = {
        "learner": ModelFeatures(name="learner"),
        "reference": ModelFeatures(name="reference"),
    }
    return {
        "clip_score": ClipScore(features="learner", fraction=1.0),
        "jest": JEST(**models, loss="softmax", chunks=2, fraction=1.0),
    }


def super_batch() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def features() -> Tensor:
        return torch.randn(SAMPLES, 6, generator=generator)

    return {name: (features(), features()) for name in ("learner", "reference")}


def choices(rank: int, world_size: int) -> dict[str, list[int]]:
    """All choices of a rank, by selector, temperature and step."""
    size = SAMPLES // world_size
    mine = slice(rank * size, (rank + 1) * size)
    features = {name: (image[mine], text[mine]) for name, (image, text) in super_batch().items()}
    logits = {name: Logits(scale=1.0, has_bias=False) for name in features}
    options: dict[str, Any] = {"keep": 12 // world_size, "groups": GROUPS, "logits": logits}
    return {
        f"{name} {temperature} {step}": [
            rank * size + index
            for index in choose_sub_batch(
                selector, features, step=step, temperature=temperature, **options
            ).tolist()
        ]
        for name, selector in selectors().items()
        for temperature in (None, 0.5)
        for step in range(STEPS)
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = choices(rank, dist.get_world_size())
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
