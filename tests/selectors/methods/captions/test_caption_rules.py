"""Rules on captions and sizes, against twins written as loops."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.selectors.methods.captions.caption_rules import (
    captions_with_entities,
    fasttext_tokens,
    large_images,
    long_captions,
    tokenized_captions,
)

TEXTS = st.lists(st.text(alphabet="ab é\n\t\r\v\f\0\u00a0\u2003", max_size=9), max_size=6)


@given(TEXTS, st.integers(0, 4), st.integers(0, 7))
def test_caption_rules_equal_slow_twins(
    captions: list[str], min_words: int, min_characters: int
) -> None:
    long = long_captions(captions, min_words=min_words, min_characters=min_characters)
    tokenized = tokenized_captions(captions, min_tokens=min_words, min_characters=min_characters)
    assert long.dtype == tokenized.dtype == bool
    for text, has_words, has_tokens in zip(captions, long, tokenized, strict=True):
        enough = len(text) >= min_characters
        assert has_words == (enough and len(re.findall(r"[^\s]+", text)) >= min_words)
        tokens = len(re.findall("[^ \n\t\r\v\f\0]+|\n", text))
        assert fasttext_tokens(text) == tokens
        assert has_tokens == (enough and tokens >= min_words)


# what fastText 0.9.2's own tokenizer answers
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a b", 2),
        ("a\nb", 3),
        ("a\n\nb", 4),
        (" a\t b ", 2),
        ("a\vb\fc\0d", 4),
        ("a\u00a0b", 1),
    ],
)
def test_fasttext_tokens(text: str, tokens: int) -> None:
    assert fasttext_tokens(text) == tokens


@given(st.text(alphabet="ab é\n\t\r\v\f\0\u00a0", max_size=12))
def test_fasttext_tokens_equal_the_package(text: str) -> None:
    fasttext = pytest.importorskip("fasttext")
    assert fasttext_tokens(text) == len(fasttext.tokenize(text))


def test_datacomp_limits_are_inclusive() -> None:
    captions = ["ab cd e", "a b cd", "a b c", "abcdef"]
    assert long_captions(captions, min_words=3, min_characters=6).tolist() == [
        True,
        True,
        False,
        False,
    ]


@given(st.lists(st.tuples(st.integers(-1, 700), st.integers(-1, 700)), min_size=1, max_size=9))
def test_large_images_equal_slow_twin(sizes: list[tuple[int, int]]) -> None:
    kept = large_images(np.array(sizes), min_side=200, max_aspect=3.0)
    expected = [min(s) >= 200 and max(s) / min(s) <= 3.0 for s in sizes]
    assert kept.tolist() == expected


@pytest.mark.parametrize(
    ("width", "height", "kept"),
    [(200, 600, True), (600, 200, True), (200, 601, False), (199, 300, False), (-1, -1, False),
     (0, 0, False), (-1, 400, False)],
)  # fmt: skip
def test_large_images_at_the_limits(width: int, height: int, kept: bool) -> None:
    sizes = np.array([[width, height]])
    assert large_images(sizes, min_side=200, max_aspect=3.0).tolist() == [kept]


def first_synset(word: str) -> int | None:
    return {"dog": 2084071, "run": 7460104, "runs": 7460104}.get(word.lower())


@given(
    st.lists(st.lists(st.sampled_from(["dog", "Dog", "run", "xyz", ""]), max_size=4), max_size=5)
)
def test_captions_with_entities_equal_slow_twin(words: Sequence[Sequence[str]]) -> None:
    captions = [" ".join(row) for row in words]
    kept = captions_with_entities(captions, first_synset, {2084071})
    assert kept.tolist() == [any(word.lower() == "dog" for word in row) for row in words]


def test_a_word_without_meaning_is_no_entity() -> None:
    assert captions_with_entities(["xyz", ""], first_synset, set()).tolist() == [False, False]
