"""SemDeDup: remove samples that nearly repeat another one (Abbas et al., arXiv 2303.09540)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import ParameterError, require_choice, require_finite, require_int
from siftclip.hashing import uniform_score
from siftclip.selectors.core.base import Requirements, ScoreSelector, Source, WorkUnit
from siftclip.selectors.core.compose import merge
from siftclip.selectors.core.rules import Of, Threshold
from siftclip.selectors.core.source import TASK_SAMPLES, ReadsFeatures
from siftclip.selectors.fitting.clusters import Clustering, assign_all
from siftclip.selectors.kernels.most_similar import most_similar

Keep = Literal["hard", "easy", "random", "best"]  # which one of several duplicates is kept


def largest_earlier_similarity(features: Tensor, *, block: int = 8192) -> Tensor:
    """Find the largest inner product of each vector with an earlier one, float32 [n], at least 0.

    0 for the first vector, and where all products are negative: the release takes the maximum over
    a triangular matrix that is zero elsewhere. Earlier vectors count whether or not they are
    removed themselves. Holds products of small tiles only, whose size does not change the answer.

    Args:
        features: float [n, d] of unit norm, in the order in which they are kept.
        block: compare so many at a time.
    """
    largest = [
        _compare(features[start : start + block], features[: start + block], start)
        for start in range(0, len(features), block)
    ]
    return torch.cat(largest) if largest else features.new_empty(0, dtype=torch.float32)


def _compare(rows: Tensor, others: Tensor, start: int) -> Tensor:
    """Find the largest product of row i with the first `start + i` of `others`, at least 0."""
    before = torch.arange(start, start + len(rows), device=rows.device)
    return most_similar(rows, others, before=before)[1].clamp(min=0)


class SemDeDup(ReadsFeatures, ScoreSelector):
    """Remove samples whose cosine to an earlier one in their cluster exceeds 1 - eps.

    The score is minus the largest such cosine, so that `eps` is a threshold and `fraction` keeps
    the least repeated part. It is 0 for the first of a cluster. `keep` decides who comes first, of
    equal ones the smaller uid; the release leaves their order open. Features must be
    of unit norm. Memory: two chunks of features.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> from siftclip.selectors import KMeans, SemDeDup
        >>> images = np.repeat(np.eye(2, dtype=np.float32), 8, axis=0)
        >>> selector = SemDeDup(clustering=KMeans(clusters=1, seed=0), eps=0.05)
        >>> siftclip.select(features=images, selector=selector).rows
        array([0, 8])
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        clustering: Clustering,
        eps: float | None = None,
        fraction: float | None = None,
        keep: Keep = "hard",
        prefer: ScoreSelector | None = None,
        seed: int = 0,
        of: Of = "pool",
    ) -> None:
        """Choose the features, the clusters and the rule.

        Args:
            key: of the features, `l14_img` for images; None: the images of those it is used with.
            clustering: `KMeans` or `GivenCentroids`; the paper takes 50,000 spherical clusters of
                LAION-440M.
            eps: keep the samples whose largest cosine is at most 1 - eps, in (0, 1], or ...
            fraction: ... the int(n * fraction) samples with the smallest ones.
            keep: of a group of duplicates, keep the one farthest from its centroid ("hard", the
                paper's choice), the nearest ("easy"), a "random" one, or the "best" by `prefer`.
            prefer: with keep="best", such as `ClipScore`; what has no score comes last. Its own
                rule plays no part.
            seed: with keep="random".
            of: what n counts: the "pool", or what earlier stages have "left".
        """
        if (eps is None) == (fraction is None):
            raise ParameterError(
                "needs exactly one of eps and fraction",
                owner=self,
                value={"eps": eps, "fraction": fraction},
                got=f"{eps!r} and {fraction!r}",
                way_out="Set the other to null.",
            )
        if eps is not None and not 0 < require_finite("eps", eps, owner=self) <= 1:
            rule = "must be a number in the range (0, 1]"
            raise ParameterError(rule, owner=self, parameter="eps", value=eps)
        super().__init__(fraction=fraction, rule=None if eps is None else Threshold(eps - 1), of=of)
        self.key, self.clustering, self.eps = key, clustering, eps
        self.keep: Keep = require_choice("keep", keep, get_args(Keep), owner=self)
        self.seed, self.prefer = require_int("seed", seed, minimum=0, owner=self), prefer
        if (prefer is None) == (keep == "best"):
            raise ParameterError(
                'belongs to keep="best", and is needed for it',
                owner=self,
                parameter="prefer",
                value=prefer,
                got=f"keep={keep!r} and prefer={prefer!r}",
            )

    @property
    def _own(self) -> Requirements:
        return Requirements(features=(self.array_key,))

    @property
    def requires(self) -> Requirements:
        clusters = Requirements(features=(self.array_key,), files=self.clustering.files())
        return clusters if self.prefer is None else merge([clusters, self.prefer.requires])

    def tasks(self, source: Source, pass_number: int) -> Sequence[WorkUnit]:
        """Group whole clusters in the order of `keep`, several per task where they are small."""
        _, clusters, products = assign_all(source, self.array_key, self.clustering)
        order = np.lexsort(
            (source.uids[:, 1], source.uids[:, 0], self._lateness(source, products), clusters)
        )
        order = order[np.searchsorted(clusters[order], 0) :]  # without those that are not usable
        self._clusters = clusters
        ends = np.flatnonzero(np.diff(clusters[order], append=np.iinfo(np.int32).max)) + 1
        cuts = _cuts(ends, TASK_SAMPLES)
        return [
            WorkUnit(name=f"clusters-{begin}", rows=source.rows[order[begin:end]])
            for begin, end in pairwise(cuts)
        ]

    def _lateness(self, source: Source, products: np.ndarray) -> np.ndarray:
        """Return what orders the samples of a cluster, float32 [n]: smaller comes earlier."""
        if self.keep == "random":
            return uniform_score(source.uids, self.seed)
        if self.prefer is not None:
            return -self.prefer.scores(source)  # NaN is sorted last
        return products if self.keep == "hard" else -products

    def score_task(self, source: Source, task: WorkUnit) -> Tensor:
        """Compare within the clusters of a task: in memory, or block by block if one is large."""
        clusters = self._clusters[source.index_of(task.rows)]
        ends = np.flatnonzero(np.diff(clusters, append=np.iinfo(np.int32).max)) + 1
        cuts = _cuts(ends, source.chunk_samples)
        largest = []
        for begin, end in pairwise(cuts):
            rows, of_rows = task.rows[begin:end], clusters[begin:end]
            if len(rows) > source.chunk_samples:
                largest.append(self._large_cluster(source, rows))
                continue
            features = source.take(rows, self._own).features[self.array_key]
            starts = np.flatnonzero(np.diff(of_rows, prepend=-1))
            largest += [
                largest_earlier_similarity(features[first:last])
                for first, last in zip(starts, [*starts[1:], len(rows)], strict=True)
            ]
        return -torch.cat(largest) if largest else torch.empty(0)

    def _large_cluster(self, source: Source, rows: np.ndarray) -> Tensor:
        """Compute `largest_earlier_similarity` of samples that do not fit into one chunk."""
        block = source.chunk_samples
        answer = []
        for start in range(0, len(rows), block):
            features = source.take(rows[start : start + block], self._own).features[self.array_key]
            largest = _compare(features, features, 0)
            for chunk in source.chunks(rows[:start], self._own):
                earlier = most_similar(features, chunk.features[self.array_key])[1]
                largest = torch.maximum(largest, earlier)
            answer.append(largest)
        return torch.cat(answer)


def _cuts(ends: np.ndarray, most: int) -> list[int]:
    """Cut a sequence of groups that end at `ends` into runs of whole groups of at most `most`.

    A larger group is a run of its own. Returns the ends of the runs, after a 0.
    """
    cuts = [0]
    while cuts[-1] < (ends[-1] if len(ends) else 0):
        next_end = ends[np.searchsorted(ends, cuts[-1], side="right")]
        last = np.searchsorted(ends, cuts[-1] + most, side="right") - 1
        cuts.append(max(int(next_end), int(ends[last]) if last >= 0 else 0))
    return cuts
