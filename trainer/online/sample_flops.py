"""FLOPs that a sample of a run takes, by what they are for, counted on the models as they train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.trainer.online.cost import SampleFlops
from siftclip.trainer.online.flops import (
    forward_flops,
    input_sizes,
    require_forward,
    training_flops,
)
from siftclip.trainer.online.scoring_config import ScoringConfig

log = logging.getLogger(__name__)

TRAINING_MODE = ScoringConfig(mode="train")


class Judge(NamedTuple):
    """A model that a super-batch is judged by, and how it computes its features."""

    clip: ClipModel
    config: ScoringConfig


def learner_flops(
    clip: ClipModel, *, micro_batches: bool, teacher: ClipModel | None = None
) -> SampleFlops:
    """Count the FLOPs of a sample that is trained on.

    Args:
        clip: the model, ready to be trained: locked and with gradient checkpointing as it will be;
            not sharded, not compiled.
        micro_batches: whether a batch is cut into several. Then features of all come first.
        teacher: a model whose features are learned from; it gets the images and tokens of `clip`.

    Raises:
        InputError: see `require_forward`.
    """
    require_forward(clip)
    sizes = input_sizes(clip)
    repeated = 0
    if micro_batches:
        repeated = forward_flops(clip.model, scoring=TRAINING_MODE, **sizes)
    return SampleFlops(
        training=training_flops(clip.model, **sizes)
        + (0 if teacher is None else forward_flops(teacher.model, **sizes)),
        repeated=repeated,
    )


def selecting_flops(
    learner: SampleFlops,
    judges: Sequence[Judge],
    *,
    scorer: ClipModel | None,
    micro_batches: bool,
) -> SampleFlops:
    """Add to `learner` the scoring of super-batches, and a small scorer that trains beside it."""
    beside = 0
    if scorer is not None:  # the first pass of its micro-batches is never known before
        flops = learner_flops(scorer, micro_batches=micro_batches)
        beside = flops.training + flops.repeated
    return replace(
        learner,
        training=learner.training + beside,
        scoring=sum(
            forward_flops(judge.clip.model, scoring=judge.config, **input_sizes(judge.clip))
            for judge in judges
        ),
    )


def counted(count: Callable[[], SampleFlops]) -> SampleFlops | None:
    """Call `count`; return None, after a warning, where it fails: no run stops for its accounts.

    Raises:
        InputError: as `count` does: of a model that cannot be trained.
    """
    try:
        return count()
    except InputError:
        raise
    except Exception as error:  # models of other packages raise anything
        log.warning(
            "the FLOPs of this run are unknown, and its costs are given without them: they could "
            "not be counted (%s: %s)",
            type(error).__name__,
            error,
        )
        return None
