"""Item `losses`: memory and time of a large batch's loss against open_clip's."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from loss_memory import LOSSES, SIDES, measure

from gpu_checks.harness import Facts, Setup, in_process, require


def losses(setup: Setup, facts: Facts) -> None:
    """Each side in a process of its own, so that its peak is its own."""
    for name in LOSSES:
        options = argparse.Namespace(
            batch=setup.size(32_768, 256),
            dim=setup.size(512, 64),
            threads=1,
            repeats=setup.size(3, 1),
            device=setup.device.type,
            limit_gib=64.0,
            loss=name,
        )
        found = {side: _measured(side, options) for side in SIDES}
        facts[f"{name}, {options.batch}"] = found
        if setup.on_gpu:
            ours, theirs = (found[side]["MiB"] for side in SIDES)
            require(ours < theirs, f"{name}: {ours} MiB, and open_clip's has {theirs}")


def _measured(side: str, options: argparse.Namespace) -> dict[str, Any]:
    answer: Any = in_process(measure, side, options)
    return {
        "MiB": round(answer["bytes"] / 2**20),
        "ms": round(1e3 * statistics.median(answer["seconds"]), 2),
    }
