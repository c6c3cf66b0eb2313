"""Which feature set a selector reads: named when it is built, or left to whoever has the features.

A selector that is built without a name, such as `ClipScore(fraction=0.3)`, is the same for any
model's features; `bind_features` names them before it is used.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from siftclip.selectors.core.description import nested
from siftclip.selectors.core.source import IMAGE, ReadsFeatures

T = TypeVar("T")


def bind_features(selector: T, name: str) -> T:
    """Name the features of a selector, and of all that it is composed of, where none are named.

    Args:
        selector: it is not changed.
        name: of the feature set, such as "l14".

    Returns:
        A copy with the names; the selector itself if it has them all.
    """
    if not any(_is_open(part) for part in nested(selector, ReadsFeatures)):
        return selector
    bound = copy.deepcopy(selector)
    name_features(bound, name)
    return bound


def name_features(selector: object, name: str) -> None:
    """Name the features of a selector that nobody else uses yet, as `bind_features`."""
    for part in nested(selector, ReadsFeatures):
        if "features" in vars(part) and part.features is None:
            part.features = name
        if "key" in vars(part) and part.key is None:
            part.key = f"{name}_{IMAGE}"


def _is_open(part: ReadsFeatures) -> bool:
    return any(vars(part).get(parameter, "") is None for parameter in ("features", "key"))
