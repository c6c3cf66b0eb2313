"""What stands for a selector: everything that its answer depends on, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.selectors.clusters import ClusterId, GivenCentroids, KMeans
from siftclip.selectors.description import describe
from siftclip.selectors.normsim import NormSim
from siftclip.selectors.source import FeatureFile

TARGET = FeatureFile(path="target.npz")


def test_infinity_can_be_written_as_json() -> None:
    described = describe(NormSim(features="l14", target=TARGET, p="inf", fraction=0.3))  # type: ignore[arg-type]
    assert json.loads(json.dumps(described, allow_nan=False))["p"] == "inf"
    assert describe([math.nan, -math.inf, 0.5]) == ["nan", "-inf", 0.5]


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (Path("/data/list.txt"), "/data/list.txt"),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (math.floor, None),
        (lambda scores: scores, None),
        (describe, "siftclip.selectors.description.describe"),
        (KMeans, "siftclip.selectors.clusters.KMeans"),
    ],
)
def test_values_that_are_no_json(value: Any, described: Any) -> None:
    if described is None:
        with pytest.raises(TypeError, match="cannot be a parameter of a selector"):
            describe(value)
    else:
        assert describe(value) == described
        assert type(describe(value)) is type(described)


def test_members_are_described() -> None:
    def clusters(clustering: Any) -> Any:
        return describe(ClusterId(key="l14_img", clustering=clustering, fraction=1))

    one, other = (KMeans(clusters=5, seed=seed) for seed in (0, 1))
    assert clusters(one) != clusters(other)
    assert clusters(one) == clusters(KMeans(clusters=5, seed=0))
    first, second = (GivenCentroids(file=FeatureFile(path=path)) for path in ("a.npy", "b.npy"))
    assert clusters(first) != clusters(second)
