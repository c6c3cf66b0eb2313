"""VAS, against a loop and the authors' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import FeatureFile, Requirements
from siftclip.selectors.core.checks import check_selector, synthetic_chunk, synthetic_files
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.methods.vas import Vas, cross_vas, vas

FILE = FeatureFile(path="t.npz")

FACTORIES = {
    "file": lambda: Vas(features="a", target=FeatureFile(path="t.npz"), fraction=0.3),
    "text": lambda: Vas(
        features="a", modality="text", target=FeatureFile(path="t.npz", key="b"), fraction=0.3
    ),
    "cross": lambda: Vas(
        features="a",
        modality="cross",
        target=FeatureFile(path="t.npz", key="img"),
        text_target=FeatureFile(path="t.npz", key="txt"),
        fraction=0.3,
    ),
    "pool": lambda: Vas(features="a", target="pool", threshold=0.05),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_contract(name: str) -> None:
    check_selector(FACTORIES[name])


def test_functions_equal_loops() -> None:
    generator = np.random.default_rng(0)
    x, y = (torch.from_numpy(generator.standard_normal((5, 3)).astype("f2")) for _ in range(2))
    matrix = torch.from_numpy(generator.standard_normal((3, 3)))
    matrix = matrix + matrix.T
    for function, other in ((lambda: vas(x, matrix), x), (lambda: cross_vas(x, y, matrix), y)):
        for i, score in enumerate(function()):
            expected = sum(
                float(x[i, a]) * float(matrix[a, b]) * float(other[i, b])
                for a in range(3)
                for b in range(3)
            )
            assert score.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["file", "text", "cross", "pool"])
def test_selector_takes_the_covariance_of_its_target(name: str) -> None:
    selector = FACTORIES[name]()
    chunk = synthetic_chunk(Requirements(features=("a_img", "a_txt")))
    files = synthetic_files(selector.requires)
    scores = selector.scores(MemorySource(chunk, files=files))
    own = [chunk.features[key].double() for key in selector.requires.features]
    target = [files[file].double() for file in selector.requires.files] or own
    covariance = target[0].T @ target[-1] / len(target[0])
    expected = torch.einsum("ni,ij,nj->n", own[0], covariance, own[-1])
    np.testing.assert_allclose(scores, expected.numpy(), rtol=0, atol=2e-7)


def test_pool_is_the_whole_pool_after_an_earlier_stage() -> None:
    chunk = synthetic_chunk(Requirements(features=("a_img",)))
    source = MemorySource(chunk)
    selector = FACTORIES["pool"]()
    every = selector.scores(source)
    np.testing.assert_array_equal(selector.scores(source.restrict(np.arange(40))), every[:40])


def test_unusable_samples_have_no_score_and_no_part_in_the_covariance() -> None:
    chunk = synthetic_chunk(Requirements(features=("a_img",)))
    features = chunk.features["a_img"].clone()
    features[3], features[5, 0], features[7, 1] = 0, torch.nan, torch.inf
    scores = FACTORIES["pool"]().scores(MemorySource(replace(chunk, features={"a_img": features})))
    good = np.setdiff1d(np.arange(len(chunk)), [3, 5, 7])
    assert np.isnan(scores[[3, 5, 7]]).all()
    rest = MemorySource(chunk).restrict(good)
    x = features[good].double()
    expected = torch.einsum("ni,ij,nj->n", x, x.T @ x / len(x), x)
    np.testing.assert_allclose(scores[rest.rows], expected.numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]], ranks: int
) -> None:
    chunk = synthetic_chunk(Requirements(features=("a_img",)))

    def select(ranks: Ranks) -> Any:
        selector = Vas(features="a", target="pool", fraction=0.3)
        return selector.select(MemorySource(chunk, ranks=ranks, part_samples=50, chunk_samples=16))

    expected = run_on_ranks(1, select)[0]
    for choice in run_on_ranks(ranks, select):
        np.testing.assert_array_equal(choice.scores, expected.scores)
        np.testing.assert_array_equal(choice.multiplicities, expected.multiplicities)


def test_covariance_file() -> None:
    chunk = synthetic_chunk(Requirements(features=("a_img",)), dim=4)
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    file = FeatureFile(path="c.pt")
    selector = Vas(features="a", covariance=FeatureFile(path="c.pt"), fraction=0.5)
    scores = selector.scores(MemorySource(chunk, files={file: matrix}, chunk_samples=3))
    expected = (chunk.features["a_img"].double() ** 2) @ matrix.double().diagonal()
    np.testing.assert_allclose(scores, expected.numpy(), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"4 x 4 features.*3 x 4.*another model"):
        Vas(features="a", covariance=FeatureFile(path="c.pt"), fraction=0.5).scores(
            MemorySource(chunk, files={file: matrix[:3]})
        )


@pytest.mark.parametrize("rows", [torch.zeros(3, 16), torch.full((3, 16), torch.inf)])
def test_a_target_without_usable_rows(rows: torch.Tensor) -> None:
    chunk = synthetic_chunk(Requirements(features=("a_img",)))
    source = MemorySource(chunk, files={FILE: rows})
    with pytest.raises(InputError, match=r"Vas: t\.npz has no rows that are finite and not 0"):
        Vas(features="a", target=FILE, fraction=0.3).select(source)


def test_a_covariance_that_is_not_finite() -> None:
    chunk = synthetic_chunk(Requirements(features=("a_img",)))
    source = MemorySource(chunk, files={FILE: torch.full((16, 16), torch.nan)})
    with pytest.raises(InputError, match=r"Vas: the covariance in t\.npz must be finite"):
        Vas(features="a", covariance=FILE, fraction=0.3).select(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of target and covariance"),
        ({"target": FILE, "covariance": FILE}, "exactly one of"),
        ({"target": FILE, "modality": "video"}, "modality must be one of image, text"),
        ({"target": "t.npz"}, "target must be a FeatureFile or pool"),
        ({"target": FILE, "modality": "cross"}, "text_target must be given"),
        ({"target": "pool", "modality": "cross", "text_target": FILE}, "and not otherwise"),
        ({"target": FILE, "text_target": FILE}, "and not otherwise"),
    ],
)
def test_faults_of_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Vas(features="a", fraction=0.3, **options)


@pytest.mark.testbed
@pytest.mark.parametrize("arch", ["l14", "b32"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_agrees_with_released_code(
    arch: str,
    modality: str,
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
) -> None:
    inputs, expected = reference(f"inputs_{arch}"), reference(f"vas_{arch}")
    short = {"image": "img", "text": "txt"}[modality]
    selector = Vas(features=arch, modality=modality, target=FeatureFile(path="t.npz"), fraction=0.2)
    source = reference_source(inputs, arch)
    source._files = {FeatureFile(path="t.npz"): torch.from_numpy(inputs[f"tgt_{short}"])}
    choice = selector.select(source)
    assert choice.scores is not None
    conformance(
        f"vas {arch} {short}, top 20 %",
        scores=choice.scores,
        expected_scores=expected[f"vas_{short}"],
        limit=2e-6,
        kept=np.flatnonzero(choice.multiplicities),
        expected_kept=expected[f"rows_top20_{short}"],
        cut_limit=2e-6,
    )
    if modality == "image":
        pool = Vas(features=arch, target="pool", fraction=0.2)
        pool.fit(source)
        np.testing.assert_allclose(
            pool._matrix.numpy(), expected["Sigma_pool_img"], rtol=0, atol=1e-6
        )


@pytest.mark.testbed
def test_after_clip_score_agrees_with_released_driver(
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
) -> None:
    inputs, expected = reference("inputs_l14"), reference("twostage_l14")["vas_f0.45_fvas0.3"]
    source = reference_source(inputs, "l14")
    column = inputs["css_f16"].astype(np.float32)
    left = np.flatnonzero(keep_top(column, source.uids, int(0.45 * len(source))))
    restricted = source.restrict(left)
    source._files = {FeatureFile(path="t.npz"): torch.from_numpy(inputs["tgt_img"])}
    choice = Vas(features="l14", target=FeatureFile(path="t.npz"), fraction=0.3).select(restricted)
    conformance(
        "clip score 45 %, then vas 30 %, l14",
        kept=left[choice.multiplicities > 0],
        expected_kept=expected,
        note="CLIP scores are tied at the first cut",
    )
