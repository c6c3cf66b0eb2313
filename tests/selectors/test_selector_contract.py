"""Every built-in selector keeps the public contract."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

import siftclip.selectors
from siftclip.errors import InputError, ParameterError, name_of, parameters_of
from siftclip.selectors.core.base import Requirements, ScoreSelector, Selector
from siftclip.selectors.core.checks import (
    CHECKS,
    GIVEN,
    SelectorFactory,
    check_selector,
    synthetic_chunk,
    synthetic_files,
)
from siftclip.selectors.core.compose import And, Minus, Mix, Or, RankSum, Then
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import DataCompFraction, TopCount
from siftclip.selectors.core.sampling import HardCapSampling, SoftCapSampling, SoftmaxSampling
from siftclip.selectors.core.source import FeatureFile, set_name
from siftclip.selectors.fitting.clusters import ClusterId, GivenCentroids, KMeans
from siftclip.selectors.methods.captions.datacomp_filters import (
    BasicFilter,
    CaptionFilter,
    HasEntity,
    IsLanguage,
)
from siftclip.selectors.methods.captions.metaclip import MetaClip
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.clipcov.clipcov import ClipCov
from siftclip.selectors.methods.concepts import ConceptBalance
from siftclip.selectors.methods.density import DensityPruning
from siftclip.selectors.methods.dynamics import DynamicClusterSampling
from siftclip.selectors.methods.external import External
from siftclip.selectors.methods.image_based import ImageBased
from siftclip.selectors.methods.infobatch import InfoBatch
from siftclip.selectors.methods.jest.jest import JEST
from siftclip.selectors.methods.jest.learnability import Learnability, ModelFeatures
from siftclip.selectors.methods.nearest import NearestRank, NearestUnion
from siftclip.selectors.methods.negcliploss.negcliploss import NegCLIPLoss
from siftclip.selectors.methods.normsim import NormSim
from siftclip.selectors.methods.quota import QuotaPerCluster
from siftclip.selectors.methods.removal.optimal_design import AOptimal, VOptimal
from siftclip.selectors.methods.removal.vas_d import NormSimD, VasD
from siftclip.selectors.methods.running_covariance import RunningVas
from siftclip.selectors.methods.semdedup import SemDeDup
from siftclip.selectors.methods.uniform import Uniform
from siftclip.selectors.methods.vas import Vas

TARGET = FeatureFile(path="target.npz", key="l14_img")
CENTROIDS = GivenCentroids(file=FeatureFile(path="centroids.npy"))
NAMES = FeatureFile(path="names.npz")


class FirstLetter:
    """Takes captions with some first letters for English."""

    def __call__(self, captions: Sequence[str]) -> list[str | None]:
        return ["en" if caption[:1] in "rsb" else "de" for caption in captions]


class Length:
    """Knows words by their length."""

    def __call__(self, word: str) -> int | None:
        return len(word)


def clip(**rule: Any) -> ScoreSelector:
    return ClipScore(features="l14", **rule)


BUILT_IN: dict[str, SelectorFactory] = {
    "uniform": lambda: Uniform(seed=5, fraction=0.3),
    "uniform, threshold": lambda: Uniform(seed=5, threshold=0.5),
    "clip_score": lambda: clip(fraction=0.3),
    "clip_score, threshold": lambda: ClipScore(features="b32", threshold=0.0),
    "external parquet": lambda: External(path="a.parquet", column="dfn", fraction=0.3),
    "external subset": lambda: External(path="a.npy"),
    "negcliploss": lambda: NegCLIPLoss(features="l14", batch_size=64, passes=2, fraction=0.3),
    "negcliploss, float32": lambda: NegCLIPLoss(
        features="l14", batch_size=64, passes=2, precision="float32", fraction=0.3
    ),
    "negcliploss, global, threshold": lambda: NegCLIPLoss(
        features="l14", batch_size=64, passes=2, partition="global", threshold=-0.3
    ),
    "vas": lambda: Vas(features="l14", target=TARGET, fraction=0.3),
    "vas, cross, pool": lambda: Vas(features="l14", modality="cross", target="pool", fraction=0.3),
    "normsim2": lambda: NormSim(features="l14", target=TARGET, p=2, fraction=0.3),
    "normsim3": lambda: NormSim(features="l14", target=TARGET, p=3, fraction=0.3),
    "normsim_inf": lambda: NormSim(features="l14", target=TARGET, p=float("inf"), fraction=0.3),
    "vas_d": lambda: VasD(features="l14", fraction=0.3, steps=5),
    "normsim_d": lambda: NormSimD(features="l14", fraction=0.3, steps=5, seed=1),
    "a_optimal": lambda: AOptimal(features="l14", fraction=0.3, steps=5),
    "v_optimal": lambda: VOptimal(features="l14", target=TARGET, fraction=0.3, steps=5),
    "clipcov": lambda: ClipCov(features="b32", fraction=0.3, labels=NAMES),
    "clipcov, fresh": lambda: ClipCov(
        features="b32", fraction=0.3, labels=NAMES, interval=1, charge="once"
    ),
    "clipcov, clusters": lambda: ClipCov(
        features="b32",
        fraction=0.3,
        clustering=KMeans(clusters=6, seed=0, iterations=2),
        label_weight=0.0,
    ),
    "cluster_id": lambda: ClusterId(
        key="l14_img", clustering=KMeans(clusters=8, seed=0, iterations=3), threshold=3.0
    ),
    "image_based": lambda: ImageBased(features="l14", target=TARGET, clustering=CENTROIDS),
    "semdedup": lambda: SemDeDup(
        key="l14_img", clustering=KMeans(clusters=8, seed=0, iterations=3), eps=0.4
    ),
    "semdedup, fraction": lambda: SemDeDup(
        key="l14_img", clustering=CENTROIDS, fraction=0.3, keep="random", seed=3
    ),
    "semdedup, best": lambda: SemDeDup(
        key="b32_img", clustering=CENTROIDS, eps=0.4, keep="best", prefer=clip(fraction=1)
    ),
    "density": lambda: DensityPruning(key="l14_img", clustering=CENTROIDS, fraction=0.3),
    "nearest_rank": lambda: NearestRank(key="l14_img", target=TARGET, neighbours=5, fraction=0.3),
    "nearest_union": lambda: NearestUnion(key="l14_img", target=TARGET, fraction=0.3),
    "then": lambda: Then(stages=[clip(fraction=0.5), Uniform(seed=3, fraction=0.3)]),
    "and": lambda: And(selectors=[Uniform(seed=1, fraction=0.6), Uniform(seed=2, fraction=0.6)]),
    "or": lambda: Or(selectors=[Uniform(seed=1, fraction=0.2), External(path="a.npy")]),
    "minus": lambda: Minus(keep=clip(fraction=0.5), remove=Uniform(seed=2, fraction=0.2)),
    "rank_sum": lambda: RankSum(
        selectors=[clip(fraction=1), Uniform(seed=3, fraction=1)], rule=DataCompFraction(0.2)
    ),
    "mix": lambda: Mix(
        selectors=[clip(fraction=1), Uniform(seed=3, fraction=1)], weights=[0.7, 0.3], fraction=0.2
    ),
    "quota": lambda: QuotaPerCluster(
        selector=clip(fraction=1),
        clusters=External(path=None, column="cluster", fraction=1),
        fraction=0.3,
    ),
    "basic": BasicFilter,
    "caption": CaptionFilter,
    "language": lambda: IsLanguage(identifier=FirstLetter()),
    "soft_cap": lambda: clip(rule=SoftCapSampling(fraction=1.0, batch_samples=16, seed=1)),
    "softmax": lambda: clip(rule=SoftmaxSampling(fraction=0.3, seed=1)),
    "hard_cap": lambda: clip(rule=HardCapSampling(fraction=1.0, seed=1)),
    "jest": lambda: JEST(learner=L14, reference=B32, loss="sigmoid", fraction=0.3),
    "jest, softmax": lambda: JEST(learner=L14, reference=B32, loss="softmax", fraction=0.3),
    "learnability": lambda: Learnability(learner=L14, reference=B32, fraction=0.3),
    "learnability, sigmoid": lambda: Learnability(
        learner=L14, reference=B32, loss="sigmoid", fraction=0.3
    ),
    "hard": lambda: Learnability(learner=L14, reference=None, fraction=0.3),
    "easy_reference": lambda: Learnability(learner=None, reference=B32, loss="pair", fraction=0.3),
    "dynamics": lambda: DynamicClusterSampling(path=None, column="cluster", seed=1, fraction=0.3),
    "running_vas": lambda: RunningVas(key="l14_img", fraction=0.3),
    "cabs": lambda: ConceptBalance(path=None, column="concepts", fraction=0.3),
    "cabs, frequency": lambda: ConceptBalance(
        path=None, column="concepts", fraction=0.3, mode="frequency"
    ),
}
# Biases at which the sums over negatives are about 1, so that float32 rounding stays below 1e-5.
L14 = ModelFeatures(name="l14", logit_scale=10.0, logit_bias=-6.0)
B32 = ModelFeatures(name="b32", logit_scale=7.0, logit_bias=-5.0)
# What selectors are given, that none of the above is given when it is built.
PARTS: list[Callable[[], object]] = [
    lambda: ModelFeatures(name="l14", logit_scale=10.0, logit_bias=-6.0),
    lambda: TopCount(3),
]
IN_TRAINING = ("infobatch",)  # what it reads, no pool has before
OF_FILES = ("entity", "metaclip")  # which are opened when they are built


@pytest.fixture(scope="session")
def factories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SelectorFactory]:
    """All factories, with those whose selectors are built from a file."""
    folder = tmp_path_factory.mktemp("lists")
    (folder / "synsets.txt").write_text("n00000004\n")
    (folder / "entries.json").write_text('["red", "seven", "blue ground", "a"]')
    return {
        **BUILT_IN,
        "entity": lambda: HasEntity(lexicon=Length(), entities=str(folder / "synsets.txt")),
        "metaclip": lambda: MetaClip(entries=str(folder / "entries.json"), t=20, seed=1),
        "infobatch": lambda: InfoBatch(seed=1),
    }


@pytest.mark.parametrize("name", [*BUILT_IN, *OF_FILES, *IN_TRAINING])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_built_in_selector_passes(
    check: Callable[[SelectorFactory], None], name: str, factories: dict[str, SelectorFactory]
) -> None:
    check(factories[name])


def of_two_models(requires: Requirements) -> Iterator[MemorySource]:
    """Sources in which a file, or one of the arrays of a feature set, is of another model."""
    chunk, files = synthetic_chunk(requires), synthetic_files(requires)
    for file, values in files.items():
        yield MemorySource(chunk, files={**files, file: values.repeat(1, 2)})
    for key, values in chunk.features.items():
        if sum(set_name(other) == set_name(key) for other in chunk.features) > 1:
            with pytest.raises(InputError, match="of one model"):
                MemorySource(replace(chunk, features={**chunk.features, key: values[:, :5]}))


@pytest.mark.parametrize("name", BUILT_IN)
def test_features_of_two_models_are_refused(name: str) -> None:
    requires = bind_features(BUILT_IN[name](), GIVEN).requires
    for source in of_two_models(requires):
        with pytest.raises(InputError, match=r"belongs? to another model"):
            bind_features(BUILT_IN[name](), GIVEN).select(source)


def test_every_selector_class_is_checked(factories: dict[str, SelectorFactory]) -> None:
    def concrete(base: Any) -> set[type[Selector]]:
        found = set() if inspect.isabstract(base) else {base}
        return found.union(*(concrete(child) for child in base.__subclasses__()))

    modules = [module.name for module in pkgutil.iter_modules(siftclip.selectors.__path__)]
    for module in modules:
        importlib.import_module(f"siftclip.selectors.{module}")
    bases = concrete(Selector) - {ScoreSelector}
    ours = {cls for cls in bases if cls.__module__.startswith("siftclip.selectors.")}
    assert ours == {type(make()) for make in factories.values()}


def classes_with_parameters() -> Iterator[type]:
    """Those of selectors, and of the rules, models and clusterings that are given to them."""
    for module in pkgutil.walk_packages(siftclip.selectors.__path__, "siftclip.selectors."):
        for cls in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(cls) and cls.__module__ == module.name and "__init__" in vars(cls):
                yield cls


def built_by(makers: Sequence[Callable[[], object]]) -> list[tuple[type, dict[str, Any]]]:
    """The classes of all objects that are built, and their arguments; once more without fraction.

    Then something else may say how many samples are kept.
    """
    built: list[tuple[type, dict[str, Any]]] = []

    def spied(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def record(self: Any, *positional: Any, **named: Any) -> None:
            if type(self).__init__ is record:  # not called by that of a subclass
                names = parameters_of(type(self))
                given = dict(zip(names, positional, strict=False)) | named
                built.append((type(self), given))
                if "fraction" in given:
                    built.append((type(self), given | {"fraction": None}))
            init(self, *positional, **named)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for cls in classes_with_parameters():
            patch.setattr(cls, "__init__", spied(vars(cls)["__init__"]))
        for make in makers:
            make()
    return built


def refusals(cls: type, given: dict[str, Any]) -> Iterator[tuple[str, ParameterError]]:
    """The errors of a class, one argument after the other replaced by what may be wrong."""
    for name, wrong in itertools.product(
        parameters_of(cls), (-1, 0, 1, 2.5, "wrong", "auto", True, ["wrong"])
    ):
        try:
            cls(**{**given, name: wrong})
        except ParameterError as error:
            yield name, error
        except TypeError:
            assert name in ("selectors", "stages", "weights")  # which are no lists


def test_errors_name_the_class_and_the_parameter(factories: dict[str, SelectorFactory]) -> None:
    built = built_by([*factories.values(), *PARTS])
    errors = [(cls, *error) for cls, given in built for error in refusals(cls, given)]
    assert len({(cls, name) for cls, name, _ in errors}) > 150
    for cls, name, error in errors:
        owner = name_of(error.owner)
        is_of_part = (owner, name) == ("ExternalColumn", "column")  # which selectors build
        assert owner == cls.__name__ or is_of_part, f"{cls.__name__}, {name}: {error}"
        told = (error.parameter or name).split(".")[0]  # None: several do not go together
        assert told in parameters_of(cls), f"{cls.__name__}, {name}: {error}"


def test_check_selector_runs_all_checks() -> None:
    check_selector(BUILT_IN["clip_score"])
