"""Selection while training, as the training module sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.streaming.batches import Batch
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.errors import InputError
from siftclip.ranks import OneRank, ProcessGroup
from siftclip.trainer.losses.collectives import gather_features
from siftclip.trainer.online.cost import CostModel
from siftclip.trainer.online.diagnostics import Diagnostics
from siftclip.trainer.online.in_loop import (
    CachedFirstStage,
    Chosen,
    InLoopSelection,
    gathered_rows,
)
from siftclip.trainer.online.losses_seen import LossesSeen
from siftclip.trainer.online.record import ChosenRows
from siftclip.trainer.online.reselection import Reselection
from siftclip.trainer.online.scorer import OnlineScorer


@dataclass(slots=True, kw_only=True)
class Learner:
    """The model that scores, which is known when training begins."""

    weights: str  # "learner" or "ema"
    model: nn.Module | None = None

    def __call__(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("training has not begun")
        return self.model


@dataclass(slots=True, kw_only=True)
class Online:
    """What selects while a run trains, and what the run costs. With cadence once: costs alone."""

    plan: StepPlan
    cost: CostModel
    source: PoolSource
    learner: Learner
    references: Sequence[RowFeatures] = ()  # that batches carry for it
    in_loop: InLoopSelection | None = None
    first_stage: CachedFirstStage | None = None
    reselection: Reselection | None = None
    losses: LossesSeen | None = None
    diagnostics: Diagnostics | None = None
    record: ChosenRows | None = None
    scorer: OnlineScorer | None = None
    _seconds_told: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    _scorer_loss: Tensor | None = field(default=None, init=False)
    _trained_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False)

    def begin(self, device: torch.device, *, model: nn.Module, averaged: nn.Module | None) -> None:
        """Begin training on this device."""
        self.source.device = device
        self.learner.model = averaged if self.learner.weights == "ema" else model
        if self.reselection is not None:
            alone = not torch.distributed.is_initialized()
            self.reselection.ranks = OneRank() if alone else ProcessGroup(device)

    def choose(self, parts: Sequence[Batch], *, step: int, rank: int, world_size: int) -> Chosen:
        """Choose what this rank trains on at a step, of what it has read."""
        if self.in_loop is None:
            return Chosen(batches=parts)
        if not self.plan.selects[step]:
            self.in_loop.latest = None
            return Chosen(batches=parts)
        return self.in_loop.choose(parts, step=step, rank=rank, world_size=world_size)

    def trained(
        self,
        batches: Sequence[Batch],
        *,
        step: int,
        sample_losses: Tensor | None,
        lr_factor: float,
        rank: int,
        world_size: int,
    ) -> None:
        """Take note of a step: the losses of its samples; a scorer learns from them."""
        if self.losses is not None or self.diagnostics is not None:
            rows = self._rows_of_step(batches, rank=rank, world_size=world_size)
            self._trained_rows = rows
            if self.diagnostics is not None:
                self.diagnostics.saw(rows)
            if self.record is not None and rank == 0:
                self.record.write(step, rows)
            if self.losses is not None:
                if sample_losses is None:
                    raise InputError(
                        "online.selector reads the loss of each sample, and the loss of this run "
                        "tells none. Use one with gives_sample_losses."
                    )
                losses = gather_features(sample_losses, rank=rank, world_size=world_size)
                self.losses.update(rows, losses.float().cpu().numpy())
        if self.scorer is not None:
            self._scorer_loss = self.scorer.step(
                batches,
                lr_factor=lr_factor,
                seeds=[step * len(batches) + number for number in range(len(batches))],
                rank=rank,
                world_size=world_size,
            )

    def _rows_of_step(self, batches: Sequence[Batch], *, rank: int, world_size: int) -> np.ndarray:
        """Return the rows that all ranks train on, int64 [n]: of a choice they are known."""
        latest = None if self.in_loop is None else self.in_loop.latest
        if latest is None:
            return gathered_rows(batches, rank=rank, world_size=world_size)
        _, kept, rows = latest
        return rows[np.flatnonzero(kept)]

    def take_reselection_seconds(self) -> tuple[float, float]:
        """Take the seconds of embedding the pool and of choosing from it since the last call."""
        if self.reselection is None:
            return 0.0, 0.0
        reselection = self.reselection
        now = (reselection.embedding_seconds, reselection.seconds - reselection.embedding_seconds)
        before, self._seconds_told = self._seconds_told, now
        return now[0] - before[0], now[1] - before[1]

    def metrics(self, step: int) -> dict[str, float]:
        """Return metrics for the loggers, after `step` steps."""
        values = {f"cost/{name}": value for name, value in self.cost.at(step).items()}
        if self.diagnostics is not None:
            values.update(self._described(self.diagnostics))
        if self.reselection is not None and self.reselection.current is not None:
            values["online/selection_version"] = float(self.reselection.current.number)
            values["online/selection_samples"] = float(len(self.reselection.current.rows))
        if self._scorer_loss is not None:
            values["online/scorer_loss"] = float(self._scorer_loss)
        return values

    def _described(self, diagnostics: Diagnostics) -> dict[str, float]:
        """Describe the last step: of a super-batch, or of what was trained on alone."""
        latest = None if self.in_loop is None else self.in_loop.latest
        if latest is not None:
            return diagnostics.describe(*latest)
        rows = self._trained_rows
        values = diagnostics.describe(None, np.ones(len(rows), dtype=np.int64), rows)
        seen_alone = ("_offered", "offline_overlap")  # of what was not chosen nothing is known here
        return {name: value for name, value in values.items() if not name.endswith(seen_alone)}

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "selector": None if self.in_loop is None else self.in_loop.draw.selector,
            "diagnostics": self.diagnostics,
            "losses": self.losses,
            "scorer": self.scorer,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued run needs beside the step; the same on every rank."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
