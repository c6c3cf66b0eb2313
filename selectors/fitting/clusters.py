"""Clusters of samples, for the selectors that work within them or with quotas of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import (
    InputError,
    ParameterError,
    require_int,
    require_int_or_auto,
)
from siftclip.ranks import sum_arrays
from siftclip.selectors.core.base import (
    Chunk,
    FeatureFile,
    Requirements,
    RuleOptions,
    ScoreSelector,
    Source,
)
from siftclip.selectors.core.source import Cache
from siftclip.selectors.fitting.kmeans import assign, fit_kmeans
from siftclip.selectors.kernels.blocks import joined

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MOST_CLUSTERS = 0.2  # of the samples: with more, most are alone or nearly


class Clustering(Protocol):
    """Where centroids come from."""

    def files(self) -> tuple[FeatureFile, ...]:
        """Return the feature files that are read."""

    def centroids(self, source: Source, key: str) -> Tensor:
        """Find the centroids of the features `key`, float32 [k, d]."""


class KMeans:
    """Centroids of the samples that are selected from.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import ClusterId, KMeans
        >>> images = np.repeat(np.eye(2, dtype=np.float32), 8, axis=0)
        >>> clusters = ClusterId(key="l14_img", clustering=KMeans(clusters=2, seed=0), fraction=1)
        >>> clusters.scores({"l14_img": images})
        array([1., 1., 1., 1., 1., 1., 1., 1., 0., 0., 0., 0., 0., 0., 0., 0.],
              dtype=float32)
    """

    def __init__(
        self,
        *,
        clusters: int | str,
        seed: int,
        iterations: int = 20,
        sample: int | None = None,
        spherical: bool = True,
        samples_per_cluster: int | None = None,
        most_clusters: int | None = None,
    ) -> None:
        """Set the parameters of `fit_kmeans`.

        Args:
            clusters: how many, or "auto": as many as leave each `samples_per_cluster` on average.
            seed: see there, as the others.
            iterations: at most so many.
            sample: cluster so many samples only.
            spherical: whether centroids are scaled to unit norm.
            samples_per_cluster: with "auto": on average; there is at least one cluster, ...
            most_clusters: ... and at most so many, if given.
        """
        self.clusters = require_int_or_auto("clusters", clusters, owner=self)
        self.samples_per_cluster = None
        if samples_per_cluster is not None:
            self.samples_per_cluster = require_int(
                "samples_per_cluster", samples_per_cluster, minimum=1, owner=self
            )
        self.most_clusters = None
        if most_clusters is not None:
            self.most_clusters = require_int("most_clusters", most_clusters, minimum=1, owner=self)
        if clusters == "auto" and samples_per_cluster is None:
            raise ParameterError(
                "must be given where clusters is auto, such as 8800 for SemDeDup",
                owner=self,
                parameter="samples_per_cluster",
                value=None,
                got="null",
            )
        self.seed = require_int("seed", seed, minimum=0, owner=self)
        self.iterations = require_int("iterations", iterations, minimum=0, owner=self)
        self.spherical = spherical
        self.sample = None
        if sample is not None:
            fewest = self.clusters if isinstance(self.clusters, int) else 1
            self.sample = require_int("sample", sample, minimum=fewest, owner=self)

    def count(self, samples: int) -> int:
        """Return the number of clusters for a number of samples."""
        if isinstance(self.clusters, int):
            return self.clusters
        scaled = max(1, round(samples / (self.samples_per_cluster or 1)))
        return scaled if self.most_clusters is None else min(scaled, self.most_clusters)

    def files(self) -> tuple[FeatureFile, ...]:
        return ()

    def centroids(self, source: Source, key: str) -> Tensor:
        clusters = self.count(len(source))
        if self.sample is not None and self.sample < clusters:
            raise ParameterError(
                f"must be at least the number of clusters, {clusters} of {len(source)} samples",
                owner=self,
                parameter="sample",
                value=self.sample,
            )
        if clusters > _MOST_CLUSTERS * len(source) > 0:
            source.warn(
                f"KMeans: clusters={clusters} leaves {len(source)} samples mostly alone in their "
                "clusters, where nothing is like them. Let clusters be auto and set "
                "samples_per_cluster, or take far fewer"
            )
        return fit_kmeans(
            source,
            key,
            clusters=clusters,
            seed=self.seed,
            iterations=self.iterations,
            sample=self.sample,
            spherical=self.spherical,
            cache=_cache(source, key, self),
        )


class GivenCentroids:
    """Centroids from a file, such as those that DataComp publishes for its scales."""

    def __init__(self, *, file: FeatureFile) -> None:
        """Set the file, float [k, d]."""
        self.file = file

    def files(self) -> tuple[FeatureFile, ...]:
        return (self.file,)

    def centroids(self, source: Source, key: str) -> Tensor:
        centroids = joined(piece.float() for piece in source.file(self.file))
        if not len(centroids) or not bool(centroids.isfinite().all()):
            raise InputError(
                f"The centroids in {self.file.path} must be finite numbers, in one row or more. "
                f"Got {len(centroids)} rows."
            )
        return centroids


@torch.no_grad()
def assign_all(
    source: Source, key: str, clustering: Clustering
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Find the centroids, and the cluster of every sample of a source, on every rank.

    Returns:
        centroids float32 [k, d]; clusters int32 [n], -1 for samples that are not usable; inner
        products with the own centroid float32 [n], 0 where there is none.
    """
    requires = Requirements(features=(key,), files=clustering.files())
    cache, tasks = _cache(source, key, clustering), source.tasks(requires, label="assigned-")
    centroids = clustering.centroids(source, key)
    clusters = np.zeros(len(source), dtype=np.int32)  # plus one, so that ranks can add them
    products = np.zeros(len(source), dtype=np.float32)
    mine = source.mine(tasks)
    with source.bar(sum(len(task.rows) for task in mine), "clusters") as bar:
        for task in mine:
            kept = cache.get(task.name)
            if kept is None:
                pieces = [_assign_chunk(c, centroids) for c in source.chunks(task.rows, requires)]
                kept = {
                    "clusters": np.concatenate([piece[0] for piece in pieces]),
                    "products": np.concatenate([piece[1] for piece in pieces]),
                }
                cache.put(task.name, **kept)
            at = source.index_of(task.rows)
            clusters[at], products[at] = kept["clusters"] + 1, kept["products"]
            bar.update(len(task.rows))
    clusters, products = sum_arrays(source.ranks, clusters), sum_arrays(source.ranks, products)
    return centroids, clusters - 1, products


