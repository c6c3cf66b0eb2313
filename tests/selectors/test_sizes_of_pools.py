"""Sizes that scale with the pool as published, and absolute ones that mean nothing on another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from siftclip.errors import InputError
from siftclip.selectors.core.base import FeatureFile, Selector, run
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk
from siftclip.selectors.fitting.clusters import KMeans
from siftclip.selectors.kernels.hardware import _int8_is_exact
from siftclip.selectors.methods.captions.metaclip import MetaClip
from siftclip.selectors.methods.clipcov.clipcov import ClipCov
from siftclip.selectors.methods.nearest import NearestRank
from siftclip.selectors.methods.negcliploss.negcliploss import NegCLIPLoss
from siftclip.selectors.methods.semdedup import SemDeDup

TARGET = FeatureFile(path="target.npz")
CONFIGS = Path(__file__).parents[2] / "configs" / "selector"


def pool(samples: int = 300, *, duplicates: int = 100, **options: int) -> MemorySource:
    """Unit features, of which the last ones repeat the first."""
    generator = np.random.default_rng(samples)
    arrays = {}
    for key in ("l14_img", "l14_txt"):
        values = generator.standard_normal((samples, 16))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        values[samples - duplicates :] = values[:duplicates]
        arrays[key] = torch.from_numpy(values.astype(np.float16))
    chunk = Chunk(
        rows=np.arange(samples),
        uids=generator.integers(0, 2**63, (samples, 2)).astype(np.uint64),
        features=arrays,
        captions=[f"a photo of thing{i % 40}" for i in range(samples)],
    )
    return MemorySource(chunk, files={TARGET: arrays["l14_txt"][:7]}, **options)


def semdedup(**clusters: object) -> SemDeDup:
    return SemDeDup(
        key="l14_img",
        clustering=KMeans(seed=0, iterations=3, **clusters),  # type: ignore[arg-type]
        eps=0.01,
    )


def test_deduplication_finds_duplicates_on_a_small_pool(caplog: pytest.LogCaptureFixture) -> None:
    kept = run(semdedup(clusters="auto", samples_per_cluster=8800), pool()).multiplicities
    assert kept.sum() == 200
    assert not caplog.text
    run(semdedup(clusters=50_000), pool())
    assert "clusters=50000 leaves 300 samples mostly alone" in caplog.text
    assert "Let clusters be auto" in caplog.text


@pytest.mark.parametrize(
    ("samples", "per_cluster", "most", "expected"),
    [
        (440_000_000, 8800, None, 50_000),
        (12_800_000, 128, 100_000, 100_000),
        (128_000_000, 128, 100_000, 100_000),
        (4000, 128, 100_000, 31),
        (4000, 8800, None, 1),
        (0, 8800, None, 1),
    ],
)
def test_numbers_of_clusters_are_those_published(
    samples: int, per_cluster: int, most: int | None, expected: int
) -> None:
    auto = KMeans(clusters="auto", samples_per_cluster=per_cluster, most_clusters=most, seed=0)
    assert auto.count(samples) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"clusters": "auto"},
            "samples_per_cluster must be given where clusters is auto, such as 8800",
        ),
        ({"clusters": "some"}, "clusters must be auto or an integer"),
        ({"clusters": 0}, "clusters must be an integer of at least 1"),
        ({"clusters": "auto", "samples_per_cluster": 0}, "samples_per_cluster must be"),
        ({"clusters": "auto", "samples_per_cluster": 9, "most_clusters": 0}, "most_clusters must"),
        ({"clusters": 5, "sample": 4}, "sample must be an integer of at least 5"),
    ],
)
def test_wrong_numbers_of_clusters(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KMeans(seed=0, **options)  # type: ignore[arg-type]


def test_a_sample_has_as_many_as_clusters() -> None:
    with pytest.raises(
        InputError, match=r"^KMeans: sample must be at least the number of clusters, 30 of"
    ):
        semdedup(clusters="auto", samples_per_cluster=10, sample=20).select(pool())


@pytest.fixture
def entries(tmp_path: Path) -> str:
    path = tmp_path / "entries.txt"
    path.write_text("\n".join(f"thing{i}" for i in range(40)), encoding="utf-8")
    return str(path)


def test_metaclip_balances_a_small_pool(entries: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = run(MetaClip(entries=entries, seed=0), pool()).multiplicities
    assert 10 < kept.sum() < 80  # of 40 entries about one each
    assert "no entry has more" not in caplog.text
    assert run(MetaClip(entries=entries, seed=0, t=20_000), pool()).multiplicities.all()
    assert "no entry has more than t=20000 matches" in caplog.text
    assert "t be auto (1 here)" in caplog.text


def clipcov(interval: int | str) -> ClipCov:
    return ClipCov(features="l14", fraction=0.5, labels=TARGET, interval=interval)


def test_clipcov_updates_its_scores_on_a_small_pool(caplog: pytest.LogCaptureFixture) -> None:
    fresh = run(clipcov("auto"), pool()).multiplicities
    assert not caplog.text
    # 150 picks of 7 classes: 0.70 * 150 / 7 = 15
    assert np.array_equal(fresh, run(clipcov(15), pool()).multiplicities)
    stale = run(clipcov(200), pool())
    assert "no class has interval=200 picks" in caplog.text
    assert "interval be auto (15 here)" in caplog.text
    assert stale.scores is not None
    best = np.argsort(-stale.scores, kind="stable")[:150]
    assert stale.multiplicities[best].mean() > 0.99
    assert not np.array_equal(fresh, stale.multiplicities)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: NearestRank(key="l14_img", target=TARGET, neighbours=300, threshold=-299),
            "neighbours=300 puts all 300 samples into every list",
        ),
        (lambda: NegCLIPLoss(features="l14", fraction=0.3), "all 10 passes compare the same pairs"),
    ],
)
def test_sizes_beyond_the_pool_are_told(
    make: Callable[[], Selector], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(make(), pool())
    assert words in caplog.text


def test_sizes_within_the_pool_are_not(caplog: pytest.LogCaptureFixture) -> None:
    run(NearestRank(key="l14_img", target=TARGET, neighbours=9, threshold=-8), pool())
    run(NegCLIPLoss(features="l14", fraction=0.3, batch_size=100), pool())
    run(NegCLIPLoss(features="l14", fraction=0.3, passes=1), pool())
    run(NegCLIPLoss(features="l14", fraction=0.3, batch_size=150), pool(part_samples=200))
    assert not caplog.text


def test_configurations_scale_with_the_pool() -> None:
    """What is a number of samples, clusters or matches in a published recipe is auto here."""
    absolute = {"clusters", "batch_samples", "t", "interval"}
    allowed = {("density.yaml", "clusters")}  # published: 100 and 500, not in proportion to pools

    def numbers(node: object) -> list[str]:
        if not isinstance(node, dict):
            return []
        here = [key for key, value in node.items() if key in absolute and isinstance(value, int)]
        return here + [key for value in node.values() for key in numbers(value)]

    for path in sorted(CONFIGS.glob("*.yaml")):
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        assert {(path.name, key) for key in numbers(tree)} <= allowed, path


def test_saturating_int8_products_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a CPU without VNNI, or where ONEDNN_MAX_CPU_ISA forbids it."""

    def saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        # the left side as unsigned, pairs of products added in 16 bits, and the shift taken off
        pairs = left.shape[1] // 2 * 2
        products = (left.int() + 128)[:, :, None] * right.int()[None]
        sums = (products[:, 0:pairs:2] + products[:, 1:pairs:2]).clamp(-(2**15), 2**15 - 1)
        return sums.sum(1) + products[:, pairs:].sum(1) - 128 * right.int().sum(0)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not _int8_is_exact.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: left.int() @ right.int())
    assert _int8_is_exact.__wrapped__()
