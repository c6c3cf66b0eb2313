"""Words that tell two sets of captions apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import log, sqrt

_WORD = re.compile(r"[^\W\d_]{2,40}")
_LEAST = 5  # captions that have a word


@dataclass(frozen=True, slots=True, kw_only=True)
class WordShare:
    """How often a word is in the captions of two sets."""

    word: str
    first: float  # share of the captions that have it
    second: float
    z: float  # of the logarithm of the ratio of odds; positive: more often in the first


def telling_words(first: Iterable[str], second: Iterable[str], count: int) -> list[WordShare]:
    """Return the words that tell two sets apart most, a caption counting once for each word.

    By the z score of the log odds ratio with half a caption added everywhere (Haldane, Anscombe):
    rare words need large ratios. Texts are compared without case.

    Args:
        first: captions of one set.
        second: captions of the other.
        count: how many words of each set at most; those with |z| < 2 are left out.

    Returns:
        Those of the first set, most telling first, then those of the second, least telling first.

    Examples:
        >>> from siftclip.eval.significance.words import telling_words
        >>> found = telling_words(["a red dog"] * 9, ["a red cat"] * 9, 3)
        >>> [share.word for share in found]
        ['dog', 'cat']
    """
    counts, sizes = [], []
    for captions in (first, second):
        counter: Counter[str] = Counter()
        size = 0
        for caption in captions:
            counter.update({word.lower() for word in _WORD.findall(caption)})
            size += 1
        counts.append(counter)
        sizes.append(size)
    shares = []
    for word in counts[0].keys() | counts[1].keys():
        a, b = counts[0][word], counts[1][word]
        if a + b < _LEAST:
            continue
        rest_a, rest_b = sizes[0] - a, sizes[1] - b
        odds = log((a + 0.5) / (rest_a + 0.5)) - log((b + 0.5) / (rest_b + 0.5))
        spread = sqrt(1 / (a + 0.5) + 1 / (rest_a + 0.5) + 1 / (b + 0.5) + 1 / (rest_b + 0.5))
        share = WordShare(
            word=word, first=a / max(1, sizes[0]), second=b / max(1, sizes[1]), z=odds / spread
        )
        if abs(share.z) >= 2:
            shares.append(share)
    shares.sort(key=lambda share: (-share.z, share.word))
    return [share for share in shares if share.z > 0][:count] + [
        share for share in shares if share.z < 0
    ][-count:]
