"""DataComp's image-based filter: samples in the clusters that a target data set occupies.

Gadre et al., arXiv 2304.14108, section 4 and appendix: cluster the pool's image features, and keep
the samples whose cluster is the nearest of at least one image of a target, ImageNet-1k's training
set there. The release (`baselines/apply_filter.py`) joins this with a filter of captions (English,
more than one word, more than five characters), which is a selector of its own here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.selectors.core.base import Chunk, FeatureFile, Requirements, ScoreSelector, Source
from siftclip.selectors.core.source import IMAGE, ReadsFeatures
from siftclip.selectors.fitting.clusters import Clustering
from siftclip.selectors.fitting.kmeans import assign
from siftclip.selectors.kernels.blocks import usable_rows


def occupied_clusters(clusters: Tensor, *, count: int) -> Tensor:
    """Find the clusters that have a member: bool [count].

    Args:
        clusters: int64 [m], of a target's images; negative for those that are not usable.
        count: of all clusters.
    """
    occupied = torch.zeros(count, dtype=torch.bool, device=clusters.device)
    occupied[clusters[clusters >= 0]] = True
    return occupied


class ImageBased(ReadsFeatures, ScoreSelector):
    """Keep the samples whose image is in a cluster with an image of the target.

    The score is 1 for them and 0 for the others. As in the release, a vector belongs to the
    centroid with the largest inner product. It uses plain k-means, 20 iterations, 100,000 clusters
    of L/14 features and 100 % / 30 % / 3 % of the samples at scale small / medium / large.
    """

    def __init__(
        self, *, features: str | None = None, target: FeatureFile, clustering: Clustering
    ) -> None:
        """Choose features, target and clusters.

        Args:
            features: name of a feature set, such as `l14` for the key `l14_img`; None: the one
                that it is used with.
            target: features of the target's images, by the same model.
            clustering: `KMeans`, with `spherical=False` as in the release, or `GivenCentroids`.
        """
        super().__init__(threshold=1.0)
        self.features, self.target, self.clustering = features, target, clustering

    @property
    def requires(self) -> Requirements:
        files = (self.target, *self.clustering.files())
        return Requirements(features=self.feature_keys(IMAGE), files=files)

    def fit(self, source: Source) -> None:
        centroids = self.clustering.centroids(source, *self.feature_keys(IMAGE))
        usable_targets = 0
        occupied = torch.zeros(len(centroids), dtype=torch.bool, device=source.device)
        for number, piece in enumerate(source.file(self.target)):
            if number % source.ranks.size == source.ranks.rank:
                usable = piece[usable_rows(piece)]
                usable_targets += len(usable)
                clusters, _ = assign(usable, centroids)
                occupied |= occupied_clusters(clusters, count=len(centroids))
        self._centroids = centroids
        if not int(source.ranks.sum(torch.tensor(usable_targets))):
            raise InputError(
                f"ImageBased: {self.target.path} has no rows that are finite and not 0."
            )
        self._occupied = source.ranks.sum(occupied.to(torch.int32)) > 0

    def score(self, chunk: Chunk) -> Tensor:
        (key,) = self.requires.features
        clusters, _ = assign(chunk.features[key], self._centroids)
        if not len(self._occupied):
            return torch.zeros(len(chunk))  # no sample is usable
        return self._occupied[clusters].float()  # [-1] of those that are not usable is not read
