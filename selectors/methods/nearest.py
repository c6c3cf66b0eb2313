"""Nearest neighbours of a target: the samples that are high in the list of some target vector.

Each target vector ranks the pool by inner product. A sample's rank is its best place in any of
these lists, so that every target is served alike, also one whose neighbours are all far. The
largest similarity to any target is another method (NormSim_inf).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError, require_int
from siftclip.hashing import uid_order
from siftclip.selectors.core.base import (
    Choice,
    Chunk,
    FeatureFile,
    Requirements,
    RuleOptions,
    ScoreSelector,
    Selector,
    Source,
    WorkUnit,
)
from siftclip.selectors.core.rules import Of, top_fraction
from siftclip.selectors.core.source import ReadsFeatures
from siftclip.selectors.kernels.blocks import require_same_width, usable_rows
from siftclip.selectors.kernels.neighbour_lists import NOTHING, best_ranks, update_lists

if TYPE_CHECKING:
    from typing_extensions import Unpack

_UNLISTED = NOTHING + 1  # the best entry of a usable sample that is in no list
_ENTRIES = 1 << 24  # of the lists that exist at one time, 8 bytes each


def target_ranks(
    source: Source, key: str, target: FeatureFile, *, neighbours: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the best rank of every sample in the lists of the nearest neighbours of a target.

    Equal products are ranked by uid. Targets are taken in blocks, whose lists are merged over the
    ranks; the pool is read once per block. Memory: 128 MiB of lists, 8 chunks of targets, one chunk
    of samples and 24 bytes per sample. A killed run continues at its last finished block.

    Args:
        source: the samples.
        key: of their features.
        target: feature file of the target. Rows that are zero or not finite do not count.
        neighbours: length m of each list.

    Returns:
        ranks int32 [n], from 0, m for samples in no list, -1 for those that are not usable; and
        int64 [n] that sort like the products by which they got these ranks.
    """
    order = uid_order(source.uids)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    owner = NearestRank(key=key, target=target, neighbours=neighbours, fraction=1)
    cache = source.cache(owner)  # whichever selector needs the ranks
    requires = Requirements(features=(key,))
    tasks = source.mine(source.tasks(requires))
    samples = sum(len(task.rows) for task in tasks)
    done, best = _kept(source, cache.get("best") if source.ranks.rank == 0 else None)
    size = max(1, min(_ENTRIES // neighbours, 8 * source.chunk_samples))
    for targets in _target_blocks(source, target, size, done):
        lists = torch.full((len(targets), neighbours), NOTHING, device=source.device)
        usable = torch.zeros(len(source), dtype=torch.int64, device=source.device)
        with source.bar(samples, f"neighbours of target {done + 1} and on") as bar:
            for task in tasks:
                for chunk in source.chunks(task.rows, requires):
                    places = torch.from_numpy(place[source.index_of(chunk.rows)])
                    places = places.to(source.device)[chunk.usable()]
                    usable[places] = 1
                    lists = _add_chunk(lists, targets, chunk, places, target)
                    bar.update(len(chunk))
        if done == 0:
            best[source.ranks.sum(usable) > 0] = _UNLISTED
        best = best_ranks(best, _merge(source, lists))
        done += len(targets)
        if source.ranks.rank == 0:
            cache.put("best", best=best.cpu().numpy(), targets=np.array(done))
    if not done:
        raise InputError(f"The target {target.path} has no row that is finite and not zero.")
    entries = best.cpu().numpy()[place]
    ranks = np.where(entries == _UNLISTED, neighbours, -(entries >> 32))
    return np.where(entries == NOTHING, -1, ranks).astype(np.int32), entries & (2**32 - 1)


def _kept(source: Source, kept: dict[str, np.ndarray] | None) -> tuple[int, Tensor]:
    """Return finished targets and best entries by place, of what one rank has found so far."""
    done = int(source.ranks.sum(torch.tensor(0 if kept is None else int(kept["targets"]))))
    if not done:
        return 0, torch.full((len(source),), NOTHING, device=source.device)
    best = torch.zeros(len(source), dtype=torch.int64)
    if kept is not None:
        best = torch.from_numpy(kept["best"])
    return done, source.ranks.sum(best).to(source.device, copy=True)


def _target_blocks(source: Source, target: FeatureFile, size: int, done: int) -> Iterator[Tensor]:
    """Yield the usable rows of a target after the first `done`, `size` at a time."""
    waiting: list[Tensor] = []
    for piece in source.file(target):
        piece = piece[usable_rows(piece)]
        waiting.append(piece[done:])
        done = max(0, done - len(piece))
        if sum(map(len, waiting)) >= size:
            *blocks, rest = torch.split(torch.cat(waiting), size)
            waiting = [rest]
            yield from blocks
    if sum(map(len, waiting)):
        yield torch.cat(waiting)


def _add_chunk(
    lists: Tensor, targets: Tensor, chunk: Chunk, places: Tensor, target: FeatureFile
) -> Tensor:
    """Update the lists by the usable samples of a chunk, few targets at a time."""
    (features,) = chunk.features.values()
    values = features[chunk.usable()]
    if not len(values):
        return lists
    require_same_width("the features", values, f"the target {target.path}", targets)
    pieces = [
        update_lists(part, goals, values, places)
        for part, goals in zip(torch.split(lists, 1024), torch.split(targets, 1024), strict=True)
    ]
    return torch.cat(pieces)


def _merge(source: Source, lists: Tensor) -> Tensor:
    """Merge the lists of all ranks, few targets at a time so that memory stays bounded."""
    ranks = source.ranks
    if ranks.size == 1:
        return lists
    merged = []
    for part in torch.split(lists, -(-len(lists) // ranks.size)):
        board = part.new_zeros((ranks.size, *part.shape))
        board[ranks.rank] = part
        board = ranks.sum(board).transpose(0, 1).reshape(len(part), -1)
        merged.append(board.topk(part.shape[1], dim=1).values)
    return torch.cat(merged)


class NearestRank(ReadsFeatures, ScoreSelector):
    """Score a sample by minus its best rank among the neighbours of any target vector.

    0 is the nearest neighbour of a target. Samples in no list get minus `neighbours`: a fraction
    that reaches them takes them by uid. The released negCLIPLoss code has a relative of this: lists
    of 200 within a file of the pool, and the mean of five best ranks, of five parts of the target.

    Example:
        >>> import torch
        >>> from siftclip.selectors import FeatureFile, NearestRank
        >>> target = FeatureFile(path="target.npy")
        >>> images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> selector = NearestRank(target=target, neighbours=2, fraction=0.5)
        >>> selector.scores(images, files={target: torch.tensor([[1.0, 0.0]])})
        array([ 0., -1., -2.], dtype=float32)
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        target: FeatureFile,
        neighbours: int = 200,
        **rule: Unpack[RuleOptions],
    ) -> None:
        """Choose the features and the target.

        Args:
            key: of the features, such as `l14_img`; None: the images of those it is used with.
            target: features of the target, by the same model.
            neighbours: length of each target vector's list.
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.key, self.target = key, target
        self.neighbours = require_int("neighbours", neighbours, minimum=1, owner=self)

    @property
    def requires(self) -> Requirements:
        return Requirements(features=(self.array_key,), files=(self.target,))

    def fit(self, source: Source) -> None:
        if self.neighbours >= len(source) > 0:
            source.warn(
                f"NearestRank: neighbours={self.neighbours} puts all {len(source)} "
                "samples into every list, so that none is left out; use fewer"
            )
        self._ranks, _ = target_ranks(
            source, self.array_key, self.target, neighbours=self.neighbours
        )

    def score_task(self, source: Source, task: WorkUnit) -> Tensor:
        ranks = torch.from_numpy(self._ranks[source.index_of(task.rows)])
        return torch.where(ranks < 0, torch.nan, 0.0 - ranks.float())


class NearestUnion(ReadsFeatures, Selector):
    """Keep the union of the m nearest samples of each target vector, with m as the budget allows.

    The union of the first m neighbours is kept whole while it fits; the rest of the budget goes to
    the next neighbours, the most similar first, of equal ones the smaller uid. So exactly the
    fraction is kept, or all usable samples if these are fewer.
    """

    def __init__(
        self, *, key: str | None = None, target: FeatureFile, fraction: float, of: Of = "pool"
    ) -> None:
        """Choose the features, the target and the budget.

        Args:
            key: of the features, such as `l14_img`; None: the images of those it is used with.
            target: features of the target, by the same model.
            fraction: keep int(n * fraction) samples, in (0, 1].
            of: what n counts: the "pool", or what earlier stages have "left".
        """
        self.key, self.target = key, target
        self.rule = top_fraction(self, fraction, of)

    @property
    def requires(self) -> Requirements:
        return Requirements(features=(self.array_key,), files=(self.target,))

    def select(self, source: Source) -> Choice:
        budget = self.rule.asked_samples(len(source), len(source.whole))
        targets = sum(len(piece) for piece in source.file(self.target))
        # Lists overlap: four times the entries mostly suffice. Where not, longer ones are made.
        neighbours = max(1, min(len(source), -(-4 * budget // max(1, targets))))
        while True:
            ranks, products = target_ranks(
                source, self.array_key, self.target, neighbours=neighbours
            )
            listed = np.flatnonzero((ranks >= 0) & (ranks < neighbours))
            if len(listed) >= budget or neighbours >= len(source):
                break
            neighbours = min(len(source), 4 * neighbours)
        uids = source.uids[listed]
        order = np.lexsort((uids[:, 1], uids[:, 0], -products[listed], ranks[listed]))
        kept = np.zeros(len(source), dtype=np.int64)
        kept[listed[order[:budget]]] = 1
        return Choice(multiplicities=kept)
