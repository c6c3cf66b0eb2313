"""How long a run will take, measured on a few of its steps, and what its selection must save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.tables import ruled_table
from siftclip.trainer.runtime.step_clock import StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Mean seconds of a step, and what they went into."""

    total: float
    data_wait: float
    scoring: float
    selection: float

    @classmethod
    def of(cls, times: StepTimes) -> StepSeconds:
        """Average over the steps that were timed."""
        return cls(
            total=times.total_seconds / times.steps,
            data_wait=times.waiting_seconds / times.steps,
            scoring=times.scoring_seconds / times.steps,
            selection=times.selection_seconds / times.steps,
        )

    @property
    def training(self) -> float:
        return self.total - self.data_wait - self.scoring - self.selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured seconds of this run's steps."""

    plain: StepSeconds  # that trains on all that it reads
    selecting: StepSeconds | None  # at `profiled_extra` samples more than are trained
    profiled_extra: int  # samples that such a step considers beyond those it trains on
    version_seconds: float = 0.0  # of making a version of the selection

    def run_seconds(self, plan: StepPlan, versions: int = 0) -> float:
        """Estimate all steps of a plan: the extra cost of a step grows with its super-batch.

        Args:
            plan: of the run.
            versions: of the selection that are made on the way.
        """
        total = self.plain.total * plan.steps + self.version_seconds * versions
        if self.selecting is not None and self.profiled_extra:
            extra = float((plan.drawn - plan.trained).sum())
            total += (self.selecting.total - self.plain.total) * extra / self.profiled_extra
        return total

    def saving_to_break_even(self, plan: StepPlan, versions: int = 0) -> float:
        """Return the share of steps that selection must save to break even, in (-inf, 1)."""
        return 1 - self.plain.total * plan.steps / self.run_seconds(plan, versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run will cost; `table` says it in words."""

    profile: Profile
    plan: StepPlan
    cost: dict[str, float]
    versions: int
    parameters: int  # of the model

    def record(self) -> dict[str, Any]:
        """Return plain values, for `plan.json`."""
        seconds = self.profile.run_seconds(self.plan, self.versions)
        steps = {"plain": self.profile.plain, "selecting": self.profile.selecting}
        return {
            "steps": self.plan.steps,
            "step_seconds": {
                name: {
                    "total": step.total,
                    "data_wait": step.data_wait,
                    "scoring": step.scoring,
                    "selection": step.selection,
                    "training": step.training,
                }
                for name, step in steps.items()
                if step is not None
            },
            "versions": self.versions,
            "version_seconds": self.profile.version_seconds,
            "train_seconds": seconds,
            "plain_seconds": self.profile.plain.total * self.plan.steps,
            "saving_to_break_even": self.profile.saving_to_break_even(self.plan, self.versions),
            "parameters": self.parameters,
            **self.cost,
        }

    def table(self) -> str:
        """Format for the terminal."""
        record = self.record()
        header = ["step", "seconds", "data wait", "scoring", "selection", "training"]
        steps = [
            [name, *(f"{seconds:.4f}" for seconds in step.values())]
            for name, step in record["step_seconds"].items()
        ]
        lines = [ruled_table([header, *steps])]
        if self.versions:
            lines.append(
                f"{self.versions} selections of {record['version_seconds']:.1f} s on the way"
            )
        saving = record["saving_to_break_even"]
        lines += [
            "",
            f"{record['steps']:,} steps: {_duration(record['train_seconds'])}; without selection "
            f"in the loop {_duration(record['plain_seconds'])}",
            f"samples: {record['drawn_samples']:,.0f} drawn, "
            f"{record['loaded_samples']:,.0f} loaded, "
            f"{record['scored_samples']:,.0f} scored, {record['trained_samples']:,.0f} trained",
            f"FLOPs of models: {_number(record.get('training_flops'))} training, "
            f"{_number(record.get('scoring_flops'))} scoring",
        ]
        if saving > 0:
            enough = max(1, round(record["steps"] * (1 - saving)))
            lines.append(
                f"to pay off in time, {enough:,} selecting steps must reach the quality of "
                f"{record['steps']:,} plain ones ({saving:.0%} fewer)"
            )
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def mean_profile(measure: Callable[[], StepSeconds], rounds: int) -> StepSeconds:
    """Average several measurements."""
    measured = [measure() for _ in range(rounds)]
    return StepSeconds(
        total=float(np.mean([s.total for s in measured])),
        data_wait=float(np.mean([s.data_wait for s in measured])),
        scoring=float(np.mean([s.scoring for s in measured])),
        selection=float(np.mean([s.selection for s in measured])),
    )
