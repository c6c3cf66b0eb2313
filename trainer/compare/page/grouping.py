"""Groups of samples and what they are called: pure functions on labels, captions and features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from siftclip.eval.significance.words import telling_words

CLUSTER = "cluster of images"
LANGUAGE = "caption language"
DUPLICATE = "near duplicates"
OTHER = "other languages"
UNKNOWN = "unknown"
NEAR = 0.95  # cosine of two images
_TILE = 1024  # of them at once
_UNDETERMINED = "und"  # CLD3's and fastText's word
_CLUSTERS, _MORE_CLUSTERS = 12, 20
_LARGE_POOL = 100_000  # from here on there are more
SAMPLES_EACH = 20  # on average at least; with fewer there are fewer clusters
_WORDS = 3  # of the name of a cluster
_MOST_LANGUAGES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """A property of samples that has a few values."""

    title: str
    labels: np.ndarray  # int64 [n], index into `names`; -1: not known
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How the samples of a pool are grouped, and what is to be said of it."""

    groupings: tuple[Grouping, ...] = ()
    notes: tuple[str, ...] = ()

    def find(self, title: str) -> Grouping | None:
        """Return the grouping of that title, if there is one."""
        return next((each for each in self.groupings if each.title == title), None)


def count_clusters(samples: int) -> int:
    """Return how many clusters a number of samples is cut into; 0 where there are too few."""
    count = min(_CLUSTERS if samples < _LARGE_POOL else _MORE_CLUSTERS, samples // SAMPLES_EACH)
    return count if count > 1 else 0


def by_size(labels: np.ndarray) -> np.ndarray:
    """Renumber groups without gaps, the largest first, of equal ones the one with the lower number.

    Args:
        labels: int [n], -1 for none.

    Returns:
        int64 [n], -1 where there was none.
    """
    counts = np.bincount(labels[labels >= 0])
    order = np.argsort(-counts, kind="stable")
    renamed = np.empty(len(counts) + 1, dtype=np.int64)
    renamed[order] = np.arange(len(counts))
    renamed[-1] = -1  # what the label -1 takes
    numbered: np.ndarray = renamed[labels]
    return numbered


def cluster_names(labels: np.ndarray, texts: Sequence[str | None], count: int) -> list[str]:
    """Name clusters by their number, from 1, and the words that tell their captions apart.

    Args:
        labels: int64 [k], the clusters of some samples; -1 for none.
        texts: their k captions; None where there is none.
        count: of the clusters.
    """
    known = [(label, text) for label, text in zip(labels.tolist(), texts, strict=True) if text]
    names = []
    for number in range(count):
        inside = [text for label, text in known if label == number]
        outside = [text for label, text in known if label != number]
        shares = telling_words(inside, outside, _WORDS)
        words = ", ".join(share.word for share in shares if share.z > 0)
        names.append(f"{number + 1}: {words}" if words else str(number + 1))
    return names


def near_duplicates(features: torch.Tensor) -> np.ndarray:
    """Find vectors with another one at a cosine of at least `NEAR`: bool [k].

    Args:
        features: float [k, d], finite.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    found = torch.zeros(len(unit), dtype=torch.bool)
    for start in range(0, len(unit), _TILE):
        products = unit[start : start + _TILE] @ unit.T
        at = torch.arange(len(products))
        products[at, start + at] = -1.0  # itself
        found[start : start + _TILE] = products.max(dim=1).values >= NEAR
    return found.numpy()


def language_name(code: str | None) -> str:
    """Return what a report calls a language that an identifier has told."""
    return UNKNOWN if code in (None, "", _UNDETERMINED) else str(code)


def grouped_languages(codes: Sequence[str | None]) -> tuple[np.ndarray, list[str]]:
    """Group captions by their languages; rare ones are one group.

    Args:
        codes: of k captions; None where it is unknown.

    Returns:
        Labels int64 [k], and the names of the groups, the most frequent first.
    """
    known = [language_name(code) for code in codes]
    counts = Counter(code for code in known if code != UNKNOWN)
    order = sorted(counts, key=lambda code: (-counts[code], code))
    names = order[:_MOST_LANGUAGES] + [OTHER] * (len(order) > _MOST_LANGUAGES)
    names += [UNKNOWN] * (UNKNOWN in known)
    places = {name: at for at, name in enumerate(names)}
    other = places.get(OTHER, -1)
    return np.array([places.get(code, other) for code in known], dtype=np.int64), names
