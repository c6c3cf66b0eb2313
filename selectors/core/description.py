"""What stands for a selector: its parameters as plain values, and the code and files behind them.

Answers that are kept are found again by this, so that it must tell apart whatever answers
differently. `siftclip.datamodules.identity.identities` says what else a kept answer depends on.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from siftclip.aliases import old_name

T = TypeVar("T")

ARGUMENTS = "_arguments"  # where a selector records what its constructor was given
_OF_THE_RULE = ("fraction", "threshold", "rule", "of")  # arguments that a rule stands for


@dataclass(slots=True)
class Behind:
    """What a description mentions: the code that acts, and texts that may be names of files."""

    code: set[type | FunctionType] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    open: list[int] = field(default_factory=list)  # ids of the objects that are being described


def describe(value: Any, behind: Behind | None = None, *, without: tuple[str, ...] = ()) -> Any:
    """Describe a value in plain JSON types: a selector by its class and parameters.

    The public attributes of an object are its parameters. What begins with an underscore is state
    that follows from them; arguments of a selector's constructor that it keeps in such attributes
    alone, or that differ from the attribute of their name, are parameters, too. Of objects that are
    not ours all attributes count, or what pickle would keep of those that say so themselves.

    Args:
        value: of any type.
        behind: takes up the classes, functions and texts that the value consists of.
        without: names of attributes of `value` itself that do not count.

    Raises:
        TypeError: nothing tells the value from others: it has no attributes, or no name, such as a
            lambda.
    """
    behind = Behind() if behind is None else behind
    for kinds, encode in _ENCODINGS:
        if isinstance(value, kinds):
            return encode(value, behind)
    return _described_object(value, behind, without)


def _described_member(value: enum.Enum, behind: Behind) -> str:
    behind.code.add(type(value))
    return f"{stored_name(type(value))}.{value.name}"


def _described_text(value: str, behind: Behind) -> str:
    behind.texts.add(value)
    return value


def _described_code(value: type | FunctionType, behind: Behind) -> Any:
    if "<" in value.__qualname__:  # a lambda, or local to a function
        return _described_object(value, behind, without=())
    behind.code.add(value)
    return stored_name(value)


def _described_array(value: np.ndarray | Tensor, _: Behind) -> dict[str, Any]:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif value.dtype.hasobject:
        raise TypeError("an array of objects cannot be a parameter of a selector")
    else:
        data = np.ascontiguousarray(value).tobytes()
    return {"array": [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]}


def _described_mapping(value: Mapping[Any, Any], behind: Behind) -> dict[str, Any]:
    described = {str(key): describe(item, behind) for key, item in value.items()}
    # The order counts where it is not that of the alphabet, in which identities are hashed.
    in_order = list(described) == sorted(described)
    return described if in_order else {**described, "order": list(described)}


def _described_list(value: Iterable[Any], behind: Behind) -> list[Any]:
    return [describe(item, behind) for item in value]


def _described_set(value: Iterable[Any], behind: Behind) -> dict[str, Any]:
    return {"set": sorted(_described_list(value, behind), key=repr)}


def _described_partial(value: functools.partial[Any], behind: Behind) -> dict[str, Any]:
    parts = {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    return {"partial": describe(parts, behind)}


def _described_method(value: MethodType, behind: Behind) -> dict[str, Any]:
    return {"method": value.__name__, "of": describe(value.__self__, behind)}


def _described_module(value: torch.nn.Module, behind: Behind) -> dict[str, Any]:
    behind.code.add(type(value))
    return {"class": stored_name(type(value)), "weights": describe(value.state_dict(), behind)}


# The first whose types a value has describes it: an enum may be a string, too, and numpy's bytes
# are bytes. What has none of them is an object with attributes.
_ENCODINGS: tuple[tuple[Any, Callable[[Any, Behind], Any]], ...] = (
    (enum.Enum, _described_member),
    (float, lambda value, _: value if math.isfinite(value) else str(value)),  # JSON has no infinity
    (str, _described_text),
    ((bool, int, NoneType), lambda value, _: value),
    (np.generic, lambda value, behind: describe(value.item(), behind)),
    (os.PathLike, lambda value, behind: describe(os.fspath(value), behind)),
    (bytes, lambda value, _: {"bytes": hashlib.sha256(value).hexdigest()}),
    ((torch.dtype, torch.device), lambda value, _: str(value)),
    (ModuleType, lambda value, _: {"module": value.__name__}),
    ((type, FunctionType), _described_code),
    ((np.ndarray, Tensor), _described_array),
    (Mapping, _described_mapping),
    ((list, tuple), _described_list),
    ((set, frozenset), _described_set),
    (functools.partial, _described_partial),
    (MethodType, _described_method),
    (torch.nn.Module, _described_module),
)


def _described_object(value: Any, behind: Behind, without: tuple[str, ...]) -> dict[str, Any]:
    if id(value) in behind.open:  # it contains itself
        return {"again": behind.open.index(id(value))}
    behind.open.append(id(value))
    try:
        return _described_parts(value, behind, without)
    finally:
        behind.open.pop()


def _described_parts(value: Any, behind: Behind, without: tuple[str, ...]) -> dict[str, Any]:
    attributes = None if isinstance(value, (type, FunctionType)) else _attributes(value)
    of_siftclip = type(value).__module__.partition(".")[0] == "siftclip"
    ours = of_siftclip or ARGUMENTS in (attributes or {})
    pickled = None if ours else _pickled(value)
    if pickled is not None:
        behind.code.add(type(value))
        return {"class": stored_name(type(value)), "pickled": describe(pickled, behind)}
    if attributes is None:
        raise TypeError(
            f"a {type(value).__name__} cannot be a parameter of a selector: {value!r}. Keep it in "
            "an attribute that begins with an underscore, and what decides about it in others."
        )
    behind.code.add(type(value))
    chosen = {
        name: item
        for name, item in attributes.items()
        if not (name.startswith("_") and (ours or name.startswith("__"))) and name not in without
    }
    described = {name: describe(item, behind) for name, item in chosen.items()}
    private = {
        name: item
        for name, item in attributes.get(ARGUMENTS, {}).items()
        if not ("rule" in attributes and name in _OF_THE_RULE)
        and (name not in attributes or (not of_siftclip and _differs(item, attributes[name])))
    }
    if private:
        described["arguments"] = describe(private, behind)
    return {"class": stored_name(type(value)), **described}


def _differs(argument: Any, attribute: Any) -> bool:
    """Return whether an attribute may hold less than the argument of its name it was made from."""
    if argument is attribute:
        return False
    try:
        return bool(describe(argument) != describe(attribute))
    except TypeError:  # such as an iterator, of which the attribute has the items
        return False


def _pickled(value: Any) -> list[Any] | None:
    """Return what pickle keeps of an object whose class says itself what that is; else None.

    Such as a regular expression, a date, a generator of random numbers, a table. Nothing is called
    but the object's own code, and nothing is read from anywhere.
    """
    kind = type(value)
    if isinstance(value, (type, FunctionType)):
        return None
    reduce = copyreg.dispatch_table.get(kind)
    methods = ("__reduce__", "__reduce_ex__", "__getstate__")
    if reduce is None and all(
        getattr(kind, name, None) is getattr(object, name, None) for name in methods
    ):
        return None
    try:
        parts = value.__reduce_ex__(2) if reduce is None else reduce(value)
    except Exception:  # a class may refuse in any way
        return None
    if isinstance(parts, str):  # the name of something that is no class of a project
        return None
    builder, *rest = parts
    name = getattr(builder, "__qualname__", type(builder).__qualname__)
    return [name, *(list(part) if isinstance(part, Iterator) else part for part in rest)]


def _attributes(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, without cached properties; None if it can have none."""
    slots = [
        name
        for kind in type(value).__mro__
        for name in _slots_of(kind)
        if name not in ("__dict__", "__weakref__")
    ]
    if not slots and not hasattr(value, "__dict__"):
        return None
    attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    attributes |= getattr(value, "__dict__", {})
    return {
        name: item
        for name, item in attributes.items()
        if not isinstance(getattr(type(value), name, None), functools.cached_property)
    }


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def stored_name(value: type | FunctionType) -> str:
    """Return the name of a class or function in stored results: by its module's first name."""
    return f"{old_name(value.__module__)}.{value.__qualname__}"


def nested(value: Any, kind: type[T]) -> Iterator[T]:
    """Yield the objects of a kind in a value, its public attributes and constructor arguments.

    Each once: a composition's members, wherever it keeps them.
    """
    return _nested(value, kind, set())


def _nested(value: Any, kind: type[T], seen: set[int]) -> Iterator[T]:
    if isinstance(value, (str, bytes, np.ndarray, Tensor)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, kind):
        yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _nested(item, kind, seen)
        return
    is_code = isinstance(value, (type, ModuleType, FunctionType))
    attributes = {} if is_code else _attributes(value) or {}
    for name, item in attributes.items():
        if name == ARGUMENTS or not name.startswith("_"):
            yield from _nested(item, kind, seen)
