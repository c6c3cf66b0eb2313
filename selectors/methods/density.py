"""Density-based pruning: more samples of varied clusters (Abbas et al., arXiv 2401.04578).

Checked against the authors' scripts (`prune.py`, `compute_centroid_distances.py` and
`compute_avg_dist_to_cluster_centroid.py` of amro-kamal/effective_pruning). They cannot be run as
released, so that there are no outputs to compare with.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import (
    ParameterError,
    require_choice,
    require_int,
    require_positive,
)
from siftclip.hashing import uniform_score
from siftclip.ranks import SCALE
from siftclip.selectors.core.base import Choice, Requirements, Selector, Source
from siftclip.selectors.core.rules import Of, top_fraction
from siftclip.selectors.core.source import ReadsFeatures
from siftclip.selectors.fitting.clusters import Clustering, assign_all

Keep = Literal["hard", "easy", "random"]  # which samples of a cluster are kept


def centroid_distances(centroids: Tensor, *, neighbours: int = 20) -> np.ndarray:
    """Compute d_inter, the mean cosine distance of a centroid to its nearest others: float64 [k].

    With fewer than `neighbours` others, to all of them; 0 for a single cluster.

    Args:
        centroids: float [k, d]; scaled to unit norm here. The release takes inner products, which
            are cosines for its spherical clusters.
        neighbours: how many of the nearest; 20 in the release.
    """
    unit = torch.nn.functional.normalize(centroids.double(), dim=1)
    count = min(neighbours, len(unit) - 1)
    if count < 1:
        return np.zeros(len(unit))
    means = []
    for start in range(0, len(unit), 1024):
        cosines = unit[start : start + 1024] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        means.append(1 - cosines.topk(count, dim=1).values.mean(1))
    return torch.cat(means).cpu().numpy()


def mean_distances(clusters: np.ndarray, cosines: np.ndarray, count: int) -> np.ndarray:
    """Compute d_intra, the mean cosine distance of samples to their centroid: float64 [count].

    0 for a cluster without samples. Sums are whole numbers, so that no order changes them.

    Args:
        clusters: int32 [n], negative for samples that do not count.
        cosines: float32 [n], with the own centroid.
        count: of clusters.
    """
    member = clusters >= 0
    sums = np.zeros(count, dtype=np.int64)
    distances = np.rint((1.0 - cosines[member].astype(np.float64)) * SCALE).astype(np.int64)
    np.add.at(sums, clusters[member], distances)
    return sums / SCALE / np.maximum(np.bincount(clusters[member], minlength=count), 1)


def cluster_shares(complexity: np.ndarray, temperature: float) -> np.ndarray:
    """Compute the softmax of complexity / temperature, float64 [k]."""
    logits = complexity / temperature
    weights = np.exp(logits - logits.max(initial=-np.inf))
    shares: np.ndarray = weights / max(weights.sum(), np.finfo(np.float64).tiny)
    return shares


def allocate(
    shares: np.ndarray, sizes: np.ndarray, total: int, *, minimum: int = 1, owner: object = None
) -> np.ndarray:
    """Allocate to each cluster the samples that it contributes: int64 [k], with the sum `total`.

    Minimises sum_j (x_j - total * shares_j)^2 subject to sum_j x_j = total and
    min(minimum, sizes_j - 1) <= x_j <= sizes_j (table 4 of the paper). Its optimality conditions
    give x_j = clip(total * shares_j - level, lower_j, upper_j) with one level for all clusters,
    which bisection finds to the last bit. Whole numbers follow by largest remainders; the release
    rounds each x_j of an approximate solver, and misses the total.

    Args:
        shares: float64 [k], at least 0, of sum 1.
        sizes: int64 [k], of the clusters.
        total: how many to keep, at most the sum of the sizes.
        minimum: of each cluster that is larger than this.
        owner: whose parameter the minimum is, for the message.

    Raises:
        ParameterError: the minima add up to more than the total.
    """
    lower = np.clip(sizes - 1, 0, minimum)
    if lower.sum() > total:
        raise ParameterError(
            f"is too large: so many of each of {np.count_nonzero(lower)} clusters do not fit into "
            f"{total} samples",
            owner=owner,
            parameter="minimum",
            value=minimum,
            way_out="Lower it, keep a larger fraction, or use fewer clusters.",
        )
    wanted = shares * total
    low, high = float((wanted - sizes).min(initial=0)), float((wanted - lower).max(initial=0))
    while low < (middle := low + (high - low) / 2) < high:
        kept = np.clip(wanted - middle, lower, sizes).sum()
        low, high = (middle, high) if kept >= total else (low, middle)
    exact = np.clip(wanted - low, lower, sizes)
    counts = np.floor(exact + 1e-9).astype(np.int64)  # 2.9999999999 is a rounded 3
    missing = int(total - counts.sum())
    room = np.where(counts < sizes, exact - counts, -np.inf)
    counts[np.argsort(-room, kind="stable")[:missing]] += 1
    return counts


def keep_quotas(
    clusters: np.ndarray, order: np.ndarray, uids: np.ndarray, quotas: np.ndarray
) -> np.ndarray:
    """Keep the first `quotas[j]` samples of each cluster j: int64 [n] of zeros and ones.

    Args:
        clusters: int32 [n], negative for samples that are not kept.
        order: float32 [n], smaller comes first; of equal ones the smaller uid.
        uids: uint64 [n, 2].
        quotas: int64 [k].
    """
    sequence = np.lexsort((uids[:, 1], uids[:, 0], order, clusters))
    cluster = clusters[sequence]
    place = np.arange(len(cluster)) - np.searchsorted(cluster, cluster)
    kept = np.zeros(len(cluster), dtype=np.int64)
    member = cluster >= 0
    kept[sequence[member]] = place[member] < quotas[cluster[member]]
    return kept


class DensityPruning(ReadsFeatures, Selector):
    """Keep more samples of clusters that are varied and far from others, and there the atypical.

    A cluster's complexity is d_inter * d_intra, its share of the result the softmax of that over a
    temperature, as far as it has so many samples. The paper removes duplicates first (`SemDeDup`),
    without which they dominate the clusters.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        clustering: Clustering,
        fraction: float,
        temperature: float = 0.5,
        keep: Keep = "hard",
        minimum: int = 1,
        neighbours: int = 20,
        seed: int = 0,
        of: Of = "pool",
    ) -> None:
        """Choose the features, the clusters and the budget.

        Args:
            key: of the features, `l14_img` for images of L/14; None: the images of those it is used
                with. The paper's are of DINOv2 L/14.
            clustering: `KMeans` or `GivenCentroids`; 100 spherical clusters for DataComp medium,
                500 for 280 M samples of LAION.
            fraction: keep int(n * fraction) samples, or all that are usable if these are fewer.
            temperature: of the softmax; 0.5 is the default of the authors' script.
            keep: of a cluster the samples farthest from its centroid ("hard", the paper's choice,
                after Sorscher et al., arXiv 2206.14486), the nearest ("easy"), or "random" ones.
            minimum: keep so many of each cluster that has more.
            neighbours: nearest other centroids whose mean distance is d_inter.
            seed: with keep="random".
            of: what n counts: the "pool", or what earlier stages have "left".
        """
        self.key, self.clustering = key, clustering
        self.rule = top_fraction(self, fraction, of)
        self.temperature = require_positive("temperature", temperature, owner=self)
        self.keep: Keep = require_choice("keep", keep, get_args(Keep), owner=self)
        self.minimum = require_int("minimum", minimum, minimum=0, owner=self)
        self.neighbours = require_int("neighbours", neighbours, minimum=1, owner=self)
        self.seed = require_int("seed", seed, minimum=0, owner=self)

    @property
    def requires(self) -> Requirements:
        return Requirements(features=(self.array_key,), files=self.clustering.files())

    def select(self, source: Source) -> Choice:
        centroids, clusters, products = assign_all(source, self.array_key, self.clustering)
        norms = centroids.norm(dim=1).clamp(min=torch.finfo().tiny).cpu().numpy()
        member = clusters >= 0
        cosines = np.zeros_like(products)
        cosines[member] = products[member] / norms[clusters[member]]
        complexity = centroid_distances(centroids, neighbours=self.neighbours) * mean_distances(
            clusters, cosines, len(centroids)
        )
        sizes = np.bincount(clusters[member], minlength=len(centroids))
        quotas = allocate(
            cluster_shares(complexity, self.temperature),
            sizes,
            min(self.rule.asked_samples(len(source), len(source.whole)), int(sizes.sum())),
            minimum=self.minimum,
            owner=self,
        )
        orders = {"hard": cosines, "easy": -cosines}
        order = orders.get(self.keep)
        if order is None:
            order = uniform_score(source.uids, self.seed)
        return Choice(multiplicities=keep_quotas(clusters, order, source.uids, quotas))
