"""Groups that reports count samples by: clusters and their names, languages, near duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import InputError
from siftclip.files import write_npz
from siftclip.trainer.compare.page import groups as groups_module
from siftclip.trainer.compare.page.composition import composition_frame, ratio_tables
from siftclip.trainer.compare.page.grouping import (
    CLUSTER,
    DUPLICATE,
    LANGUAGE,
    NEAR,
    OTHER,
    UNKNOWN,
    Grouping,
    Groups,
    by_size,
    cluster_names,
    count_clusters,
    grouped_languages,
    near_duplicates,
)
from siftclip.trainer.compare.page.groups import first_features, group_samples, sampled_rows
from siftclip.trainer.compare.page.languages import SureLanguages
from siftclip.trainer.compare.page.pool_view import PoolView
from siftclip.trainer.compare.page.selection_page import ShownSelections
from siftclip.trainer.compare.passing import find_cluster

KINDS = ("a dog in the park", "der Hund im Garten")


def identify(captions: Sequence[str]) -> list[str | None]:
    """Tell English, German and what is neither."""
    return [{"a": "en", "d": "de"}.get(text[:1], "und") for text in captions]


@pytest.fixture
def pool(make_samples: Callable[..., Any], write_pool: Callable[..., Path], tmp_path: Path) -> Pool:
    """120 samples: 80 English captions, 36 German ones, and 4 of markup."""
    samples = make_samples(120)
    for number, sample in enumerate(samples):
        text = KINDS[number >= 80] if number < 116 else "<b>\u202e\x1b[31m</b>"
        sample.caption = f"{text} {number}".encode() if number < 116 else text.encode()
    return Pool(str(write_pool(samples)), cache_dir=str(tmp_path / "cache"), progress=False)


@pytest.fixture
def features(pool: Pool, tmp_path: Path) -> Path:
    """A folder of features in two directions: those of the English captions, and the others."""
    rows = np.arange(len(pool))
    english = np.array([text[:1] == "a" for text in captions_of(pool)])
    values = np.random.default_rng(0).standard_normal((len(pool), 64)) / 8
    values[rows, np.where(english, 0, 1)] += 3
    write_npz(
        tmp_path / "features" / "part.npz", uids=pool.uids, mine_img=values.astype(np.float16)
    )
    return tmp_path / "features"


def captions_of(pool: Pool) -> list[str]:
    return [
        str(text)
        for text in groups_module.read_captions(pool, np.arange(len(pool)), progress=False)
    ]


def test_samples_are_grouped(pool: Pool, features: Path, tmp_path: Path) -> None:
    found = first_features(pool, [(tmp_path / "no", None), (features, None)])
    assert found is not None
    assert found.key == "mine_img"
    groups = group_samples(pool, found, progress=False, identifier=identify)
    clusters, languages = groups.find(CLUSTER), groups.find(LANGUAGE)
    assert clusters is not None
    assert languages is not None
    texts = captions_of(pool)
    assert [languages.names[label] for label in languages.labels] == [
        UNKNOWN if code == "und" else code for code in identify(texts)
    ]
    assert languages.names == ("en", "de", UNKNOWN)
    # every cluster is of one direction, and is named by words of it
    assert len(clusters.names) == count_clusters(120) == 6
    sizes = np.bincount(clusters.labels)
    assert sizes.sum() == 120
    assert (np.diff(sizes) <= 0).all()
    for number, name in enumerate(clusters.names):
        own = {texts[row][:1] == "a" for row in np.flatnonzero(clusters.labels == number)}
        assert len(own) == 1
        words = set(name.partition(": ")[2].split(", ")) - {""}
        assert words <= {*KINDS[0].split()} or words <= {*KINDS[1].lower().split()}, name
    assert any(": " in name for name in clusters.names)
    again = group_samples(pool, found, progress=False, identifier=identify).find(CLUSTER)
    assert again is not None
    assert again.labels.tolist() == clusters.labels.tolist()


def test_without_features_or_the_extra_a_sentence_says_so(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first_features(pool, [(None, None)]) is None

    def missing(captions: Sequence[str]) -> list[str | None]:
        raise InputError("The Python module gcld3 is not installed.")

    groups = group_samples(pool, None, progress=False, identifier=missing)
    assert groups.groupings == ()
    clusters, languages = groups.notes
    assert "siftclip embed" in clusters
    assert "pip install 'siftclip[text]'" in languages


def test_damaged_features_lose_nothing_else(pool: Pool, features: Path) -> None:
    uids = np.zeros((1, 2), dtype=np.uint64)
    write_npz(features / "other.npz", uids=uids, mine_img=np.ones((1, 3)))
    groups = group_samples(
        pool, first_features(pool, [(features, None)]), progress=False, identifier=identify
    )
    assert [each.title for each in groups.groupings] == [LANGUAGE]
    assert "There are no clusters of images: " in groups.notes[0]
    assert "Features of one model have one width" in groups.notes[0]


def test_few_captions_of_a_large_pool_are_read(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "MOST_CAPTIONS", 30)
    groups = group_samples(pool, None, progress=False, identifier=identify)
    languages = groups.find(LANGUAGE)
    assert languages is not None
    known = np.flatnonzero(languages.labels >= 0)
    assert len(known) == 30
    assert known.tolist() == sampled_rows(np.arange(120), 30).tolist()
    assert any("of 30 captions that were drawn at random" in note for note in groups.notes)
    texts = captions_of(pool)
    for row in known:
        code = identify([texts[row]])[0]
        assert languages.names[languages.labels[row]] == (UNKNOWN if code == "und" else code)


def test_composition_counts_groups(pool: Pool) -> None:
    """Shares, ratios and what leaves out 1, against counts by hand."""
    labels = np.array([0] * 60 + [1] * 40 + [-1] * 20)
    kept = np.r_[np.ones(50), np.zeros(10), np.ones(2), np.zeros(38), np.ones(20)].astype(np.int64)
    hostile = "2: <script>alert(1)</script>"
    grouping = Grouping(title=CLUSTER, labels=labels, names=("1: dog", hostile))
    view = PoolView(
        pool=pool,
        kept={"mine": kept},
        scores={},
        kinds=None,
        sizes=None,
        max_image_pixels=10**6,
        images=False,
        groups=Groups(groupings=(grouping,)),
    )
    frame = composition_frame(view)
    rows = frame[frame["property"] == CLUSTER].set_index("part")
    assert rows["pool_share"].tolist() == [0.6, 0.4]
    assert rows["kept_share"].tolist() == [50 / 52, 2 / 52]
    assert rows["ratio"].tolist() == pytest.approx([50 / 52 / 0.6, 2 / 52 / 0.4])
    table = ratio_tables(ShownSelections(arms=("mine",)), frame)[CLUSTER]
    assert table == [
        [CLUSTER, "of the pool", "mine"],
        ["1: dog", "60.0 %", "1.60 *"],
        [hostile, "40.0 %", "0.10 *"],
    ]


@given(st.lists(st.integers(-1, 6), min_size=1))
def test_groups_are_numbered_by_size(labels: list[int]) -> None:
    renamed = by_size(np.array(labels)).tolist()
    pairs = {*zip(labels, renamed, strict=True)}
    assert len(pairs) == len({*labels}) == len({*renamed})  # the same partition
    assert {(old == -1) == (new == -1) for old, new in pairs} == {True}
    counts = Counter(new for new in renamed if new >= 0)
    assert sorted(counts) == list(range(len(counts)))
    assert [counts[at] for at in sorted(counts)] == sorted(counts.values(), reverse=True)


@given(st.lists(st.sampled_from([None, "", "und", *(f"l{at}" for at in range(16))])))
def test_languages_are_grouped(codes: list[str | None]) -> None:
    labels, names = grouped_languages(codes)
    assert len(names) == len({*names}) <= 14
    counts = Counter(code for code in codes if code not in (None, "", "und"))
    for code, label in zip(codes, labels.tolist(), strict=True):
        if code in (None, "", "und"):
            assert names[label] == UNKNOWN
        elif names[label] == OTHER:
            least = min(counts[name] for name in names if name not in (OTHER, UNKNOWN))
            assert counts[code] <= least
        else:
            assert names[label] == code


def test_clusters_are_named_by_words_of_letters_alone() -> None:
    captions = ["<script>alert(1)</script> dog"] * 30 + ["a cat \x1b[31m\u202e"] * 30 + [None]
    labels = np.array([0] * 30 + [1] * 30 + [1])
    first, second, third = cluster_names(labels, captions, 3)
    assert first == "1: alert, dog, script"
    assert second == "2: cat"
    assert third == "3"


def test_clusters_are_found_by_number_and_words() -> None:
    names = ["1: dog, park", "2: cat", "3"]
    for wanted, at in (("1", 0), ("Dog, Park", 0), ("2: cat", 1), ("3", 2), (" CAT ", 1)):
        assert find_cluster(names, wanted) == at
    for wanted in ("", "0", "4", "dog", ":"):
        assert find_cluster(names, wanted) is None


@pytest.mark.parametrize("samples", [0, 1, 7, 1500])
def test_near_duplicates_are_those_of_a_loop(samples: int) -> None:
    generator = np.random.default_rng(samples)
    values = generator.standard_normal((samples, 3)).astype(np.float32) * 5
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = unit.astype(np.float64) @ unit.T
    np.fill_diagonal(cosines, -1)
    wanted = [bool(len(row) and row.max() >= NEAR) for row in cosines]
    assert near_duplicates(torch.from_numpy(values)).tolist() == wanted


def test_near_duplicates_are_counted(pool: Pool, tmp_path: Path) -> None:
    values = np.eye(120, dtype=np.float32)
    values[7] = values[3] + 0.01
    values[9] = np.nan
    write_npz(tmp_path / "two" / "part.npz", uids=pool.uids, mine_img=values)
    found = first_features(pool, [(tmp_path / "two", "mine_img")])
    duplicates = group_samples(pool, found, progress=False, identifier=identify).find(DUPLICATE)
    assert duplicates is not None
    assert np.flatnonzero(duplicates.labels == 0).tolist() == [3, 7]
    assert np.flatnonzero(duplicates.labels == -1).tolist() == [9]
    assert first_features(pool, [(tmp_path / "two", "other_img")]) is None


def test_languages_are_told_where_they_can_be() -> None:
    pytest.importorskip("gcld3", reason="needs the extra: pip install siftclip[text]")
    captions = {
        "a dog runs after a ball in the park": "en",
        "ein Hund läuft im Park hinter dem Ball her": "de",
        "a red circle": None,  # CLD3 is sure of Javanese
        "IMG_0032.jpg 1234567890 1234567890": None,
        "": None,
        "<script>\x1b[31m\u202e\ud800": None,
    }
    assert SureLanguages()([*captions]) == [*captions.values()]


def test_clusters_need_some_samples_each() -> None:
    assert [count_clusters(n) for n in (0, 39, 40, 239, 240, 99_999, 100_000)] == [
        *(0, 0, 2, 11, 12, 12, 20)
    ]
