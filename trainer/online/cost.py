"""What a run costs up to a step: samples drawn, loaded, scored and trained, and model FLOPs.

Published comparisons of selection count differently: by samples loaded, by samples trained, by
FLOPs, by seconds. So all of them are reported side by side. All but seconds follow from the step.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from siftclip.datamodules.streaming.step_plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFlops:
    """FLOPs of the models for one sample; a multiplication and an addition are two."""

    training: int  # of the learner, its live teacher, and a scorer that is trained beside it
    repeated: int = 0  # a forward of the learner more, where micro-batches need one
    scoring: int = 0  # forward passes of all models that judge a sample of a super-batch
    embedding: int = 0  # forward of the learner, where the pool is embedded again


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Counts of a plan. `embedded` gives how many samples were embedded anew up to a step."""

    plan: StepPlan
    flops: SampleFlops | None  # None: they could not be counted
    scores_after_reading: bool  # a super-batch that is read is scored by models
    reuses_forward: bool = False  # that scoring forward is the first one of micro-batches
    embedded: Callable[[int], int] = lambda step: 0
    _loaded: np.ndarray = field(init=False)
    _scored: np.ndarray = field(init=False)
    _repeated: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        selects = plan.selects & self.scores_after_reading
        repeats = plan.trained * ~(selects & self.reuses_forward)
        scored = np.where(selects, plan.read, 0)
        for name, counts in (("_loaded", plan.read), ("_scored", scored), ("_repeated", repeats)):
            object.__setattr__(self, name, np.concatenate([[0], np.cumsum(counts)]))

    def at(self, step: int) -> dict[str, float]:
        """Compute costs of the first `step` steps, by their names in logs and reports.

        FLOPs that are not known have no entry.
        """
        embedded = self.embedded(step)
        trained = step * self.plan.trained
        scored = int(self._scored[step])
        samples = {
            "drawn_samples": float(self.plan.starts[step]),
            "loaded_samples": float(self._loaded[step] + embedded),
            "scored_samples": float(scored + embedded),
            "trained_samples": float(trained),
        }
        if self.flops is None:
            return samples
        repeated = float(self._repeated[step]) * self.flops.repeated
        training_flops = float(trained) * self.flops.training + repeated
        scoring_flops = float(scored) * self.flops.scoring + float(embedded) * self.flops.embedding
        return {
            **samples,
            "training_flops": training_flops,
            "scoring_flops": scoring_flops,
            "flops": training_flops + scoring_flops,
        }


def largest_within(limit: float, cost: Callable[[int], float], *, most: int) -> int:
    """Find the largest number of steps whose cost is at most `limit`, from 0 to `most`.

    Args:
        limit: of the cost.
        cost: of a run of so many steps; grows with them. It is asked for 1, 2, 4, ... first.
        most: an upper bound of the answer.
    """
    high = 1
    while cost(high) <= limit:
        if high == most:
            return most
        high = min(2 * high, most)
    return bisect.bisect_right(range(high), limit, lo=1, key=cost) - 1
