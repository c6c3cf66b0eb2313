"""Selecting again while training: versions of the selection, each from a step on.

A version is made between two steps, by the selector that the configuration names, from features of
the model as it is then. It is written into the run directory before its first step:

    selections/v0001/selection.npy      in DataComp's format, with selection.json
    selections/v0001/weights.npy        where the selector weighs samples
    selections/v0001/features/          of the learner, while they are needed
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.selection.selection import (
    MANIFEST_NAME,
    expand_rows,
    make_selection,
    read_selection,
    row_weights,
    write_selection,
)
from siftclip.datamodules.streaming.datamodule import SelectionVersion
from siftclip.datamodules.streaming.order import rows_digest
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.errors import InputError
from siftclip.hashing import mix64, seed_state, uniform_score
from siftclip.purposes import HashPurpose
from siftclip.ranks import OneRank, Ranks
from siftclip.selectors.core.base import Selector, product_of_weights, run
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import (
    Cache,
    Chunk,
    DictCache,
    Logits,
    Part,
    Requirements,
    RestrictedSource,
    Source,
)
from siftclip.trainer.options.objects import BuiltObjects
from siftclip.trainer.runtime.rank_agreement import require_same
from siftclip.writing import delete_folder

log = logging.getLogger(__name__)


class Embed(Protocol):
    """Writes features of rows into a folder, see `PoolEmbedder`."""

    def __call__(
        self, rows: np.ndarray, folder: Path, ranks: Ranks, device: torch.device
    ) -> None: ...


class TrainingSource(PoolSource):
    """A pool in the middle of training: with the learner's features.

    Its uids are renamed for every version, so that random draws differ; they name nothing outside.
    """

    def __init__(
        self,
        source: PoolSource,
        *,
        version: int,
        live_folder: Path | None,
        live_keys: tuple[str, ...],
        aliases: Mapping[str, str],
        logits: Mapping[str, Logits],
        ranks: Ranks,
    ) -> None:
        """Open nothing yet.

        Args:
            source: the pool.
            version: number of the selection that is to be made.
            live_folder: of the learner's features; None if there are none.
            live_keys: what these are called.
            aliases: what selectors call an array -> what the pool calls it.
            logits: of the models.
            ranks: that select together.
        """
        super().__init__(
            source.pool,
            features=[*source.folders],
            scores_root=source.scores_root,
            chunk_samples=source.chunk_samples,
            max_bad_fraction=source.max_bad_fraction,
            ranks=ranks,
            device=source.device,
            progress=source.progress,
        )
        state = seed_state(version ^ HashPurpose.VERSION)
        self.uids = mix64(source.uids ^ state)
        self._live = (
            None
            if live_folder is None
            else PoolSource(
                source.pool,
                features=[live_folder],
                scores_root=source.scores_root,
                chunk_samples=source.chunk_samples,
                max_bad_fraction=source.max_bad_fraction,
                device=source.device,
            )
        )
        # What was read for one version serves the next ones.
        self._stores, self._checked = source._stores, source._checked
        self._columns, self._lists = source._columns, source._lists
        self._live_keys, self._aliases = live_keys, aliases
        self._logits = logits

    def parts(self, requires: Requirements) -> list[Part]:
        live, cached = self._split(requires.features)
        if not live or self._live is None:
            return super().parts(replace(requires, features=cached))
        parts = self._live.parts(replace(requires, features=live))
        if not cached:
            return parts
        present = np.zeros(len(self), dtype=bool)
        for part in super().parts(replace(requires, features=cached)):
            present[part.rows] = True
        both = [Part(name=part.name, rows=part.rows[present[part.rows]]) for part in parts]
        return [part for part in both if len(part.rows)]

    def take(self, rows: np.ndarray, requires: Requirements) -> Chunk:
        live, cached = self._split(requires.features)
        features: dict[str, Tensor] = {}
        if live and self._live is not None:
            features |= self._live.take_features(rows, live)
        if cached:
            from_files = self.take_features(rows, cached)
            features |= {
                key: from_files[self._aliases.get(key, key)]
                for key in requires.features
                if key not in live
            }
        return replace(
            super().take(rows, replace(requires, features=())),
            features={key: features[key] for key in requires.features},
        )

    def logits(self, features: str) -> Logits:
        return self._logits[features] if features in self._logits else super().logits(features)

    def cache(self, selector: object) -> Cache:
        return DictCache()  # the learner's features change

    def _split(self, keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Split `keys` into the learner's arrays, and what the pool calls the others."""
        live = tuple(key for key in keys if key in self._live_keys)
        return live, tuple(self._aliases.get(key, key) for key in keys if key not in live)


