"""Features of samples of the pool by the model as it is now, for selecting again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler

from siftclip.datamodules.index.faults import FaultLog
from siftclip.datamodules.models.autocast import autocast
from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.pool.image_formats import describe_formats
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.streaming.batches import Request
from siftclip.datamodules.streaming.device_copies import on_device
from siftclip.datamodules.streaming.loader import LoaderOptions, make_loader
from siftclip.errors import InputError
from siftclip.eval.evaluation_mode import evaluation_mode
from siftclip.files import write_npz
from siftclip.progress import show_progress
from siftclip.ranks import Ranks
from siftclip.trainer.models.embedding import embed_batch, embedding_dataset
from siftclip.writing import delete_folder, make_folder

log = logging.getLogger(__name__)

LEARNER = "learner"  # the arrays are learner_img and learner_txt


@dataclass(slots=True, kw_only=True)
class RowSampler(Sampler[list[Request]]):
    """Batches of given rows, shard by shard: no batch has samples of two."""

    parts: list[np.ndarray]  # int64 rows of a shard, ascending
    batch_size: int

    def __len__(self) -> int:
        return sum(-(-len(part) // self.batch_size) for part in self.parts)

    def __iter__(self) -> Iterator[list[Request]]:
        for part in self.parts:
            for start in range(0, len(part), self.batch_size):
                yield [(0, row) for row in part[start : start + self.batch_size].tolist()]


@dataclass(slots=True, kw_only=True)
class PoolEmbedder:
    """Embeds samples with the learner, or the average of its weights."""

    clip: ClipModel  # its transforms and tokenizer
    model: Callable[[], nn.Module]
    pool: Pool
    loader: LoaderOptions
    batch_size: int
    max_image_pixels: int
    max_bad_fraction: float
    progress: bool
    autocast_to: torch.dtype | None = None  # as the learner is trained

    def __call__(self, rows: np.ndarray, folder: Path, ranks: Ranks, device: torch.device) -> None:
        """Write `<shard>.npz` for the samples `rows`, int64 ascending, into `folder`.

        The ranks share the shards by how many of the samples each has, and return when all files
        are there.

        Raises:
            InputError: too many samples are bad.
        """
        if ranks.rank == 0:
            delete_folder(folder)  # of a run that was killed in between
            make_folder(folder)
        ranks.barrier()
        cuts = np.flatnonzero(np.diff(self.pool.shard_of_row[rows])) + 1
        parts = share_of(np.split(rows, cuts), rank=ranks.rank, world_size=ranks.size)
        model = self.model()
        faults, formats = FaultLog(), Counter[str]()
        loader = make_loader(
            embedding_dataset(self.clip, self.pool, max_image_pixels=self.max_image_pixels),
            RowSampler(parts=parts, batch_size=self.batch_size),
            self.loader,
            pin_memory=device.type == "cuda",
        )
        bar = show_progress(
            total=sum(map(len, parts)),
            label="embed",
            unit="sample",
            bar=self.progress,
            speaks=ranks.rank == 0,
        )
        with evaluation_mode(replace(self.clip, model=model), device) as ready, bar:
            batches = on_device(loader, device)
            for part in parts:
                embedded = []
                for _ in range(-(-len(part) // self.batch_size)):
                    batch = next(batches)
                    with autocast(device, self.autocast_to):
                        embedded.append(embed_batch(ready.model, batch))
                    for cause, place in batch.faults:
                        faults.add(cause, place)
                    formats.update(batch.formats)
                    bar.update(len(batch.rows))
                image, text = (torch.cat(values).numpy() for values in zip(*embedded, strict=True))
                write_npz(
                    folder / f"{self.pool.shards[self.pool.shard_of_row[part[0]]].stem}.npz",
                    uids=self.pool.uids[part],
                    **{f"{LEARNER}_img": image, f"{LEARNER}_txt": text},
                )
        if formats:
            log.info("embed: %s", describe_formats(formats, sum(map(len, parts))))
        # Together, so that no rank waits for one that has stopped.
        bad = int(ranks.sum(torch.tensor(faults.samples)))
        if bad > self.max_bad_fraction * len(rows):
            raise InputError(
                f"pool {self.pool.root}: {bad} of the {len(rows)} samples that were embedded are "
                f"bad, more than pool.max_bad_fraction={self.max_bad_fraction} allows. "
                f"{faults.summary() if faults.samples else ''}"
            )
        ranks.barrier()


def share_of(parts: Sequence[np.ndarray], *, rank: int, world_size: int) -> list[np.ndarray]:
    """Return a rank's share of parts of different sizes, in their order.

    The largest part that is left goes to the rank with the fewest samples so far, so that shares
    differ by no more than the smallest part of the largest share.
    """
    samples = [0] * world_size
    owner = [0] * len(parts)
    for at in sorted(range(len(parts)), key=lambda at: (-len(parts[at]), at)):
        owner[at] = min(range(world_size), key=lambda each: samples[each])
        samples[owner[at]] += len(parts[at])
    return [part for part, of in zip(parts, owner, strict=True) if of == rank]


def require_whole_weights(strategy: str) -> None:
    """Refuse sharded weights, which would need embedding shard by shard in lockstep.

    Raises:
        InputError: the weights are sharded.
    """
    if strategy == "fsdp":
        raise InputError(
            "trainer.strategy=fsdp does not go with selecting again from the learner's features. "
            "Use trainer.strategy=ddp, or online=every_step."
        )
