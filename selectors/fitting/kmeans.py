"""k-means out of core: clusters of the pool for the selectors that need them.

Lloyd's iterations stream the samples and share them among the ranks. Sums over clusters are whole
numbers, so that the centroids are the same bits for every number of ranks and every order.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.hashing import uniform_score
from siftclip.purposes import HashPurpose
from siftclip.ranks import sum_arrays
from siftclip.selectors.core.base import Chunk, Requirements, Source
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import Cache, DictCache
from siftclip.selectors.kernels.blocks import joined, require_same_width
from siftclip.selectors.kernels.most_similar import most_similar

UNIT = 2.0**-24  # of the sums; float16 numbers are multiples of it, so that their sums are exact
LARGEST = 1024.0  # component of a vector; 2**29 samples cannot overflow the sums


def assign(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the centroid with the largest inner product, and that product, for each vector.

    DataComp's `image_based` filter (arXiv 2304.14108) assigns so, with centroids that are not
    normalised. Never holds n x k products.

    Args:
        features: float [n, d].
        centroids: float [k, d].

    Returns:
        indices int64 [n], of equal products the smaller, and products float32 [n]; -1 and -inf for
        vectors with a component that is not finite.

    Raises:
        InputError: the two have different numbers of components.
    """
    require_same_width("the features", features, "the centroids", centroids)
    return most_similar(features, centroids)


def fit_kmeans(
    source: Source,
    key: str,
    *,
    clusters: int,
    seed: int,
    iterations: int = 20,
    sample: int | None = None,
    spherical: bool = True,
    cache: Cache | None = None,
) -> Tensor:
    """Find the centroids, float32 [k, d], of the samples by Lloyd's algorithm.

    The first centroids are samples chosen by a hash of (seed, uid), as faiss draws them at random.
    A cluster that gets no sample takes over half of the largest one: both are its centroid,
    slightly moved apart, as in faiss. The iterations end early once no centroid changes. Memory:
    16 k d bytes beside a chunk.

    Args:
        source: the samples.
        key: of their features, such as `l14_img`. Components are at most 1024 in absolute value.
        clusters: how many, k. With fewer samples that are usable, each of these is a centroid.
        seed: of the first centroids, and of the sample.
        iterations: at most so many.
        sample: cluster so many samples only, chosen by the same hash; None: all. faiss takes
            256 per cluster, DataComp all at its scale small.
        spherical: centroids are the means scaled to unit norm, and a vector belongs to the one with
            the largest inner product; else they are plain means and the nearest one is meant.
        cache: keeps the last iteration for these very arguments, at which a killed run continues.
    """
    cache, requires = cache or DictCache(), Requirements(features=(key,))
    # One rank looks and tells the others, so that all begin at the same iteration.
    kept = cache.get("centroids") if source.ranks.rank == 0 else None
    shape = (0, 0, 0) if kept is None else (int(kept["iterations"]), *kept["centroids"].shape)
    begin, rows, dim = source.ranks.sum(torch.tensor(shape)).tolist()
    if begin:
        start = np.zeros((rows, dim), np.float32) if kept is None else kept["centroids"]
        centroids = torch.from_numpy(sum_arrays(source.ranks, start)).to(source.device)
    else:
        centroids = _first_centroids(source, requires, clusters, seed, spherical=spherical)
    samples = source
    if sample is not None:
        samples = source.restrict(_hashed_rows(source, requires, seed, sample))
    tasks = samples.mine(samples.tasks(requires))
    left = range(begin, iterations) if len(centroids) else range(0)
    with source.bar(len(left) * sum(len(task.rows) for task in tasks), "k-means") as bar:
        for iteration in left:
            sums = torch.zeros_like(centroids, dtype=torch.int64)
            counts = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
            bias = None if spherical else -0.5 * centroids.double().square().sum(1)
            for task in tasks:
                for chunk in samples.chunks(task.rows, requires):
                    add_to_clusters(chunk, centroids, bias, sums, counts)
                    bar.update(len(chunk))
            new = move_centroids(
                centroids, samples.ranks.sum(sums), samples.ranks.sum(counts), spherical=spherical
            )
            done = bool(torch.equal(new, centroids))
            centroids = new
            if source.ranks.rank == 0:
                last = iterations if done else iteration + 1
                cache.put("centroids", centroids=centroids.cpu().numpy(), iterations=np.array(last))
            if done:
                break
    return centroids