class Candidates(RestrictedSource):
    """What a version is selected from: fractions count these samples, and not the whole pool."""

    @property
    def whole(self) -> Source:
        return self

    def cache(self, selector: object) -> Cache:
        return self.source.cache(selector)

    def report(self, selector: object, choice: Any, samples: int, seconds: float) -> None:
        self.source.report(selector, choice, samples, seconds)


@dataclass(slots=True, kw_only=True)
class Reselection:
    """Makes the versions of a run's selection. Version 0 is what was selected before training."""

    selector: Selector
    source: PoolSource
    rows: np.ndarray  # int64, of version 0, sorted, repetitions repeated
    folder: Path  # of the versions
    every_n_steps: int | None  # None: when all samples of a version have been drawn
    plan: StepPlan
    window: tuple[int, int]  # steps between which versions begin; outside, version 0's rows
    pool_fraction: float  # of version 0's samples, that are embedded and selected from
    live_keys: tuple[str, ...]  # arrays of the learner that the selector reads
    aliases: Mapping[str, str]
    embed: Embed | None  # the samples with the learner; None: the selector reads none of it
    logits: Callable[[], Mapping[str, Logits]]
    weights: np.ndarray | None  # float32 by the pool's rows, of version 0
    seed: int
    objects: BuiltObjects = field(default_factory=BuiltObjects)  # the selector, by its options
    ranks: Ranks = field(default_factory=OneRank)  # others are known when training begins
    seconds: float = 0.0  # spent on versions, in this process
    embedding_seconds: float = 0.0  # of these
    current: SelectionVersion | None = None
    _distinct: np.ndarray = field(init=False)  # int64, the samples of version 0
    _counts: np.ndarray = field(init=False)  # int64, how often it has each of them
    _starts: list[int] = field(default_factory=list, init=False)  # of versions inside the window

    def __post_init__(self) -> None:
        first = np.flatnonzero(np.diff(self.rows, prepend=-1))
        self._distinct = self.rows[first]
        self._counts = np.diff(first, append=len(self.rows))

    def find(self, step: int) -> SelectionVersion:
        """Find the version that a step belongs to, made now if there is none; see `FindVersion`."""
        if self.current is None:
            self.current = self._plain(number=0, start=0)
        while self.current.stop_step <= step:
            number, start = self.current.number + 1, self.current.stop_step
            if start >= self.window[1]:
                self.current = self._plain(number=number, start=start)
                continue
            self._starts.append(start)
            # A continued run: the version was made before its checkpoint.
            self.current = (self._read if start < step else self._make)(number, start)
        return self.current

    def find_first(self) -> int:
        """Find the step at which the first version begins; the end of the run if there is none."""
        return self._plain(number=0, start=0).stop_step

    @property
    def candidates(self) -> int:
        """How many samples a version is selected from."""
        return max(1, int(len(self._distinct) * self.pool_fraction))

    def embedded_samples(self, step: int) -> int:
        """Count the samples that were embedded for the versions up to a step."""
        if not self.live_keys:
            return 0
        return sum(start <= step for start in self._starts) * self.candidates

    def _plain(self, *, number: int, start: int) -> SelectionVersion:
        """Return a version with version 0's samples, to the window's first one or the run's end."""
        stop = self.plan.steps
        if start == 0:
            stop = self._next(self.rows, 0)
            while stop < min(self.window[0], self.plan.steps):
                stop = self._next(self.rows, stop)
            if stop >= self.window[1]:
                stop = self.plan.steps
        return SelectionVersion(
            number=number, rows=self.rows, start_step=start, stop_step=stop, weights=self.weights
        )

    def _next(self, rows: np.ndarray, start: int) -> int:
        """Return where a version that begins at a step would end, if there were no window."""
        if self.every_n_steps is not None:
            return min(start + self.every_n_steps, self.plan.steps)
        return max(start + 1, self.plan.steps_for(len(rows), first=start))

    def _stop(self, rows: np.ndarray, start: int) -> int:
        """Return where a version of the window ends: with the window at the latest."""
        return min(self._next(rows, start), max(start + 1, self.window[1]))

    def _candidate_rows(self, version: int) -> np.ndarray:
        """Draw the distinct samples of version 0, or a random part of them: int64, ascending."""
        rows = self._distinct
        if self.pool_fraction == 1:
            return rows
        uids = self.source.uids[rows]
        draws = uniform_score(uids, self.seed ^ HashPurpose.CANDIDATES ^ (version << 32))
        return rows[keep_top(draws, uids, self.candidates) > 0]

    def _make(self, number: int, start: int) -> SelectionVersion:
        begin = time.perf_counter()
        folder = self.folder / f"v{number:04d}"
        candidates = self._candidate_rows(number)
        features = None
        if self.embed is not None:
            features = folder / "features"
            self.embed(candidates, features, self.ranks, self.source.device)
            self.embedding_seconds += time.perf_counter() - begin
        source = TrainingSource(
            self.source,
            version=number,
            live_folder=features,
            live_keys=self.live_keys,
            aliases=self.aliases,
            logits=self.logits(),
            ranks=self.ranks,
        )
        with self.objects.told_as_options():
            choice = run(self.selector, Candidates(source, candidates))
        # What version 0 has several times, a version has so many times as often as it keeps it.
        counts = self._counts[np.searchsorted(self._distinct, candidates)]
        multiplicities = np.zeros(len(source), dtype=np.int64)
        multiplicities[candidates] = choice.multiplicities * counts
        weights = _of_all(choice.weights, candidates, len(source), other=1)
        scores = _of_all(choice.scores, candidates, len(source), other=np.nan)
        report = source.reports[-1]
        selection = make_selection(
            self.source.pool.uids,
            multiplicities,
            {
                "version": number,
                "start_step": start,
                "candidates": len(candidates),
                "embedded_samples": len(candidates) if features is not None else 0,
                **report,
            },
            weights=weights,
            scores=scores,
        )
        rows, _ = expand_rows(selection, self.source.pool)
        digest = rows_digest(rows, selection.weights)
        require_same(self.ranks, [digest], [f"samples of selection {number}, from step {start} on"])
        if self.ranks.rank == 0:
            write_selection(selection, folder)
            if features is not None:
                delete_folder(features)
        self.ranks.barrier()
        self.seconds += time.perf_counter() - begin
        log.info(
            "selection %d from step %d: %d of %d samples (%d distinct), %.1f s",
            number,
            start,
            len(rows),
            len(candidates),
            len(selection.uids),
            time.perf_counter() - begin,
        )
        return SelectionVersion(
            number=number,
            rows=rows,
            start_step=start,
            stop_step=self._stop(rows, start),
            weights=product_of_weights(self.weights, row_weights(selection, self.source.pool)),
        )

    def _read(self, number: int, start: int) -> SelectionVersion:
        folder = self.folder / f"v{number:04d}"
        if not (folder / MANIFEST_NAME).is_file():
            raise InputError(
                f"{folder} is missing: the run was trained on this selection from step {start} on, "
                "and cannot be continued without it. Put it back, or start a new run."
            )
        if (folder / "weights.npz").is_file():
            raise InputError(
                f"{folder} was written by an earlier version of siftclip, which kept the weights "
                "of samples in another format (weights.npz). Start a new run."
            )
        selection = read_selection(folder)
        rows, _ = expand_rows(selection, self.source.pool)
        return SelectionVersion(
            number=number,
            rows=rows,
            start_step=start,
            stop_step=self._stop(rows, start),
            weights=product_of_weights(self.weights, row_weights(selection, self.source.pool)),
        )


def _of_all(
    values: np.ndarray | None, rows: np.ndarray, samples: int, *, other: float
) -> np.ndarray | None:
    """Return float32 [samples] with the values of some rows, and another of all others."""
    if values is None:
        return None
    of_all = np.full(samples, other, dtype=np.float32)
    of_all[rows] = values
    return of_all