def _assign_chunk(chunk: Chunk, centroids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Find clusters int32 [n] and inner products float32 [n] of a chunk; -1 and 0 if not usable."""
    (features,) = chunk.features.values()
    usable = chunk.usable()
    clusters = torch.full((len(chunk),), -1, dtype=torch.int32, device=features.device)
    products = torch.zeros(len(chunk), device=features.device)
    index, products[usable] = assign(features[usable], centroids)
    clusters[usable] = index.to(torch.int32)
    return clusters.cpu().numpy(), products.cpu().numpy()


class ClusterId(ScoreSelector):
    """The number of each sample's cluster as its score, for rules that keep a quota of each.

    Example:
        >>> import torch
        >>> from siftclip.selectors import ClusterId, FeatureFile, GivenCentroids
        >>> file = FeatureFile(path="centroids.npy")
        >>> clusters = ClusterId(key="l14_img", clustering=GivenCentroids(file=file), fraction=1)
        >>> images = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
        >>> clusters.scores({"l14_img": images}, files={file: torch.eye(2)})
        array([1., 0.], dtype=float32)
    """

    def __init__(self, *, key: str, clustering: Clustering, **rule: Unpack[RuleOptions]) -> None:
        """Choose the features and the clusters.

        Args:
            key: of the features, such as `l14_img`.
            clustering: `KMeans` or `GivenCentroids`, of at most 2**24 clusters, up to which float32
                holds all whole numbers.
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.key, self.clustering = key, clustering

    @property
    def requires(self) -> Requirements:
        return Requirements(features=(self.key,), files=self.clustering.files())

    def fit(self, source: Source) -> None:
        self._centroids = self.clustering.centroids(source, self.key)

    def score(self, chunk: Chunk) -> Tensor:
        return assign(chunk.features[self.key], self._centroids)[0].float()


def _cache(source: Source, key: str, clustering: Clustering) -> Cache:
    """Return what is known of these clusters, whichever selector needs them."""
    return source.cache(ClusterId(key=key, clustering=clustering, fraction=1))
