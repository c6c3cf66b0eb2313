"""Selection at every step: score a super-batch, choose the sub-batch that is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.streaming.batches import Batch, pick
from siftclip.datamodules.streaming.device_copies import on_own_stream
from siftclip.datamodules.streaming.order import derive_seeds, rank_slice, rows_digest
from siftclip.datamodules.streaming.step_plan import StepPlan, part_sizes
from siftclip.purposes import GeneratorPurpose
from siftclip.ranks import OneRank, ProcessGroup, Ranks
from siftclip.selectors.core.base import Choice, Selector, SubBatch, draw
from siftclip.selectors.core.source import Logits, Source
from siftclip.selectors.core.sub_batch import add_uniform, share_over_groups
from siftclip.trainer.losses.collectives import gather_features
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.online.scoring_models import LiveFeatures, Pair, carried
from siftclip.trainer.online.super_batch import PoolData, SuperBatchSource
from siftclip.trainer.options.objects import BuiltObjects
from siftclip.trainer.runtime.step_clock import Mark

# Scores float32 [n] or None, kept int64 [n], rows of the pool int64 [n]: of a super-batch.
Described = tuple[np.ndarray | None, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a step trains on, on this rank."""

    batches: Sequence[Batch]  # micro-batches
    learner_features: Pair | None = None  # of these samples, if the scoring forward gives them
    digest: int = (
        0  # of what all ranks train on, for them to compare; 0 where that is all they read
    )
    marks: tuple[Mark, Mark, Mark] | None = None  # when it began, had scored, and had chosen


@dataclass(slots=True, kw_only=True)
class StepDraw:
    """Chooses sub-batches as a schedule says: the same for what is read and for what is trained."""

    selector: Selector
    schedule: Schedule
    total_steps: int
    groups: int
    seed: int
    objects: BuiltObjects = field(default_factory=BuiltObjects)  # the selector, by its options

    def __call__(self, source: Source, step: int, samples: int) -> Choice:
        """Choose `samples` of a source, equally many of each group. Every rank calls it."""
        settings = self.schedule.at(step, self.total_steps)
        # The share of the whole sub-batch is rounded, not that of each group.
        uniform = share_over_groups(
            round(settings.uniform_fraction * samples), self.groups, turn=step
        )
        asked = SubBatch.of_quotas(
            samples // self.groups - uniform, temperature=settings.temperature, seed=self.seed
        )
        with self.objects.told_as_options():
            choice = draw(self.selector, source, asked)
        if not uniform.any():
            return choice
        kept = add_uniform(
            choice.multiplicities, source.uids, uniform, seed=self.seed, scores=choice.scores
        )
        weights = choice.weights
        if weights is not None:  # what is drawn uniformly stands for itself
            weights = np.where(choice.multiplicities > 0, weights, np.float32(1))
        return Choice(multiplicities=kept, scores=choice.scores, weights=weights)


