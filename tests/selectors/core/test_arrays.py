"""Selectors on plain arrays: numbers of the formulas, vectors of any length, clear refusals."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError, ParameterError
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.compose import RankSum, Then
from siftclip.selectors.core.conversion import UNIT_TOLERANCE, unit_rows
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.selectors.core.source import FeatureFile
from siftclip.selectors.fitting.clusters import KMeans
from siftclip.selectors.methods.captions.datacomp_filters import BasicFilter
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.external import External
from siftclip.selectors.methods.negcliploss.negcliploss import NegCLIPLoss
from siftclip.selectors.methods.normsim import NormSim
from siftclip.selectors.methods.removal.vas_d import VasD
from siftclip.selectors.methods.semdedup import SemDeDup
from siftclip.selectors.methods.uniform import Uniform
from siftclip.selectors.methods.vas import Vas

SAMPLES, DIM = 60, 12


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).standard_normal((SAMPLES, DIM))
    return unit(images), unit(images + np.random.default_rng(1).standard_normal((SAMPLES, DIM)))


def test_clip_score_is_the_cosine(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    scores = ClipScore(fraction=0.3).scores(*pairs)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, (pairs[0] * pairs[1]).sum(1), atol=1e-6)


def test_negcliploss_is_its_formula(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    images, texts = (torch.from_numpy(values).double() for values in pairs)
    logits = images @ texts.T / 0.1
    expected = 0.1 * (logits.diag() - (logits.logsumexp(0) + logits.logsumexp(1)) / 2)
    scores = NegCLIPLoss(fraction=0.3, temperature=0.1, passes=1).scores(*pairs)
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("make", [NegCLIPLoss, ClipScore])
def test_numpy_torch_and_mappings_give_the_same(
    make: Any, pairs: tuple[np.ndarray, np.ndarray]
) -> None:
    scores = make(fraction=0.3).scores(*pairs)
    tensors = make(fraction=0.3).scores(*(torch.from_numpy(values) for values in pairs))
    by_key = {"l14_img": pairs[0], "l14_txt": pairs[1]}
    of_mapping = make(features="l14", fraction=0.3).scores(by_key)
    assert np.array_equal(scores, tensors)
    assert np.array_equal(scores, of_mapping)


def test_an_npz_file_is_a_mapping(pairs: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", b32_img=pairs[0], b32_txt=pairs[1])
    with np.load(tmp_path / "0.npz") as arrays:
        scores = ClipScore(features="b32", fraction=0.3).scores(arrays)
    assert np.array_equal(scores, ClipScore(fraction=0.3).scores(*pairs))


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 9))
def test_the_length_of_vectors_plays_no_part(scale: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    images, texts = (unit(generator.standard_normal((20, 4))) for _ in range(2))
    lengths = generator.uniform(0.5, 2, (20, 1)).astype(np.float32)
    scores = ClipScore(fraction=0.3).scores(images, texts)
    scaled = ClipScore(fraction=0.3).scores(scale * lengths * images, texts)
    np.testing.assert_allclose(scaled, scores, atol=2e-6)


def test_unit_vectors_stay_as_they_are_to_the_bit() -> None:
    values = unit(np.random.default_rng(2).standard_normal((500, 768))).astype(np.float16)
    kept = unit_rows(values, "images")
    assert kept.dtype == torch.float16
    assert np.array_equal(kept.numpy(), values)
    rounded = torch.from_numpy(values).bfloat16()
    assert torch.equal(unit_rows(rounded, "images"), rounded)
    longer = unit_rows(values.astype(np.float32) * (1 + 2 * UNIT_TOLERANCE), "images")
    torch.testing.assert_close(longer.norm(dim=1), torch.ones(500))


def test_vectors_without_a_direction_have_no_score(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    images = 3 * pairs[0]
    images[3], images[5, 2] = 0, np.nan
    scores = ClipScore(fraction=0.3).scores(images, pairs[1])
    assert set(np.flatnonzero(np.isnan(scores))) == {3, 5}
    rest = np.setdiff1d(np.arange(SAMPLES), [3, 5])
    np.testing.assert_allclose(scores[rest], (pairs[0] * pairs[1]).sum(1)[rest], atol=1e-6)


def test_arrays_of_any_order_and_access(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    expected = ClipScore(fraction=0.3).scores(*pairs)
    images = np.asfortranarray(pairs[0])
    texts = pairs[1].astype(">f8")
    images.flags.writeable = False
    np.testing.assert_allclose(ClipScore(fraction=0.3).scores(images, texts), expected, atol=1e-6)
    backwards = ClipScore(fraction=0.3).scores(pairs[0][::-1], pairs[1][::-1])
    assert np.array_equal(backwards, expected[::-1])


def test_captions_columns_and_nothing_but_numbers() -> None:
    captions = ["a red house on a hill", "", "two words"]
    sizes = np.array([[400, 300], [400, 300], [20, 30]])
    kept = BasicFilter().scores(captions=captions, sizes=sizes)
    assert kept.tolist() == [1, 0, 0]
    column = np.array([0.5, np.nan, 2.0])
    scores = External(path=None, column="any", fraction=0.5).scores(column=column)
    np.testing.assert_array_equal(scores, column.astype(np.float32))
    one, two = (
        Uniform(fraction=0.5, seed=seed).scores(np.ones((7, 2), np.float32)) for seed in (0, 1)
    )
    assert one.shape == (7,)
    assert not np.array_equal(one, two)


def test_feature_files_come_as_arrays(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    target = FeatureFile(path="target.npy")
    selector = NormSim(target=target, p=2, fraction=0.3)
    scores = selector.scores(pairs[0], files={target: torch.from_numpy(pairs[1])})
    expected = np.sqrt(((pairs[0] @ pairs[1].T) ** 2).sum(1))
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    with pytest.raises(ParameterError, match=r"NormSim: files must hold .*target\.npy"):
        selector.scores(pairs[0])


def test_compositions_score_arrays(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    both = RankSum(selectors=[ClipScore(fraction=1), Vas(target="pool", fraction=1)], fraction=0.3)
    ranks = [
        np.argsort(np.argsort(selector.scores(*pairs)))
        for selector in (ClipScore(fraction=1), Vas(target="pool", fraction=1))
    ]
    np.testing.assert_array_equal(both.scores(*pairs), sum(ranks))


@pytest.mark.parametrize(
    ("selector", "arrays", "message"),
    [
        (NegCLIPLoss, [np.eye(3)], "NegCLIPLoss: texts must be given"),
        (ClipScore, [], "ClipScore: images must be given"),
        (ClipScore, [[[1.0]], np.eye(3)], r"ClipScore: images must be a float array .*Got list"),
        (ClipScore, [np.eye(3, dtype=bool), np.eye(3)], r"images must be .*Got bool \[3, 3\]"),
        (ClipScore, [np.ones(3), np.eye(3)], r"images must be .*Got float64 \[3\]"),
        (ClipScore, [np.eye(3), np.eye(2)], "All arrays must be of the same samples"),
        (ClipScore, [np.array([["a"]]), np.eye(1)], r"images must be .*Got <U1 \[1, 1\]"),
    ],
)
def test_wrong_arrays_are_told(selector: Any, arrays: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        selector(fraction=0.3).scores(*arrays)


def test_arrays_are_those_of_the_set_that_is_named(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    named = ClipScore(features="l14", fraction=0.3)
    assert np.array_equal(named.scores(*pairs), ClipScore(fraction=0.3).scores(*pairs))
    with pytest.raises(InputError, match=r"texts must be given.*Got the arrays images\."):
        named.scores(pairs[0])


@pytest.mark.parametrize("make", [NegCLIPLoss, ClipScore])
def test_images_and_texts_are_of_one_model(make: Any) -> None:
    with pytest.raises(InputError, match=r"Images and texts .* \[3, 3\] and \[3, 2\]"):
        make(fraction=0.3).scores(np.eye(3), np.eye(3)[:, :2] + 1)


def test_captions_are_no_single_text() -> None:
    with pytest.raises(InputError, match="captions must be a list of texts"):
        BasicFilter().scores(captions="abc", sizes=np.ones((3, 2)))


def test_the_signature_of_a_class_is_that_of_its_constructor() -> None:
    assert str(inspect.signature(Uniform)).startswith("(*, seed: 'int' = 0, **rule")
    assert "target" in inspect.signature(NormSim).parameters


def test_arguments_that_a_selector_does_not_have() -> None:
    with pytest.raises(ParameterError, match=r"ClipScore: frac is not .* Did you mean fraction\?"):
        ClipScore(frac=0.3)  # type: ignore[call-arg]
    with pytest.raises(ParameterError, match=r"NormSim: target must be given"):
        NormSim(fraction=0.3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        ClipScore("l14", fraction=0.3)  # type: ignore[misc]
    with pytest.raises(ParameterError, match=r"Got none of them\. A fraction of 0.3"):
        ClipScore()


def test_wrong_uids_and_missing_captions_are_told() -> None:
    with pytest.raises(ParameterError, match="uids must be uint64"):
        ClipScore(fraction=0.3).scores(np.eye(3), np.eye(3), uids=np.arange(3))
    with pytest.raises(ParameterError, match="BasicFilter: captions must be given"):
        BasicFilter().scores(sizes=np.ones((2, 2)))
    with pytest.raises(InputError, match="images must be given, or captions"):
        Uniform(fraction=0.5).scores()


# ---- features that are named later -------------------------------------------------------------
def test_features_are_named_where_they_are_not() -> None:
    open_ = ClipScore(fraction=0.3)
    with pytest.raises(ParameterError, match="ClipScore: features must be given here"):
        _ = open_.requires
    bound = bind_features(open_, "l14")
    assert bound.requires.features == ("l14_img", "l14_txt")
    assert open_.features is None
    assert bind_features(bound, "b32") is bound


@pytest.mark.parametrize(
    ("selector", "keys"),
    [
        (SemDeDup(clustering=KMeans(clusters=2, seed=0), fraction=0.5), ("b32_img",)),
        (VasD(fraction=0.5, steps=2), ("b32_img",)),
        (
            Then(
                stages={"a": ClipScore(fraction=0.5), "b": NegCLIPLoss(features="l14", fraction=1)}
            ),
            ("b32_img", "b32_txt", "l14_img", "l14_txt"),
        ),
    ],
    ids=["key", "stepwise", "composition"],
)
def test_members_are_named_too(selector: Selector, keys: tuple[str, ...]) -> None:
    assert bind_features(selector, "b32").requires.features == keys


def test_a_key_that_is_not_named_is_told() -> None:
    with pytest.raises(ParameterError, match=r'SemDeDup: key must be given here.*key="l14_img"'):
        _ = SemDeDup(clustering=KMeans(clusters=2, seed=0), fraction=0.5).requires
