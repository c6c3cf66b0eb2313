"""What stands for a selector: its parameters as plain values, and the code and files behind them.

Answers that are kept are found again by this, so that it must tell apart whatever answers
differently. `siftclip.datamodules.identities` says what else a kept answer depends on.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

ARGUMENTS = "_arguments"  # where a selector records what its constructor was given
_OF_THE_RULE = ("fraction", "threshold", "rule", "of")  # arguments that a rule stands for


@dataclass(slots=True)
class Behind:
    """What a description mentions: the code that acts, and texts that may be names of files."""

    code: set[type | FunctionType] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)


def describe(value: Any, behind: Behind | None = None, *, without: tuple[str, ...] = ()) -> Any:
    """A value as plain JSON types that stand for it: a selector by its class and parameters.

    The public attributes of an object are its parameters. What begins with an underscore is state
    that follows from them; arguments of a selector's constructor that it keeps in such attributes
    alone are parameters, too. Of objects that are not ours all attributes count.

    Args:
        value: of any type.
        behind: takes up the classes, functions and texts that the value consists of.
        without: names of attributes of `value` itself that do not count.

    Raises:
        TypeError: nothing tells the value from others: it has no attributes, or no name, such as a
            lambda.
    """
    behind = Behind() if behind is None else behind
    if isinstance(value, enum.Enum):
        behind.code.add(type(value))
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if isinstance(value, str):
        behind.texts.add(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.generic, os.PathLike)):
        return describe(value.item() if isinstance(value, np.generic) else os.fspath(value), behind)
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (type, FunctionType)) and "<" not in value.__qualname__:
        behind.code.add(value)
        return _name(value)
    if isinstance(value, (np.ndarray, Tensor)):
        return _described_array(value)
    if isinstance(value, Mapping):
        described = {str(key): describe(item, behind) for key, item in value.items()}
        # The order counts where it is not that of the alphabet, in which identities are hashed.
        in_order = list(described) == sorted(described)
        return described if in_order else {**described, "order": list(described)}
    if isinstance(value, (list, tuple)):
        return [describe(item, behind) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((describe(item, behind) for item in value), key=repr)}
    if isinstance(value, functools.partial):
        parts = {"function": value.func, "arguments": value.args, "keywords": value.keywords}
        return {"partial": describe(parts, behind)}
    if isinstance(value, MethodType):
        return {"method": value.__name__, "of": describe(value.__self__, behind)}
    if isinstance(value, torch.nn.Module):
        behind.code.add(type(value))
        return {"class": _name(type(value)), "weights": describe(value.state_dict(), behind)}
    return _described_object(value, behind, without)


def _described_object(value: Any, behind: Behind, without: tuple[str, ...]) -> dict[str, Any]:
    attributes = _attributes(value)
    if attributes is None or isinstance(value, (type, FunctionType)):
        raise TypeError(
            f"a {type(value).__name__} cannot be a parameter of a selector: {value!r}. Keep it in "
            "an attribute that begins with an underscore, and what decides about it in others."
        )
    behind.code.add(type(value))
    ours = type(value).__module__.partition(".")[0] == "siftclip" or ARGUMENTS in attributes
    chosen = {
        name: item
        for name, item in attributes.items()
        if not (name.startswith("_") and (ours or name.startswith("__"))) and name not in without
    }
    described = {name: describe(item, behind) for name, item in chosen.items()}
    private = {
        name: item
        for name, item in attributes.get(ARGUMENTS, {}).items()
        if name not in attributes and not ("rule" in attributes and name in _OF_THE_RULE)
    }
    if private:
        described["arguments"] = describe(private, behind)
    return {"class": _name(type(value)), **described}


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object by name, without cached properties; None if it can have none."""
    slots = [
        name
        for kind in type(value).__mro__
        for name in _slots_of(kind)
        if name not in ("__dict__", "__weakref__")
    ]
    if not slots and not hasattr(value, "__dict__"):
        return None
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    found |= getattr(value, "__dict__", {})
    return {
        name: item
        for name, item in found.items()
        if not isinstance(getattr(type(value), name, None), functools.cached_property)
    }


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _described_array(value: np.ndarray | Tensor) -> dict[str, Any]:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif value.dtype.hasobject:
        raise TypeError("an array of objects cannot be a parameter of a selector")
    else:
        data = np.ascontiguousarray(value).tobytes()
    return {"array": [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]}


def _name(value: type | FunctionType) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def nested(value: Any, kind: type[T]) -> Iterator[T]:
    """The objects of a kind in a value and its public attributes: a composition's members."""
    if isinstance(value, kind):
        yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from nested(item, kind)
    elif hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            if not name.startswith("_"):
                yield from nested(item, kind)
