"""MetaCLIP's matching and balancing, against twins written as loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from siftclip.errors import InputError
from siftclip.hashing import mix64
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.noise import noise, noise_state
from siftclip.selectors.core.source import Chunk, DictCache
from siftclip.selectors.methods.captions.metaclip import (
    Matcher,
    MetaClip,
    draw_balanced,
    entry_state,
    keep_probabilities,
    match_all,
    parse_entries,
)

PIECES = st.sampled_from(
    ["a", "b", "ab", "A", "é", " ", "  ", ",", ".", "`", "-", "\n", "\t", "\v", "\0", "\u00a0"]
)
ENTRY = st.lists(PIECES, min_size=1, max_size=5).map("".join)
CAPTION = st.lists(PIECES, max_size=14).map("".join)


def matches_slowly(entries: list[str], caption: str) -> list[int]:
    """Look for each entry between spaces, as a part of the padded caption."""
    text = f" {caption} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for space in "\t\n\r":
        text = text.replace(space, " ")
    return [number for number, entry in enumerate(entries) if f" {entry} " in text]


@given(st.lists(ENTRY, min_size=1, max_size=10, unique=True), CAPTION)
def test_matches_equal_substrings_of_the_padded_caption(entries: list[str], caption: str) -> None:
    assert Matcher(entries)(caption) == matches_slowly(entries, caption)


def test_matches_whole_words_and_phrases() -> None:
    matcher = Matcher(["cat", "black cat", "cats", "u.s.", "Cat", "the"])
    assert matcher("the black cat, sitting") == [0, 1, 5]
    assert matcher("concatenate") == []
    assert matcher("the u.s.") == [5]  # its own marks are padded: such an entry never matches
    assert matcher("") == []


def test_match_all_joins_the_entries_of_captions() -> None:
    numbers, lengths = match_all(Matcher(["a", "b"]), ["b a", "", "a a"])
    assert numbers.tolist() == [0, 1, 0]
    assert lengths.tolist() == [2, 0, 1]
    assert numbers.dtype == lengths.dtype == np.int32


def test_keep_probabilities() -> None:
    counts = np.array([0, 1, 20, 40])
    assert keep_probabilities(counts, 20).tolist() == [1, 1, 1, 0.5]


@given(
    st.lists(st.lists(st.integers(0, 3), unique=True), min_size=1, max_size=8), st.integers(0, 9)
)
def test_drawing_equals_slow_twin(matches: list[list[int]], seed: int) -> None:
    uids = np.random.default_rng(seed).integers(0, 2**63, (len(matches), 2)).astype(np.uint64)
    probabilities, states = np.array([0.1, 0.5, 0.9, 1.0]), entry_state(["a", "b", "c", "d"])
    kept = draw_balanced(
        uids,
        np.array([number for row in matches for number in row], dtype=np.int32),
        np.array([len(row) for row in matches], dtype=np.int32),
        probabilities,
        states,
        seed=seed,
    )
    for i, row in enumerate(matches):
        numbers = [
            noise(mix64(noise_state(uids[i : i + 1], seed) ^ states[e : e + 1]), 0)[0] for e in row
        ]
        assert kept[i] == any(u < probabilities[e] for u, e in zip(numbers, row, strict=True))


def test_draws_of_entries_are_independent() -> None:
    samples = 20_000
    uids = np.random.default_rng(1).integers(0, 2**63, (samples, 2)).astype(np.uint64)
    kept = draw_balanced(
        uids,
        np.tile(np.array([0, 1], dtype=np.int32), samples),
        np.full(samples, 2, dtype=np.int32),
        np.array([0.3, 0.2]),
        entry_state(["a", "b"]),
        seed=4,
    )
    assert binomtest(int(kept.sum()), samples, 1 - 0.7 * 0.8).pvalue > 1e-4


def make_source(captions: list[str], **options: Any) -> MemorySource:
    rows = np.arange(len(captions))
    uids = np.stack([rows * 7, rows], axis=1).astype(np.uint64)
    return MemorySource(Chunk(rows=rows, uids=uids, captions=captions), **options)


@pytest.fixture
def entries(tmp_path: Path) -> str:
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(["red", "blue", "on a", "seven", "seven", "  "]))
    return str(path)


def test_rare_entries_keep_all_and_frequent_ones_are_thinned(entries: str) -> None:
    captions = ["red"] * 4000 + ["blue"] * 50 + ["nothing"] * 10
    kept = MetaClip(entries=entries, t=100, seed=0).select(make_source(captions)).multiplicities
    assert kept[4000:4050].all()
    assert not kept[4050:].any()
    assert 60 < kept[:4000].sum() < 140


def test_answer_follows_the_text_of_entries_not_their_order(entries: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("seven\n\nblue\non a\nred\n")
    source = make_source(["red seven", "blue", "on a seven", "red"] * 50)
    first, second = (
        MetaClip(entries=path, t=10, seed=3).select(source).multiplicities
        for path in (entries, str(other))
    )
    assert 0 < first.sum() < 200
    assert np.array_equal(first, second)


def test_finished_tasks_are_not_matched_again(
    entries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DictCache()
    source = make_source(["red", "blue on a", ""] * 20, part_samples=16)
    monkeypatch.setattr(source, "cache", lambda selector: cache)
    first = MetaClip(entries=entries, t=5, seed=3).select(source).multiplicities
    monkeypatch.setattr(source, "take", None)
    again = MetaClip(entries=entries, t=5, seed=3).select(source).multiplicities
    assert np.array_equal(first, again)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree(entries: str, run_on_ranks: Callable[..., list[Any]], size: int) -> None:
    captions = ["red seven", "blue", "on a seven", "red", "x"] * 30

    def select(ranks: Any) -> list[int]:
        source = make_source(captions, part_samples=13, ranks=ranks)
        return MetaClip(entries=entries, t=10, seed=3).select(source).multiplicities.tolist()

    alone = run_on_ranks(1, select)[0]
    assert run_on_ranks(size, select) == [alone] * size


def test_contract(entries: str) -> None:
    check_selector(lambda: MetaClip(entries=entries, t=20, seed=1))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "must be a JSON list of texts"),
        ("a.json", "[1]", "must be a JSON list of texts"),
        ("a.json", "[", "is not JSON"),
        ("a.txt", "\n \n", "has no entries"),
    ],
)
def test_a_wrong_list_is_named(name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"{name} {message}"):
        parse_entries(name, text)


def test_entries_are_lines_or_a_json_list() -> None:
    assert parse_entries("a.txt", "a b\r\n\nc\u2028d\na b\n") == ["a b", "c\u2028d"]
    assert parse_entries("a.json", '["a b", "c\\nd", ""]') == ["a b", "c\nd"]


def test_a_missing_list_is_named() -> None:
    selector = MetaClip(entries="missing.txt", t=1, seed=0)
    with pytest.raises(InputError, match=r"^MetaClip: entries cannot be read: .*missing.txt"):
        selector.select(make_source(["a"]))


def test_a_changed_list_is_matched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache, source = tmp_path / "a.txt", DictCache(), make_source(["red", "blue"])
    monkeypatch.setattr(source, "cache", lambda selector: cache)
    for word, kept in (("red", [1, 0]), ("blue", [0, 1])):
        path.write_text(word)
        selector = MetaClip(entries=str(path), t=5, seed=3)
        assert selector.select(source).multiplicities.tolist() == kept


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"t": 0}, "t must be"), ({"seed": -1}, "seed must be")],
)
def test_wrong_parameters_are_named(parameters: dict[str, int], message: str) -> None:
    def make() -> Selector:
        return MetaClip(entries="a.txt", **{"t": 1, "seed": 0, **parameters})

    with pytest.raises(InputError, match=message):
        make()
