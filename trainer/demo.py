"""The demo: all stages on handwritten digits. Each stage is the real one, at a small size."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig

from siftclip.datamodules.demo_pool import write_demo_data
from siftclip.datamodules.locks import LOCK_NAME, locked
from siftclip.trainer.compare.arms import CompareOutcome, compare_stage
from siftclip.trainer.embedding import embed_stage
from siftclip.trainer.stages import output_root
from siftclip.trainer.training import train_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOutcome:
    """What the demo leaves behind."""

    data: Path
    comparison: CompareOutcome
    seconds: float


def demo_stage(config: DictConfig, overrides: Sequence[str]) -> DemoOutcome:
    """Write the pool, train a teacher, embed, select, train on each selection, compare.

    Every step is skipped if it is done, so that an interrupted demo continues where it was.

    Args:
        config: the configuration of `siftclip demo`.
        overrides: those of the command line, which hold for every step.
    """
    start = time.perf_counter()
    root = output_root(config) / "demo" / "data"
    log.info("1/4 the pool: captioned scenes of handwritten digits, with known defects")
    with locked(root / LOCK_NAME, owner=str(root), wait=True):
        write_demo_data(
            root,
            seed=config.seed,
            pool_samples=config.demo.pool_samples,
            teacher_samples=config.demo.teacher_samples,
            progress=config.progress,
        )
    log.info("2/4 the teacher: a CLIP on a clean split that shares no digit with the pool")
    train_stage(_compose("train", ["experiment=digits_teacher", *overrides]), wait=True)
    log.info("3/4 the features: the teacher embeds the pool")
    digits = _compose("compare", ["experiment=digits", *overrides])
    embed_stage(digits)
    log.info("4/4 the comparison: select, train on each selection, evaluate")
    comparison = compare_stage(digits, ["experiment=digits", *overrides])
    return DemoOutcome(data=root, comparison=comparison, seconds=time.perf_counter() - start)


def _compose(command: str, overrides: Sequence[str]) -> DictConfig:
    return hydra.compose(config_name=command, overrides=list(overrides))
