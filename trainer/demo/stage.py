"""The demo: all stages on handwritten digits. Each stage is the real one, at a small size."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.compare.arms import CompareOutcome, arms_of_overrides, compare_stage
from siftclip.trainer.demo.pool import write_demo_data
from siftclip.trainer.settings.commands import (
    CompareCommand,
    DemoCommand,
    EmbedCommand,
    TrainCommand,
)
from siftclip.trainer.stages.embed import embed_stage
from siftclip.trainer.stages.train import train_stage

T = TypeVar("T")

log = logging.getLogger(__name__)


class Compose(Protocol):
    """Makes the settings of a kind from those of a command, with overrides."""

    def __call__(self, kind: type[T], command: str, overrides: Sequence[str]) -> T: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOutcome:
    """What the demo leaves behind."""

    data: Path
    comparison: CompareOutcome
    seconds: float


def demo_stage(settings: DemoCommand, overrides: Sequence[str], compose: Compose) -> DemoOutcome:
    """Write the pool, train a teacher, embed, select, train on each selection, compare.

    Every step is skipped if it is done, so that an interrupted demo continues where it was.

    Args:
        settings: of `siftclip demo`.
        overrides: those of the command line, which hold for every step.
        compose: makes the settings of a step.
    """
    start = time.perf_counter()
    common, demo = settings.common, settings.demo
    root = common.output_root / "demo" / "data"
    log.info("1/4 the pool: captioned scenes of handwritten digits, with known defects")
    with locked(root / LOCK_NAME, owner=str(root), wait=True):
        write_demo_data(
            root,
            seed=common.seed,
            pool_samples=demo.pool_samples,
            teacher_samples=demo.teacher_samples,
            progress=common.progress,
        )
    log.info("2/4 the teacher: a CLIP on a clean split that shares no digit with the pool")
    teacher = compose(TrainCommand, "train", ["experiment=digits_teacher", *overrides])
    train_stage(teacher, wait=True)
    log.info("3/4 the features: the teacher embeds the pool")
    words = ["experiment=digits", *overrides]
    embed_stage(compose(EmbedCommand, "compare", words))
    log.info("4/4 the comparison: select, train on each selection, evaluate")
    compared = compose(CompareCommand, "compare", words)
    arms = arms_of_overrides(compared, words, lambda arm: compose(TrainCommand, "compare", arm))
    comparison = compare_stage(compared, arms)
    return DemoOutcome(data=root, comparison=comparison, seconds=time.perf_counter() - start)
