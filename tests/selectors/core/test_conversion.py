"""What is given as arrays is converted to the same numbers, or refused."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from siftclip.errors import InputError, ParameterError
from siftclip.selectors import (
    Chunk,
    ClipScore,
    External,
    FeatureFile,
    KMeans,
    MemorySource,
    Requirements,
    ScoreSelector,
    Selector,
    SemDeDup,
    Vas,
    run,
)

SAMPLES = 12
RANDOM = np.random.default_rng(0)
IMAGES, TEXTS = (
    (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    for values in RANDOM.standard_normal((2, SAMPLES, 8))
)
UIDS = RANDOM.integers(0, 2**63, size=(SAMPLES, 2)).astype(np.uint64)
HEX = [f"{high:016x}{low:016x}" for high, low in UIDS.tolist()]
PAIRS = {"l14_img": torch.from_numpy(IMAGES), "l14_txt": torch.from_numpy(TEXTS)}
CHUNK = Chunk(rows=np.arange(SAMPLES), uids=UIDS, features=PAIRS)
SELECTOR = ClipScore(features="l14", fraction=0.5)
SCORES = SELECTOR.scores(MemorySource(CHUNK))


def read_only(values: np.ndarray) -> np.ndarray:
    copy = values.copy()
    copy.setflags(write=False)
    return copy


# ---- features -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [
        torch.tensor,
        lambda values: torch.tensor(values, requires_grad=True),
        lambda values: torch.tensor(values).t().contiguous().t(),
        lambda values: values.astype(np.float16),
        lambda values: values.astype(np.float64),
        lambda values: values.astype(np.longdouble),
        lambda values: values.astype(">f4"),
        lambda values: values * 7,
        lambda values: values.astype(np.float64) * 1e-3,
        lambda values: np.repeat(values, 2, axis=0)[::2],
        np.asfortranarray,
        read_only,
    ],
)
def test_features_of_any_kind_give_the_same_scores(make: Callable[[np.ndarray], Any]) -> None:
    values = SELECTOR.scores(make(IMAGES), TEXTS)
    np.testing.assert_allclose(values, SCORES, rtol=0, atol=5e-4)
    source = MemorySource(replace(CHUNK, features={**PAIRS, "l14_img": make(IMAGES)}))
    np.testing.assert_array_equal(SELECTOR.scores(source), values)


def test_bytes_of_floats_are_computed_with() -> None:
    small = [torch.tensor(values).to(torch.float8_e4m3fn) for values in (IMAGES, TEXTS)]
    np.testing.assert_allclose(SELECTOR.scores(*small), SCORES, rtol=0, atol=0.05)


def test_what_is_masked_has_no_score() -> None:
    masked = np.ma.masked_array(IMAGES, mask=np.zeros(IMAGES.shape, dtype=bool))
    masked[3, 2] = np.ma.masked
    values = SELECTOR.scores(masked, TEXTS)
    assert np.isnan(values[3])
    assert np.array_equal(np.delete(values, 3), np.delete(SCORES, 3))


@pytest.mark.parametrize(
    "values",
    [
        IMAGES.tolist(),
        IMAGES[0],
        IMAGES[None],
        IMAGES[:, :0],
        IMAGES.astype(np.complex64),
        IMAGES.astype(object),
        IMAGES.astype(str),
        (IMAGES * 100).astype(np.int8),
        torch.tensor(IMAGES).to_sparse(),
        torch.tensor(IMAGES).to("meta"),
        pd.DataFrame(IMAGES),
        "l14",
        3.0,
    ],
    ids=range(13),
)
def test_features_that_are_none_are_refused(values: Any) -> None:
    with pytest.raises(ParameterError, match=r"^ClipScore: images must be a float array"):
        SELECTOR.scores(values, TEXTS)
    with pytest.raises(ParameterError, match=r"^Chunk: l14_img must be a float array"):
        MemorySource(replace(CHUNK, features={**PAIRS, "l14_img": values}))


# ---- uids ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "uids",
    [
        UIDS.astype(np.int64),
        UIDS.astype(">u8"),
        UIDS.astype("<u8").view("<u8,<u8").reshape(-1),
        UIDS.tolist(),
        HEX,
        [text.upper() for text in HEX],
        [str(uuid.UUID(text)) for text in HEX],
        [uuid.UUID(text) for text in HEX],
        [text.encode() for text in HEX],
        np.array(HEX),
        np.array(HEX, dtype=bytes),
        pd.Series(HEX),
    ],
    ids=range(12),
)
def test_uids_of_any_kind_are_the_same(uids: Any) -> None:
    assert np.array_equal(MemorySource(replace(CHUNK, uids=uids)).uids, UIDS)
    ties = np.ones(SAMPLES)
    by_uid = External(path=None, column="score", fraction=0.5)
    expected = run(by_uid, MemorySource(Chunk(rows=np.arange(SAMPLES), uids=UIDS, column=ties)))
    source = MemorySource(Chunk(rows=np.arange(SAMPLES), uids=uids, column=ties))
    assert np.array_equal(run(by_uid, source).multiplicities, expected.multiplicities)


@pytest.mark.parametrize(
    "uids",
    [
        UIDS[:, 1],
        -UIDS.astype(np.int64),
        UIDS.astype(np.float64),
        np.zeros((SAMPLES, 3), dtype=np.uint64),
        list(range(SAMPLES)),
        ["zz"] * SAMPLES,
        [None] * SAMPLES,
        [bytes.fromhex(text) for text in HEX],
        "abc",
    ],
    ids=range(9),
)
def test_uids_that_are_none_are_refused(uids: Any) -> None:
    with pytest.raises(ParameterError, match=r"uids must be .*32 hexadecimal digits"):
        SELECTOR.scores(IMAGES, TEXTS, uids=uids)
    with pytest.raises(ParameterError, match=r"^Chunk: uids must be .*32 hexadecimal digits"):
        MemorySource(replace(CHUNK, uids=uids))


# ---- numbers, sizes, captions, rows -------------------------------------------------------------
COLUMN = np.arange(SAMPLES, dtype=np.float64)


@pytest.mark.parametrize(
    "column",
    [
        COLUMN.tolist(),
        COLUMN.astype(int),
        COLUMN.astype(np.float16),
        pd.Series(COLUMN, index=range(SAMPLES)[::-1]),
        pd.Series(COLUMN, dtype="Int64"),
        torch.tensor(COLUMN).bfloat16(),
        torch.tensor(COLUMN, requires_grad=True),
        [Decimal(number) for number in range(SAMPLES)],
    ],
    ids=range(8),
)
def test_numbers_of_any_kind_are_the_same(column: Any) -> None:
    scores = External(path="x.parquet", column="score", fraction=0.5).scores(column=column)
    assert np.array_equal(scores, COLUMN)


def test_numbers_that_are_missing_are_nan() -> None:
    selector = External(path="x.parquet", column="score", fraction=0.5)
    for column in (
        [1.0, None],
        pd.array([1, None], dtype="Int64"),
        np.ma.array([1, 2], mask=[0, 1]),
    ):
        assert np.array_equal(selector.scores(column=column), [1, np.nan], equal_nan=True)
    values = selector.scores(column=[np.inf, -np.inf, 0])
    assert np.array_equal(values, [np.inf, -np.inf, 0])


@pytest.mark.parametrize(
    "column",
    [COLUMN[:, None], 3.0, np.array(3.0), ["a"], ["1"], [b"1"], COLUMN * 1j, "abc", {1: 2}, {1, 2}],
    ids=range(10),
)
def test_numbers_that_are_none_are_refused(column: Any) -> None:
    selector = External(path="x.parquet", column="score", fraction=0.5)
    with pytest.raises(ParameterError, match=r"^External: column must be one number for each samp"):
        selector.scores(column=column)


class Shortest(ScoreSelector):
    requires = Requirements(captions=True, sizes=True)

    def score(self, chunk: Chunk) -> torch.Tensor:
        assert chunk.captions is not None
        assert chunk.sizes is not None
        lengths = [len(caption) for caption in chunk.captions]
        return torch.from_numpy(chunk.sizes.min(1) - np.array(lengths)).float()


CAPTIONS, SIZES = ["a", "bb", "ccc"], np.array([[5, 6], [7, 8], [-1, -1]])


@pytest.mark.parametrize("captions", [tuple(CAPTIONS), np.array(CAPTIONS), pd.Series(CAPTIONS)])
@pytest.mark.parametrize("sizes", [SIZES.tolist(), SIZES * 1.0, torch.tensor(SIZES)])
def test_captions_and_sizes_of_any_kind(captions: Any, sizes: Any) -> None:
    assert Shortest(fraction=1).scores(captions=captions, sizes=sizes).tolist() == [4, 5, -4]


@pytest.mark.parametrize(
    "captions",
    [[None] * 3, [b"a"] * 3, [1] * 3, [float("nan")] * 3, {"a": 1}, {"a"}, "abc", b"abc"],
)
def test_captions_that_are_none_are_refused(captions: Any) -> None:
    with pytest.raises(ParameterError, match=r"^Shortest: captions must be "):
        Shortest(fraction=1).scores(captions=captions, sizes=SIZES)


@pytest.mark.parametrize(
    "sizes",
    [SIZES[:, 0], SIZES + 0.5, SIZES * np.nan, np.zeros((3, 3)), SIZES.astype(str), 3, [[None, 1]]],
    ids=range(7),
)
def test_sizes_that_are_none_are_refused(sizes: Any) -> None:
    with pytest.raises(ParameterError, match=r"^Shortest: sizes must be whole numbers"):
        Shortest(fraction=1).scores(captions=CAPTIONS, sizes=sizes)


@pytest.mark.parametrize("rows", [np.zeros(SAMPLES, int), np.arange(12.0), np.arange(12)[:, None]])
def test_rows_are_distinct_whole_numbers(rows: Any) -> None:
    with pytest.raises(ParameterError, match=r"^Chunk: rows must be distinct whole numbers"):
        MemorySource(replace(CHUNK, rows=rows))


def test_arrays_of_a_chunk_are_of_the_same_samples() -> None:
    with pytest.raises(InputError, match=r"same samples. Their lengths are {'rows': 5, 'uids': 12"):
        MemorySource(replace(CHUNK, rows=np.arange(5)))
    source = MemorySource(replace(CHUNK, rows=list(range(SAMPLES))))  # type: ignore[arg-type]
    assert np.array_equal(SELECTOR.scores(source), SCORES)


# ---- sources ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "selector",
    [SELECTOR, SemDeDup(key="l14_img", clustering=KMeans(clusters=2, seed=0), fraction=1)],
)
@pytest.mark.parametrize("given", [IMAGES, CHUNK, None, "l14"], ids=range(4))
def test_what_is_no_source_is_told(selector: Selector, given: Any) -> None:
    for call in (lambda: run(selector, given), lambda: selector.select(given)):
        with pytest.raises(ParameterError, match=r"source must be a source of .*siftclip\.select"):
            call()


def test_what_a_source_lacks_is_told() -> None:
    source = MemorySource(replace(CHUNK, features={"l14_img": PAIRS["l14_img"]}))
    with pytest.raises(InputError, match=r"lack l14_txt, which the selector reads. They have l14_"):
        run(SELECTOR, source)
    with pytest.raises(InputError, match="lack captions, sizes, which the selector reads"):
        run(Shortest(fraction=1), source)
    target = Vas(features="l14", target=FeatureFile(path="t.npy"), fraction=0.5)
    with pytest.raises(InputError, match=r"does not hold what the selector reads from t\.npy"):
        run(target, source)


def test_feature_files_are_converted_too() -> None:
    file = FeatureFile(path="t.npy")
    selector = Vas(features="l14", target=file, fraction=0.5)
    expected = selector.scores(IMAGES, files={file: torch.tensor(IMAGES)})
    assert np.array_equal(selector.scores(IMAGES, files={file: IMAGES}), expected)
    with pytest.raises(ParameterError, match=r"files\['t.npy'\] must be a float array"):
        selector.scores(IMAGES, files={file: IMAGES.tolist()})
