"""Whether the numbers of an architecture can be those of a model, before anything is built of them.

open_clip takes what a file says: a million layers are built for hours, and no columns only show
when the weights do not fit.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from siftclip.errors import InputError

_SIZES = frozenset(
    {
        *("embed_dim", "width", "heads", "head_width", "layers", "patch_size", "image_size"),
        *("context_length", "vocab_size"),
    }
)
_MAX_LAYERS = 1_000
_LARGEST = 10_000_000  # vocabularies have up to a million words


def check_architecture(model_cfg: Mapping[str, Any], owner: str) -> None:
    """Check open_clip's `model_cfg`.

    Args:
        model_cfg: `embed_dim`, `vision_cfg`, `text_cfg` and so on.
        owner: what says so, for messages.

    Raises:
        InputError: a number of it cannot be one of a model.
    """
    for name, value in _leaves(model_cfg, ""):
        rule = _broken_rule(name.rpartition(".")[2], value)
        if rule is not None:
            raise InputError(f"{owner}: {name} must be {rule}. Got {reprlib.repr(value)}.")


def _broken_rule(name: str, value: object) -> str | None:
    """Say the rule that a value breaks; None if it breaks none."""
    is_size = name in _SIZES and value is not None
    if not _is_number(value):
        return "an integer of at least 1" if is_size else None
    if is_size and (value < 1 or value % 1):
        return "an integer of at least 1"
    most = _MAX_LAYERS if name == "layers" else _LARGEST
    return None if abs(value) <= most else f"a number of at most {most:,}"  # NaN is not


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leaves(node: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield the values of a tree by their dotted names; those of a list by the list's."""
    if isinstance(node, Mapping):
        for key, inner in node.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for inner in node:
            yield from _leaves(inner, name)
    else:
        yield name, node
