"""The filters of `siftclip show`: which samples of a selection pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from siftclip.errors import InputError
from siftclip.tables import listed
from siftclip.trainer.compare.page.captions import read_captions
from siftclip.trainer.compare.page.grouping import CLUSTER, language_name
from siftclip.trainer.compare.page.languages import SureLanguages
from siftclip.trainer.compare.page.pool_view import PoolView
from siftclip.trainer.settings.subsets import ShowSettings

FILTERS = ("text", "min_score", "max_score", "cluster", "language")


def passing_rows(
    show: ShowSettings, view: PoolView, name: str, *, progress: bool = False
) -> np.ndarray:
    """Return the rows that a selection keeps and that pass the filters: int64, ascending.

    Args:
        show: the filters.
        view: of the pool, with the selection.
        name: of the selection.
        progress: show a bar while captions are read.

    Raises:
        InputError: a filter needs what is not there, or nothing passes.
    """
    rows = np.flatnonzero(view.kept[name] > 0)
    if show.min_score is not None or show.max_score is not None:
        rows = rows[_within(show, view.scores.get(name), rows)]
    if show.cluster is not None:
        rows = rows[_in_cluster(view, rows, str(show.cluster))]
    if show.text is not None or show.language is not None:
        captions = read_captions(view.pool, rows, progress=progress)
        keeps = np.array([text is not None for text in captions], dtype=bool)
        if show.text is not None:
            wanted = show.text.lower()
            keeps &= [text is not None and wanted in text.lower() for text in captions]
        if show.language is not None:
            texts = [text for text, keep in zip(captions, keeps, strict=True) if keep and text]
            keeps &= [bool(text) for text in captions]
            keeps[keeps] = written_in(texts, show.language)
        rows = rows[keeps]
    if not len(rows):
        given = [f"show.{each}={getattr(show, each)!r}" for each in FILTERS]
        typed = [text for each, text in zip(FILTERS, given, strict=True) if _is_set(show, each)]
        raise InputError(
            f"Nothing of {name} passes {' and '.join(typed) or 'at all: it is empty'}."
        )
    return rows


def written_in(captions: Sequence[str], language: str) -> np.ndarray:
    """Find the captions in a language, see `SureLanguages`: bool [k].

    Raises:
        InputError: there are captions, and none is in that language; or CLD3 is not installed.
    """
    names = [language_name(code) for code in SureLanguages()(captions)]
    found = np.array([name == language for name in names], dtype=bool)
    if names and not found.any():
        counts = Counter(names).most_common()
        there = listed([f"{each} ({count:,})" for each, count in counts])
        raise InputError(
            f"show.language must be the code of a language that the captions are in. Got "
            f"{language!r}. There are: {there}."
        )
    return found


def find_cluster(names: Sequence[str], wanted: str) -> int | None:
    """Find a cluster by its number, its words or both, as in "3: dog, park"; None without one."""
    wanted = wanted.strip().lower()
    for at, name in enumerate(names):
        number, _, words = name.lower().partition(": ")
        if wanted and wanted in (number, words, name.lower()):
            return at
    return None


def _is_set(show: ShowSettings, name: str) -> bool:
    return getattr(show, name) is not None


def _within(show: ShowSettings, scores: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Return which rows have a score within the bounds: bool [k]."""
    if scores is None:
        raise InputError(
            "show.min_score and show.max_score need scores: show.scores=FILE, or show.column of "
            "the pool's metadata."
        )
    low = -np.inf if show.min_score is None else show.min_score
    high = np.inf if show.max_score is None else show.max_score
    within: np.ndarray = (scores[rows] >= low) & (scores[rows] <= high)
    return within


def _in_cluster(view: PoolView, rows: np.ndarray, wanted: str) -> np.ndarray:
    """Return which rows are in a cluster: bool [k]."""
    clusters = view.groups.find(CLUSTER)
    if clusters is None:
        raise InputError(
            "show.cluster needs clusters of images, by at least 40 features: show.features=FOLDER "
            "names a folder of them, and siftclip embed makes them."
        )
    at = find_cluster(clusters.names, wanted)
    if at is None:
        raise InputError(
            f"show.cluster must be the number or the words of a cluster. Got {wanted!r}. There "
            f"are: {'; '.join(clusters.names)}."
        )
    inside: np.ndarray = clusters.labels[rows] == at
    return inside
