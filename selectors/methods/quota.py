"""The best samples of each cluster, with a quota for every cluster."""

from __future__ import annotations

from typing import Literal

import numpy as np

from siftclip.errors import ParameterError, require_choice, require_fraction, require_int
from siftclip.selectors.core.base import Choice, Requirements, ScoreSelector, Selector, Source
from siftclip.selectors.core.compose import require_selector, union
from siftclip.selectors.core.rules import OFS, Of, can_be_kept, counted


def proportional_quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """Split `total` in proportion to the sizes, by largest remainders: int64 [c].

    Each cluster gets the whole part of total * size / sum(sizes); what is then left of the total
    goes, one by one, to the clusters with the largest remainders, of equal ones to the larger
    cluster, then to the earlier one. The sum is exactly min(total, sum(sizes)).

    Args:
        sizes: int64 [c], at least 0.
        total: at least 0.
    """
    samples = int(sizes.sum())
    if total >= samples:
        return sizes.copy()
    # Whole numbers below 2^63: a pool and a part of it have fewer than 2^31 samples each.
    quotas, remainders = np.divmod(sizes * total, samples)
    order = np.lexsort((np.arange(len(sizes)), -sizes, -remainders))
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas


def equal_quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """Split `total` equally, where small clusters hand on what they cannot use: int64 [c].

    Every cluster gets min(size, level), with the largest level whose sum does not exceed the total.
    What is then left, less than one for each cluster above the level, goes one by one to the
    largest of these, of equal ones to the earlier one. The sum is exactly min(total, sum(sizes)).

    Args:
        sizes: int64 [c], at least 0.
        total: at least 0.
    """
    if total >= int(sizes.sum()):
        return sizes.copy()
    low, high = 0, int(sizes.max())  # the level is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= total else (low, middle)
    quotas: np.ndarray = np.minimum(sizes, low)
    order = np.lexsort((np.arange(len(sizes)), -sizes))
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas


def keep_top_of_each(
    scores: np.ndarray, uids: np.ndarray, clusters: np.ndarray, quotas: np.ndarray
) -> np.ndarray:
    """Keep the `quotas[c]` best scores of each cluster c: int64 [n] of zeros and ones.

    Of equal scores at a cut, the smaller uids are kept.

    Args:
        scores: float [n], above -inf.
        uids: uint64 [n, 2].
        clusters: int64 [n], in [0, c).
        quotas: int64 [c], at most the size of the cluster.
    """
    kept = np.zeros(len(scores), dtype=np.int64)
    order = np.lexsort((-scores, clusters))
    starts = np.searchsorted(clusters[order], np.arange(len(quotas)))
    cuts = np.full(len(quotas), np.inf)
    used = quotas > 0
    cuts[used] = scores[order[starts[used] + quotas[used] - 1]]
    above = scores > cuts[clusters]
    kept[above] = 1
    ties = np.flatnonzero((scores == cuts[clusters]) & used[clusters])
    ties = ties[np.lexsort((uids[ties, 1], uids[ties, 0], clusters[ties]))]
    owners = clusters[ties]
    place = np.arange(len(ties)) - np.searchsorted(owners, owners)
    left = quotas - np.bincount(clusters[above], minlength=len(quotas))
    kept[ties[place < left[owners]]] = 1
    return kept


class QuotaPerCluster(Selector):
    """Keep the best samples of each cluster: coverage of all of them, quality within each.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> from siftclip.selectors import External, QuotaPerCluster, Uniform
        >>> clusters = External(path=None, column="cluster", fraction=1)
        >>> scores = Uniform(seed=0, fraction=1)
        >>> selector = QuotaPerCluster(selector=scores, clusters=clusters, per_cluster=1)
        >>> siftclip.select(column=np.array([0, 0, 0, 1]), selector=selector).rows
        array([2, 3])
    """

    def __init__(
        self,
        *,
        selector: ScoreSelector,
        clusters: ScoreSelector,
        fraction: float | None = None,
        count: int | None = None,
        per_cluster: int | None = None,
        quotas: Literal["proportional", "equal"] = "proportional",
        of: Of = "pool",
    ) -> None:
        """Set scores, clusters and how many to keep. The rules of both selectors do not count.

        Args:
            selector: its scores rank the samples of a cluster.
            clusters: its scores name the clusters: equal numbers, one cluster.
            fraction: keep int(n * fraction) in all.
            count: keep so many in all.
            per_cluster: keep so many of each cluster, or all of a smaller one. Exactly one of the
                three must be given.
            quotas: how a total is shared: `proportional` to the samples of the clusters, or
                `equal` parts, where small clusters hand on what they cannot use.
            of: what n counts: the samples of the whole "pool", or those that earlier stages have
                "left".
        """
        self.selector = require_selector(self, "selector", selector, ScoreSelector)
        self.clusters = require_selector(self, "clusters", clusters, ScoreSelector)
        given = [value for value in (fraction, count, per_cluster) if value is not None]
        if len(given) != 1:
            raise ParameterError(
                "needs exactly one of fraction, count and per_cluster",
                owner=self,
                value={"fraction": fraction, "count": count, "per_cluster": per_cluster},
                got=f"fraction={fraction!r}, count={count!r}, per_cluster={per_cluster!r}",
                way_out="Set the others to null.",
            )
        self.fraction = (
            None if fraction is None else require_fraction("fraction", fraction, owner=self)
        )
        self.count = None if count is None else require_int("count", count, minimum=0, owner=self)
        self.per_cluster = (
            None
            if per_cluster is None
            else require_int("per_cluster", per_cluster, minimum=1, owner=self)
        )
        self.quotas = require_choice("quotas", quotas, ("proportional", "equal"), owner=self)
        self.of = require_choice("of", of, OFS, owner=self)

    @property
    def requires(self) -> Requirements:
        return union((self.selector, self.clusters))

    def select(self, source: Source) -> Choice:
        """Keep the best; a sample without a score above -inf or a cluster counts for nothing."""
        scores, names = self.selector.scores(source), self.clusters.scores(source)
        scored = np.flatnonzero(can_be_kept(scores) & np.isfinite(names))
        _, clusters, sizes = np.unique(names[scored], return_inverse=True, return_counts=True)
        kept = np.zeros(len(source), dtype=np.int64)
        kept[scored] = keep_top_of_each(
            scores[scored],
            source.uids[scored],
            clusters,
            self._quotas(
                sizes.astype(np.int64), self.asked_samples(len(source), len(source.whole))
            ),
        )
        return Choice(multiplicities=kept, scores=scores)

    @property
    def keeps_all(self) -> bool:
        return self.fraction == 1

    def asked_samples(self, left_samples: int, pool_samples: int) -> int | None:
        if self.fraction is not None:
            return int(counted(self.of, left_samples, pool_samples) * self.fraction)
        return self.count

    def _quotas(self, sizes: np.ndarray, total: int | None) -> np.ndarray:
        if total is None:
            quotas: np.ndarray = np.minimum(sizes, self.per_cluster or 0)
            return quotas
        share = proportional_quotas if self.quotas == "proportional" else equal_quotas
        return share(sizes, total)
