"""Twins: whatever takes a fraction asks for int(n * fraction) samples, wherever it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from siftclip.selectors.core.base import FeatureFile
from siftclip.selectors.core.rules import DataCompFraction, TopFraction
from siftclip.selectors.core.sampling import HardCapSampling, SoftCapSampling, SoftmaxSampling
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.clipcov.clipcov import ClipCov
from siftclip.selectors.methods.concepts import ConceptBalance
from siftclip.selectors.methods.dynamics import DynamicClusterSampling
from siftclip.selectors.methods.external import External
from siftclip.selectors.methods.jest.jest import JEST
from siftclip.selectors.methods.jest.learnability import ModelFeatures
from siftclip.selectors.methods.nearest import NearestRank
from siftclip.selectors.methods.quota import QuotaPerCluster
from siftclip.selectors.methods.removal.optimal_design import AOptimal
from siftclip.selectors.methods.removal.vas_d import NormSimD, VasD
from siftclip.selectors.methods.uniform import Uniform

FILE = FeatureFile(path="t.npz")
MODEL = ModelFeatures(name="l14", logit_scale=10.0)
TWINS: dict[str, Callable[[float], Any]] = {
    "top": TopFraction,
    "softmax": lambda f: SoftmaxSampling(fraction=f, seed=0),
    "soft cap": lambda f: SoftCapSampling(fraction=f, seed=0),
    "hard cap": lambda f: HardCapSampling(fraction=f, seed=0),
    "uniform": lambda f: Uniform(seed=0, fraction=f),
    "clip score": lambda f: ClipScore(features="l14", fraction=f),
    "clip score, softmax": lambda f: ClipScore(
        features="l14", rule=SoftmaxSampling(fraction=f, seed=0)
    ),
    "clipcov": lambda f: ClipCov(features="b32", fraction=f, labels=FILE),
    "concepts": lambda f: ConceptBalance(path=None, column="concepts", fraction=f),
    "dynamics": lambda f: DynamicClusterSampling(path=None, column="c", seed=0, fraction=f),
    "quota": lambda f: QuotaPerCluster(
        selector=ClipScore(features="l14", fraction=1),
        clusters=External(path=None, column="c", fraction=1),
        fraction=f,
    ),
    "jest": lambda f: JEST(learner=MODEL, reference=None, loss="softmax", fraction=f),
    "nearest": lambda f: NearestRank(key="l14_img", target=FILE, neighbours=5, fraction=f),
    "vas_d": lambda f: VasD(features="l14", fraction=f, steps=2),
    "normsim_d": lambda f: NormSimD(features="l14", fraction=f, steps=2, seed=0),
    "a_optimal": lambda f: AOptimal(features="l14", fraction=f, steps=2),
}
# also where the product lies below the whole number: 100 * 0.29 = 28.999999999999996
ASKED = [(10, 0.3, 3), (100, 0.29, 28), (9, 0.5, 4), (3, 0.3, 0), (10, 0.37, 3), (8000, 0.3, 2400)]


@pytest.mark.parametrize(("samples", "fraction", "asked"), ASKED)
@pytest.mark.parametrize("name", TWINS)
def test_twins_ask_for_the_whole_part(name: str, samples: int, fraction: float, asked: int) -> None:
    assert TWINS[name](fraction).asked_samples(samples, samples) == asked


@pytest.mark.parametrize("name", [*TWINS, "datacomp"])
def test_the_whole_is_asked_for_by_1_alone(name: str) -> None:
    make = {**TWINS, "datacomp": DataCompFraction}[name]
    repeats = name in ("soft cap", "hard cap", "dynamics")  # and then leaves others out
    assert getattr(make(1), "keeps_all", False) is not repeats  # a rule need not say it
    assert not getattr(make(0.999), "keeps_all", False)


@pytest.mark.parametrize(("samples", "fraction", "asked"), ASKED)
def test_datacomps_filter_asks_for_one_more(samples: int, fraction: float, asked: int) -> None:
    assert DataCompFraction(fraction).asked_samples(samples, samples) == asked + 1


@pytest.mark.parametrize(("samples", "fraction", "asked"), ASKED)
@pytest.mark.parametrize("name", ["top", "softmax", "soft cap", "hard cap"])
def test_rules_keep_as_many_as_they_ask_for(
    name: str, samples: int, fraction: float, asked: int
) -> None:
    numbers = np.arange(samples, dtype=np.uint64)
    scores = np.random.default_rng(0).random(samples).astype(np.float32)
    rule = TWINS[name](fraction)
    assert rule(scores, np.stack([numbers, numbers], axis=1), samples).sum() == asked