def add_to_clusters(
    chunk: Chunk, centroids: Tensor, bias: Tensor | None, sums: Tensor, counts: Tensor
) -> None:
    """Add the usable samples of a chunk to the sums and counts of their clusters, in place.

    Args:
        chunk: samples with one feature key.
        centroids: float32 [k, d].
        bias: float64 [k] of the inner products, or None.
        sums: int64 [k, d], in units of `UNIT`.
        counts: int64 [k].
    """
    (features,) = chunk.features.values()
    values = features[chunk.usable()].float()
    index, _ = most_similar(values, centroids, bias=bias)
    sums.index_add_(0, index, whole_numbers(values))
    counts += torch.bincount(index, minlength=len(counts))


def whole_numbers(features: Tensor) -> Tensor:
    """Round features to units of `UNIT`, to be added exactly: float [n, d] -> int64 [n, d].

    Raises:
        InputError: a component is too large for a sum over any pool.
    """
    if len(features) and float(features.abs().max()) > LARGEST:
        raise InputError(
            f"Sums of features need components of at most {LARGEST:g} in absolute value. "
            f"Got {float(features.abs().max()):g}; scale them to unit norm."
        )
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return (wide * (1 / UNIT)).round_().to(torch.int64)  # a power of two: nothing is lost before


def move_centroids(old: Tensor, sums: Tensor, counts: Tensor, *, spherical: bool) -> Tensor:
    """Compute the means of the clusters, scaled to unit norm if `spherical`: float32 [k, d].

    A cluster without samples and the largest one (of equal ones the first) become two copies of the
    latter's mean, of which alternate components are scaled by 1 +- 1/1024, and share its samples
    for the next such choice: faiss' rule, but for its random choice of the cluster to split. A mean
    of zero, which has no direction, leaves a spherical centroid where it is.

    Args:
        old: float32 [k, d].
        sums: int64 [k, d], in units of `UNIT`.
        counts: int64 [k].
        spherical: whether to scale.
    """
    means = sums.double() * UNIT / counts.clamp(min=1)[:, None]
    if spherical:
        norms = means.norm(dim=1, keepdim=True)
        means = torch.where(norms > 0, means / norms.clamp(min=torch.finfo().tiny), old.double())
    empty = torch.nonzero(counts == 0)[:, 0].tolist()
    sizes = [(-size, number) for number, size in enumerate(counts.tolist()) if size > 1]
    heapq.heapify(sizes)
    means[empty] = old.double()[empty]  # those that no cluster is large enough to share with
    step = torch.where(torch.arange(means.shape[1], device=means.device) % 2 == 0, 1.0, -1.0) / 1024
    for number in empty:
        if not sizes:
            break
        size, largest = heapq.heappop(sizes)
        means[number] = means[largest] * (1 + step)
        means[largest] = means[largest] * (1 - step)
        for share, cluster in ((-size) // 2, number), ((-size + 1) // 2, largest):
            if share > 1:
                heapq.heappush(sizes, (-share, cluster))
    if spherical and empty:
        means = means / means.norm(dim=1, keepdim=True).clamp(min=torch.finfo().tiny)
    return means.float()


def _hashed_rows(source: Source, requires: Requirements, seed: int, count: int) -> np.ndarray:
    """Choose the `count` samples with features whose hash is smallest: int64, ascending."""
    parts = source.parts(requires)
    rows = np.sort(np.concatenate([part.rows for part in parts] or [np.empty(0, np.int64)]))
    uids = source.uids[source.index_of(rows)]
    return rows[keep_top(-uniform_score(uids, seed ^ HashPurpose.KMEANS), uids, count) > 0]


def _first_centroids(
    source: Source, requires: Requirements, clusters: int, seed: int, *, spherical: bool
) -> Tensor:
    """Read the usable samples with the smallest hashes, ordered by uid: float32 [k, d]."""
    (key,), count = requires.features, clusters
    while True:
        rows = _hashed_rows(source, requires, seed, count)
        uids = source.uids[source.index_of(rows)]
        rows = rows[
            np.lexsort((uids[:, 1], uids[:, 0], uniform_score(uids, seed ^ HashPurpose.KMEANS)))
        ]
        pieces = [
            chunk.features[key][chunk.usable()].float() for chunk in source.chunks(rows, requires)
        ]
        usable = joined(pieces).to(source.device)
        if len(usable) >= clusters or len(rows) < count:
            break
        count *= 2
    usable = usable[:clusters]
    return usable / usable.norm(dim=1, keepdim=True) if spherical else usable
