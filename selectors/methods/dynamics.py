"""Cluster sampling anew in each epoch (DynamiCS, arXiv 2604.27932): less of the large clusters.

Large clusters give fewer samples than they have, small ones more, and a larger cluster never gives
fewer than a smaller one. The paper's schedule was not at hand: the power law used here is ours.
"""

from __future__ import annotations

import numpy as np

from siftclip.errors import require_fraction, require_int, require_suffix
from siftclip.selectors.core.base import Choice, ExternalColumn, Requirements, Selector, Source
from siftclip.selectors.core.noise import noise, noise_state
from siftclip.selectors.methods.quota import keep_top_of_each


def power_quotas(sizes: np.ndarray, total: int, *, alpha: float, max_repeats: int) -> np.ndarray:
    """Split `total` in proportion to size^alpha, by largest remainders: int64 [c].

    No cluster gets more than `max_repeats` times its size; what it cannot use is shared among the
    others in the same way. Of equal remainders, the larger and then the earlier cluster comes
    first. So a larger cluster never gets less than a smaller one, and the sum is exactly
    min(total, max_repeats * sum(sizes)).

    Args:
        sizes: int64 [c], at least 1.
        total: at least 0.
        alpha: in (0, 1]; 1 shares as the samples are shared.
        max_repeats: at least 1.
    """
    limits = sizes * max_repeats
    if total >= int(limits.sum()):
        return limits
    weights = sizes.astype(np.float64) ** alpha
    below = np.ones(len(sizes), dtype=bool)  # their limits
    while True:  # each time more clusters are at their limits
        left = total - int(limits[~below].sum())
        shares = np.where(below, left * (weights / weights[below].sum()), 0.0)
        over = below & (shares >= limits)
        if not over.any():
            break
        below &= ~over
    quotas = np.where(below, np.floor(shares).astype(np.int64), limits)
    remainders = np.where(below, shares - quotas, -1.0)
    order = np.lexsort((np.arange(len(sizes)), -sizes, -remainders))
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas


def sample_clusters(
    clusters: np.ndarray, uids: np.ndarray, quotas: np.ndarray, *, seed: int
) -> np.ndarray:
    """Choose how often each sample is used so that each cluster gives its quota: int64 [n].

    All samples of a cluster are used equally often, but for a random part that is used once more.

    Args:
        clusters: int64 [n], in [0, c), none of the c empty.
        uids: uint64 [n, 2]; the random part is a pure function of them and the seed.
        quotas: int64 [c], at least 0.
        seed: any integer of at least 0.
    """
    sizes = np.bincount(clusters, minlength=len(quotas))
    repeats, more = np.divmod(quotas, sizes)
    keys = noise(noise_state(uids, seed), 0)
    multiplicities: np.ndarray = repeats[clusters] + keep_top_of_each(keys, uids, clusters, more)
    return multiplicities


class DynamicClusterSampling(Selector):
    """Use the samples of large clusters less and those of small ones more, anew in each epoch.

    Meant for online.cadence=every_epoch: a source whose uids are mixed with the epoch gets a new
    random part each time. A sample without a cluster is left out, its score is NaN, and the log
    says how many there are. The score of the others is how often they are used on average.
    """

    def __init__(
        self,
        *,
        path: str | None,
        column: str,
        seed: int,
        fraction: float = 1.0,
        alpha: float = 0.5,
        max_repeats: int = 10,
    ) -> None:
        """Name the clusters, and set how they are evened out.

        Args:
            path: a `.parquet` or structured `.npy` file with uids and `column`, see `External`;
                None: the parquet files of the pool's own metadata.
            column: the number of a sample's cluster; equal numbers, one cluster.
            seed: of the random part.
            fraction: an epoch has int(n * fraction) samples, repeated ones included, with n those
                of the whole pool.
            alpha: a cluster of n samples has a share in proportion to n^alpha, in (0, 1]; 1 leaves
                the shares unchanged, near 0 they are nearly equal.
            max_repeats: a sample is used at most so often in an epoch.
        """
        require_suffix("path", path, (".parquet", ".npy"), owner=self)
        self.clusters = ExternalColumn(path=path, column=column)
        self.seed = require_int("seed", seed, minimum=0, owner=self)
        self.fraction = require_fraction("fraction", fraction, owner=self)
        self.alpha = require_fraction("alpha", alpha, owner=self)
        self.max_repeats = require_int("max_repeats", max_repeats, minimum=1, owner=self)

    @property
    def requires(self) -> Requirements:
        return Requirements(column=self.clusters)

    def asked_samples(self, left_samples: int, pool_samples: int) -> int:
        return int(pool_samples * self.fraction)

    def select(self, source: Source) -> Choice:
        """Draw an epoch; the fraction counts the samples of the whole pool."""
        names = source.take(source.rows, self.requires).column
        if names is None:
            raise ValueError("the source lacks the column of DynamicClusterSampling.requires")
        known = np.flatnonzero(np.isfinite(names))
        if len(known) < len(names):
            source.warn(
                f"DynamicClusterSampling: {len(names) - len(known)} of {len(names)} samples have "
                "no cluster and are left out"
            )
        _, clusters, sizes = np.unique(names[known], return_inverse=True, return_counts=True)
        quotas = power_quotas(
            sizes.astype(np.int64),
            self.asked_samples(len(source), len(source.whole)),
            alpha=self.alpha,
            max_repeats=self.max_repeats,
        )
        kept = np.zeros(len(source), dtype=np.int64)
        kept[known] = sample_clusters(clusters, source.uids[known], quotas, seed=self.seed)
        rates = np.full(len(source), np.nan, dtype=np.float32)
        rates[known] = (quotas / sizes)[clusters]
        return Choice(multiplicities=kept, scores=rates)