@dataclass(slots=True, kw_only=True)
class InLoopSelection:
    """What the training step asks for its batch."""

    draw: StepDraw
    plan: StepPlan
    live: Sequence[LiveFeatures]
    carried: tuple[str, ...]  # keys of cached features that batches bring for the selector
    data: PoolData
    reuses_forward: bool  # the scoring forward gives the features of the training forward
    micro_batch: int | None = None
    latest: Described | None = field(default=None, init=False)  # the last choice

    @torch.no_grad()
    def choose(self, parts: Sequence[Batch], *, step: int, rank: int, world_size: int) -> Chosen:
        """Choose the micro-batches that this rank trains on at a step, out of what it has read.

        Features of all ranks are gathered, so that each judges with all negatives; every rank then
        makes the same choice, in which each group of the super-batch has the same share.
        """
        device = parts[0].images.device
        start = Mark.now(device)
        seeds = self._seeds(parts, step, rank)
        of_rank = {
            f"{live.name}_{kind}": values
            for live in self.live
            for kind, values in zip(("img", "txt"), live.features(parts, seeds), strict=True)
        }
        for key in self.carried:
            of_rank[key] = carried(parts, key)

        def gathered(values: Tensor) -> Tensor:
            return gather_features(values, rank=rank, world_size=world_size)

        features = {key: gathered(values) for key, values in of_rank.items()}
        scored = Mark.now(device)
        rows = gathered_rows(parts, rank=rank, world_size=world_size)
        ranks: Ranks = OneRank() if world_size == 1 else ProcessGroup(device)
        source = SuperBatchSource(
            rows,
            step=step,
            features=features,
            data=self.data,
            logits={live.name: live.logits() for live in self.live},
            groups=self.draw.groups,
            ranks=ranks,
        )
        with torch.autocast(device.type, enabled=False):  # scores are exact, as the losses are
            choice = self.draw(source, step, self.plan.trained)
            kept = choice.multiplicities
            share = rank_slice(len(rows), rank=rank, world_size=world_size)
            mine = torch.from_numpy(np.flatnonzero(kept[share]))
            indices = torch.split(mine, part_sizes(len(mine), self.micro_batch or len(mine)))
            batches = [pick(parts, index) for index in indices]
            if choice.weights is not None:
                weights = torch.from_numpy(choice.weights[share])
                batches = [
                    weighted(batch, weights[index])
                    for batch, index in zip(batches, indices, strict=True)
                ]
        self.latest = (choice.scores, kept, rows)
        chosen = Mark.now(device)
        reused = None
        if self.reuses_forward:
            at = mine.to(device, non_blocking=True)
            reused = (of_rank["learner_img"][at], of_rank["learner_txt"][at])
        return Chosen(
            batches=batches,
            learner_features=reused,
            digest=0 if world_size == 1 else rows_digest(kept, choice.weights),
            marks=(start, scored, chosen),
        )

    def _seeds(self, parts: Sequence[Batch], step: int, rank: int) -> list[int]:
        """Derive seeds of dropout from a part's place in the super-batch, whatever the ranks."""
        sizes = [len(part.rows) for part in parts]
        places = rank * sum(sizes) + np.cumsum([0, *sizes[:-1]])
        seeds = derive_seeds(places, self.draw.seed, step, GeneratorPurpose.SCORING)
        of_torch: list[int] = (seeds >> np.uint64(1)).astype(np.int64).tolist()
        return of_torch


@dataclass(slots=True, kw_only=True)
class CachedFirstStage:
    """A first stage: chooses by cached features and numbers, before anything is read."""

    draw: StepDraw
    data: PoolData
    keys: Mapping[str, str]  # what the selector calls an array -> what the pool calls it
    features: Sequence[RowFeatures]  # that hold these arrays
    logits: Mapping[str, Logits]

    def __call__(self, step: int, rows: np.ndarray, wanted: int) -> np.ndarray:
        # The loader calls it while the device trains, whose work must not be waited for
        with on_own_stream(self.data.source.device):
            return self._choose(step, rows, wanted)

    def _choose(self, step: int, rows: np.ndarray, wanted: int) -> np.ndarray:
        cached = {
            key: values.to(self.data.source.device)
            for features in self.features
            for key, values in features.gather(rows).items()
        }
        source = SuperBatchSource(
            rows,
            step=step,
            features={name: cached[key] for name, key in self.keys.items()},
            data=self.data,
            logits=self.logits,
            groups=self.draw.groups,
        )
        return np.flatnonzero(self.draw(source, step, wanted).multiplicities)


def gathered_rows(parts: Sequence[Batch], *, rank: int, world_size: int) -> np.ndarray:
    """Return the rows of all parts and ranks, int64 [n]; those of a single one without waiting."""
    if world_size == 1:
        return torch.cat([part.rows_on_cpu() for part in parts]).numpy()
    of_rank = torch.cat([part.rows for part in parts])
    return gather_features(of_rank, rank=rank, world_size=world_size).cpu().numpy()


def weighted(batch: Batch, weights: Tensor) -> Batch:
    """Multiply weights of its samples, float [b], into those that the batch has."""
    weights = weights.to(batch.rows.device, non_blocking=True)
    return replace(batch, weights=weights if batch.weights is None else batch.weights * weights)
