"""Rules on captions and image sizes, as in DataComp's baselines (arXiv 2304.14108, section 4).

They were written after the rules of the released code, which are stated at each function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

_FASTTEXT_SPACES = str.maketrans(dict.fromkeys("\n\r\t\v\f\0", " "))


def long_captions(captions: Sequence[str], *, min_words: int, min_characters: int) -> np.ndarray:
    """Find the captions with enough words, split at white space, and characters: bool [n].

    DataComp's basic filter asks for more than 2 words and more than 5 characters.
    """
    return np.fromiter(
        (len(text) >= min_characters and len(text.split()) >= min_words for text in captions),
        dtype=bool,
        count=len(captions),
    )


def fasttext_tokens(text: str) -> int:
    """Count the tokens that fastText makes of a text.

    Its tokenizer splits at ASCII white space and NUL, not at other spaces, and each line feed is a
    token of its own.
    """
    words = text.translate(_FASTTEXT_SPACES).split(" ")
    return sum(map(bool, words)) + text.count("\n")


def tokenized_captions(
    captions: Sequence[str], *, min_tokens: int, min_characters: int
) -> np.ndarray:
    """Find the captions with enough fastText tokens and characters: bool [n].

    DataComp's image-based filter asks for more than 1 token and more than 5 characters.
    """
    return np.fromiter(
        (len(text) >= min_characters and fasttext_tokens(text) >= min_tokens for text in captions),
        dtype=bool,
        count=len(captions),
    )


def large_images(sizes: np.ndarray, *, min_side: int, max_aspect: float) -> np.ndarray:
    """Find the images that are large, and not too far from square: bool [n].

    DataComp's basic filter asks for a shorter side of at least 200 pixels, and for a longer one of
    at most 3.0 times as much.

    Args:
        sizes: int64 [n, 2], width and height; not above 0 where unknown, which fails.
        min_side: in pixels, at least 1.
        max_aspect: of the longer side to the shorter one.
    """
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    passes: np.ndarray = (shorter >= min_side) & (longer / np.maximum(shorter, 1) <= max_aspect)
    return passes


def captions_with_entities(
    captions: Sequence[str],
    first_synset: Callable[[str], int | None],
    entities: Collection[int],
) -> np.ndarray:
    """Find the captions with a word whose most common meaning is one of the entities: bool [n].

    Words are split at white space. As in the released code, the meaning is the first synset of any
    part of speech, and its number alone is compared: a verb with the number of a wanted noun
    counts too.

    Args:
        captions: n texts.
        first_synset: a word -> the WordNet offset of its first synset, None if it has none.
        entities: WordNet offsets; a set, to be fast.
    """
    return np.fromiter(
        (any(first_synset(word) in entities for word in text.split()) for text in captions),
        dtype=bool,
        count=len(captions),
    )
