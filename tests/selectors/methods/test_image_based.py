"""DataComp's image-based filter against a loop and against the released code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from siftclip.errors import InputError
from siftclip.selectors.core.base import FeatureFile
from siftclip.selectors.core.checks import synthetic_chunk
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Requirements
from siftclip.selectors.fitting.clusters import GivenCentroids, KMeans
from siftclip.selectors.fitting.kmeans import assign
from siftclip.selectors.methods.image_based import ImageBased, occupied_clusters

TARGET, CENTROIDS = FeatureFile(path="target.npy"), FeatureFile(path="centroids.npy")
REQUIRES = Requirements(features=("l14_img",))


def test_occupied_clusters() -> None:
    assert occupied_clusters(torch.tensor([2, 2, -1]), count=4).tolist() == [0, 0, 1, 0]
    assert occupied_clusters(torch.tensor([], dtype=torch.int64), count=2).tolist() == [0, 0]


def test_equals_a_loop_on_every_rank(run_on_ranks: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    chunk = synthetic_chunk(REQUIRES)
    features = chunk.features["l14_img"]
    features[3] = torch.nan
    features[4] = 0
    centroids = torch.randn(40, 16, generator=generator)
    target = torch.randn(25, 16, generator=generator).half()
    target[0] = torch.nan
    target[1] = 0
    occupied = {int((centroids.double() @ row.double()).argmax()) for row in target[2:]}
    expected = [int((centroids.double() @ row.double()).argmax()) in occupied for row in features]
    expected[3] = expected[4] = False
    assert 0 < sum(expected) < 255
    files = {TARGET: target, CENTROIDS: centroids}

    def run(ranks: Any) -> Any:
        source = MemorySource(chunk, files=files, part_samples=30, chunk_samples=4, ranks=ranks)
        clustering = GivenCentroids(file=CENTROIDS)
        return ImageBased(features="l14", target=TARGET, clustering=clustering).select(source)

    for size in (1, 2, 4):
        for choice in run_on_ranks(size, run):
            assert choice.multiplicities.tolist() == [int(kept) for kept in expected]
            assert np.isnan(choice.scores[[3, 4]]).all()


def test_clusters_of_the_pool_itself() -> None:
    chunk = synthetic_chunk(REQUIRES)
    files = {TARGET: chunk.features["l14_img"][:1]}
    source = MemorySource(chunk, files=files)
    clustering = KMeans(clusters=30, seed=0, spherical=False)
    choice = ImageBased(features="l14", target=TARGET, clustering=clustering).select(source)
    clusters, _ = assign(chunk.features["l14_img"], clustering.centroids(source, "l14_img"))
    assert choice.multiplicities.tolist() == (clusters == clusters[0]).long().tolist()


def test_a_pool_without_usable_samples() -> None:
    chunk = synthetic_chunk(REQUIRES, samples=5)
    chunk.features["l14_img"][:] = 0
    source = MemorySource(chunk, files={TARGET: torch.randn(3, 16)})
    clustering = KMeans(clusters=2, seed=0)
    choice = ImageBased(features="l14", target=TARGET, clustering=clustering).select(source)
    assert choice.multiplicities.sum() == 0


@pytest.mark.parametrize(
    ("target", "centroids", "message"),
    [
        (torch.zeros(3, 16), torch.ones(2, 16), r"ImageBased: target\.npy has no rows that are"),
        (torch.ones(3, 8), torch.ones(2, 16), "features have 8 components, and those of the cent"),
        (torch.ones(3, 16), torch.ones(0, 16), r"centroids\.npy must be finite numbers, in one"),
        (torch.ones(3, 16), torch.full((2, 16), torch.nan), r"centroids\.npy must be finite"),
    ],
)
def test_faults_of_files(target: torch.Tensor, centroids: torch.Tensor, message: str) -> None:
    source = MemorySource(synthetic_chunk(REQUIRES), files={TARGET: target, CENTROIDS: centroids})
    clustering = GivenCentroids(file=CENTROIDS)
    with pytest.raises(InputError, match=message):
        ImageBased(features="l14", target=TARGET, clustering=clustering).select(source)


@pytest.mark.testbed
def test_agrees_with_the_released_code(
    reference: Any, reference_source: Any, conformance: Any
) -> None:
    inputs, expected = reference("inputs_l14"), reference("imagebased_l14")
    centroids = torch.from_numpy(expected["centroids"])
    for name, features in (("pool_ids", "img"), ("tgt_ids", "tgt_img")):
        ids, _ = assign(torch.from_numpy(inputs[features]), centroids)
        assert ids.tolist() == expected[name].tolist()
    source = reference_source(inputs, "l14", part_samples=3000)
    source._files = {TARGET: torch.from_numpy(inputs["tgt_img"]), CENTROIDS: centroids}
    selector = ImageBased(features="l14", target=TARGET, clustering=GivenCentroids(file=CENTROIDS))
    choice = selector.select(source)
    assert np.flatnonzero(selector._occupied).tolist() == expected["kept_clusters"].tolist()
    conformance(
        "image-based l14, centroids given",
        kept=np.flatnonzero(choice.multiplicities),
        expected_kept=expected["rows_image_based"],
    )
