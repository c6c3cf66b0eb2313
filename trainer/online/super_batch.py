"""A super-batch as selectors see it: features of this step, everything else from the pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.hashing import mix64, seed_state
from siftclip.purposes import HashPurpose
from siftclip.ranks import Ranks
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, FeatureFile, Logits, Requirements


def step_uids(uids: np.ndarray, step: int) -> np.ndarray:
    """Name the samples of a super-batch differently at each step, uint64 [n, 2].

    Selectors draw random numbers from (seed, uid). With the uids of the pool they would draw the
    same ones at every step; and a sample may be in a super-batch twice, where two passes over a
    selection meet.

    Args:
        uids: uint64 [n, 2], of the samples in the order of the super-batch.
        step: of the run.
    """
    place = mix64(np.arange(len(uids), dtype=np.uint64) ^ seed_state(step ^ HashPurpose.STEP))
    return np.stack([mix64(uids[:, 0] ^ place), mix64(uids[:, 1] + place)], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolData:
    """What super-batches of a run take from the pool."""

    source: PoolSource
    files: Mapping[FeatureFile, Tensor]  # features of targets, on the device


class SuperBatchSource(MemorySource):
    """The samples of a super-batch. Its rows are places in it, not rows of the pool."""

    def __init__(
        self,
        pool_rows: np.ndarray,
        *,
        step: int,
        features: Mapping[str, Tensor],
        data: PoolData,
        logits: Mapping[str, Logits],
        groups: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Hold a super-batch.

        Args:
            pool_rows: int64 [n], rows of the pool; one may stand twice.
            step: of the run.
            features: key -> float [n, d], of all ranks, in the order of `pool_rows`.
            data: of the pool.
            logits: of the models whose features these are.
            groups: of the sub-batch; the ranks share the work by groups.
            ranks: that hold the same super-batch.
        """
        count = len(pool_rows)
        chunk = Chunk(
            rows=np.arange(count),
            uids=step_uids(data.source.uids[pool_rows], step),
            features=dict(features),
        )
        super().__init__(
            chunk,
            files=data.files,
            logits=logits,
            part_samples=count // groups,
            ranks=ranks,
            trusted=True,
        )
        self.pool_rows, self.data = pool_rows, data
        if not features:
            self.device = data.source.device

    def warn(self, text: str) -> None:
        self.data.source.warn(text)  # which says it once, not at every step

    def file(self, file: FeatureFile) -> Iterator[Tensor]:
        for values in super().file(file):
            yield values.to(self.device)  # which was not known when the file was read

    def take(self, rows: np.ndarray, requires: Requirements) -> Chunk:
        taken = super().take(rows, Requirements(features=requires.features))
        asked = replace(requires, features=())
        if asked == Requirements():
            return taken
        of_pool = self.data.source.take(self.pool_rows[rows], asked)
        return replace(of_pool, rows=taken.rows, uids=taken.uids, features=taken.features)


def read_files(source: PoolSource, files: tuple[FeatureFile, ...]) -> dict[FeatureFile, Tensor]:
    """Read features of targets, once for all steps: float [n, d] on the source's device."""
    return {file: torch.cat(list(source.file(file))) for file in dict.fromkeys(files)}
