"""One seed serves many uses, which must not draw the same numbers: each has a purpose of its own.

Else a sample that a selector drew would be in the sub-batch of its sampler too, and a bootstrap
and a permutation test would err together.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest

import siftclip
from siftclip import hashing
from siftclip.datamodules.selection.algebra import CountedUids, sample
from siftclip.datamodules.streaming import order
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.significance.paired_tests import swapped_differences
from siftclip.eval.significance.resampling import poisson_weights
from siftclip.purposes import GeneratorPurpose, HashPurpose
from siftclip.selectors.core.base import Requirements
from siftclip.selectors.core.checks import synthetic_chunk
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.noise import noise_state
from siftclip.selectors.core.sub_batch import add_uniform
from siftclip.selectors.fitting.kmeans import _hashed_rows
from siftclip.selectors.methods.negcliploss.negcliploss import block_order
from siftclip.selectors.methods.removal.vas_d import NormSimD
from siftclip.selectors.methods.uniform import Uniform

SEED = 7
UNITS = np.arange(60, dtype=np.uint64)
CHUNK = synthetic_chunk(Requirements(features=("l14_img",)))
UIDS = CHUNK.uids


def swap() -> None:
    a, b = (
        Outcomes(statistic="mean", arrays={"value": values.astype(np.float32)})
        for values in (UNITS % 2, UNITS % 3 > 0)
    )
    swapped_differences(a, b, UNITS, resamples=4, seed=SEED)


HASHED: dict[str, Callable[[], object]] = {
    "uniform selector": lambda: Uniform(seed=SEED, fraction=0.5).score(CHUNK),
    "noise of samplers": lambda: noise_state(CHUNK.uids, SEED),
    "blocks of negCLIPLoss": lambda: block_order(CHUNK.uids, SEED, 0),
    "samples of k-means": lambda: _hashed_rows(
        MemorySource(CHUNK), Requirements(features=("l14_img",)), SEED, 5
    ),
    "uniform part of a sub-batch": lambda: add_uniform(
        np.zeros(len(CHUNK), dtype=np.int64), CHUNK.uids, np.array([3]), seed=SEED
    ),
    "covariances of NormSim-D": lambda: NormSimD(
        features="l14", fraction=0.5, steps=2, seed=SEED
    ).drawn(CHUNK.rows, CHUNK.uids, 0),
    "bootstrap": lambda: poisson_weights(UNITS, 4, seed=SEED),
    "permutation test": swap,
    "samples of a subset": lambda: sample(
        CountedUids(UIDS, np.ones(len(UIDS), dtype=np.int64)), 3, seed=SEED
    ),
}


def modules() -> Iterator[ModuleType]:
    for module in pkgutil.walk_packages(siftclip.__path__, "siftclip."):
        if not module.name.endswith("__main__"):
            yield importlib.import_module(module.name)


@pytest.fixture
def seeds_hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What `seed_state` is called with, in every module that has it."""
    seen: list[int] = []

    def recording(seed: int) -> np.ndarray:
        seen.append(seed)
        return real(seed)

    real = hashing.seed_state
    for name, module in list(sys.modules.items()):
        if name.startswith("siftclip.") and getattr(module, "seed_state", None) is real:
            monkeypatch.setattr(module, "seed_state", recording)
    return seen


def test_no_two_uses_of_a_seed_hash_the_same_number(seeds_hashed: list[int]) -> None:
    first: dict[str, int] = {}
    for name, use in HASHED.items():
        seeds_hashed.clear()
        use()
        first[name] = seeds_hashed[0]
    assert len(set(first.values())) == len(HASHED), first
    assert [name for name, seed in first.items() if seed == SEED] == ["uniform selector"]


def test_what_two_uses_draw_has_nothing_in_common() -> None:
    """Of two random halves a quarter of all is in both."""
    uids = np.random.default_rng(0).integers(0, 2**63, (4000, 2)).astype(np.uint64)
    rows = np.arange(len(uids))
    selector = NormSimD(features="l14", fraction=0.5, steps=3, seed=SEED, sample_fraction=0.5)
    halves = {f"step {step}": selector.drawn(rows, uids, step) for step in (0, 1, 2)}
    halves["uniform"] = hashing.uniform_score(uids, SEED) >= 0.5
    halves["noise"] = noise_state(uids, SEED) >= 2**63
    places = np.argsort(block_order(uids, SEED, 0))
    halves["blocks"] = places >= 2000
    names = list(halves)
    for number, name in enumerate(names):
        assert abs(halves[name].mean() - 0.5) < 0.05
        for other in names[:number]:
            assert abs((halves[name] & halves[other]).mean() - 0.25) < 0.03, (name, other)


def test_purposes_are_different_numbers() -> None:
    """Also those that no test above calls; `unique` refuses two of one kind."""
    purposes = [*HashPurpose, *GeneratorPurpose]
    assert len(purposes) == len({int(purpose) for purpose in purposes}) >= 18
    for kind in (HashPurpose, GeneratorPurpose):
        assert len(kind.__members__) == len(kind)  # no name is another one's alias


def test_purposes_stand_in_one_place() -> None:
    """Modules to come put theirs into `siftclip.purposes`, too."""
    elsewhere = [
        f"{module.__name__}.{name}"
        for module in modules()
        for name, value in vars(module).items()
        if "PURPOSE" in name.upper() and isinstance(value, int)
    ]
    assert not elsewhere


def test_purposes_keep_their_numbers() -> None:
    """Another number draws other samples, and gives other answers, under the same seed."""
    assert {purpose.name: int(purpose) for purpose in HashPurpose} == {
        "NOISE": 0x5AFEC0DED1CE0001,
        "UNIFORM_PART": int.from_bytes(b"uniform", "big"),
        "KMEANS": int.from_bytes(b"kmeans", "big"),
        "NEGCLIPLOSS_BLOCKS": int.from_bytes(b"negloss", "big"),
        "NORMSIM_D": 93 * 2**40,
        "CANDIDATES": int.from_bytes(b"sample", "big"),
        "VERSION": int.from_bytes(b"vers", "big"),
        "STEP": int.from_bytes(b"super", "big"),
        "BOOTSTRAP": 0x0B007572A9000001,
        "PERMUTATION": 0x0B007572A9000002,
        "SUBSET_SAMPLE": int.from_bytes(b"subset", "big"),
    }
    assert [int(purpose) for purpose in GeneratorPurpose] == [1, 2, 3, 4, 5, 6, 11, 12, 13, 14]


@pytest.mark.parametrize(
    "purposes",
    [
        (GeneratorPurpose.ORDER, GeneratorPurpose.SUBSTITUTE),
        (GeneratorPurpose.VALIDATION, GeneratorPurpose.SHOTS),
    ],
)
def test_generators_of_two_purposes_differ(purposes: tuple[int, int]) -> None:
    first, second = (order.derive_generator(SEED, 0, 0, purpose) for purpose in purposes)
    assert not set(first.integers(2**62, size=100)) & set(second.integers(2**62, size=100))
    first, second = (order.derive_seeds(np.arange(100), SEED, purpose) for purpose in purposes)
    assert not set(first.tolist()) & set(second.tolist())
