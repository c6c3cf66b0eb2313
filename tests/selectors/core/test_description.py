"""What stands for a selector: everything that its answer depends on, and nothing else."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from siftclip.selectors.core.base import Choice, Requirements, Selector
from siftclip.selectors.core.description import Behind, describe, nested
from siftclip.selectors.core.source import FeatureFile
from siftclip.selectors.fitting.clusters import ClusterId, GivenCentroids, KMeans
from siftclip.selectors.methods.normsim import NormSim

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


class Reads(Selector):
    """Keeps less in a public attribute than its constructor was given."""

    def __init__(self, path: str = "", **more: Any) -> None:
        self.path = Path(path).name
        for name, value in more.items():
            setattr(self, name, value)

    def select(self, source: Any) -> Choice:
        raise NotImplementedError


class Wraps(Selector):
    """Has its members where no public attribute shows them."""

    __slots__ = ("shown",)

    def __init__(self, inner: Selector, shown: Selector) -> None:
        self._inner = inner
        self.shown = shown

    @property
    def requires(self) -> Requirements:
        return Requirements()

    def select(self, source: Any) -> Choice:
        raise NotImplementedError


def test_an_argument_counts_where_the_attribute_of_its_name_says_less() -> None:
    behind = Behind()
    first = describe(Reads("a/words.txt"), behind)
    assert first != describe(Reads("b/words.txt"))
    assert first["path"] == "words.txt"
    assert "a/words.txt" in behind.texts
    assert "arguments" not in describe(Reads("words.txt"))


def test_objects_that_pickle_knows_can_be_parameters() -> None:
    def described(**more: Any) -> Any:
        return json.loads(json.dumps(describe(Reads(**more)), allow_nan=False))

    assert described(pattern=re.compile("a+")) == described(pattern=re.compile("a+"))
    assert described(pattern=re.compile("a+")) != described(pattern=re.compile("a+", re.I))
    first, second = (np.random.default_rng(seed) for seed in (0, 1))
    assert described(generator=first) != described(generator=second)
    tables = [pd.DataFrame({"a": [1.0, last]}) for last in (2.0, 3.0)]
    assert described(table=tables[0]) != described(table=tables[1])
    assert described(log=logging.getLogger("a")) != described(log=logging.getLogger("b"))


def test_objects_that_contain_themselves_can_be_described() -> None:
    parent = Reads("a")
    parent.child = Reads("b")  # type: ignore[attr-defined]
    parent.child.parent = parent  # type: ignore[attr-defined]
    assert describe(parent)["child"]["parent"] == {"again": 0}


def test_members_are_seen_wherever_they_are_kept() -> None:
    inner, shown = Reads("a"), Reads("b")
    wraps = Wraps(inner, shown)
    assert list(nested(wraps, Selector)) == [wraps, shown, inner]  # type: ignore[type-abstract]  # mypy 4717
    assert describe(wraps) != describe(Wraps(Reads("c"), shown))
