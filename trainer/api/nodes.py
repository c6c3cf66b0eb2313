"""A selector that was made in Python, as the node that a configuration would have for it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from torch import Tensor

import siftclip.selectors
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.description import ARGUMENTS, describe
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.trainer.settings.selector import SelectorNode

_OPEN = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
_TARGET = re.compile(r"^_target_: (\S+)$", re.MULTILINE)


def node_of_selector(
    selector: Selector, *, place: str, features: str, name: str | None = None
) -> SelectorNode:
    """Return the node of a selector.

    Args:
        selector: it is not changed.
        place: where it stands: "selector", or "online.selector".
        features: the name of the features that it reads where it names none.
        name: what folders and tables call it; None: what the command line calls its class.
    """
    bound = bind_features(selector, features)
    parameters = recorded_parameters(bound)
    name = selector_name(type(bound)) if name is None else name
    return SelectorNode(
        place=place,
        name=name,
        parameters=parameters,
        written={"name": name, **parameters},
        built=bound,
    )


def recorded_parameters(value: object) -> dict[str, Any]:
    """Return the class of an object and its parameters, as a configuration would have them.

    It is a record: nothing is ever built from it.
    """
    kind = type(value)
    public = getattr(siftclip.selectors, kind.__name__, None) is kind
    module = "siftclip.selectors" if public else kind.__module__
    return {
        "_target_": f"{module}.{kind.__qualname__}",
        **{name: _recorded(item) for name, item in _parameters(value).items()},
    }


def _parameters(value: object) -> dict[str, Any]:
    """Return the arguments of an object's constructor, also those that it was not given."""
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    given: dict[str, Any] = getattr(value, ARGUMENTS, {})
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    every = inspect.signature(type(value).__init__).parameters.values()
    signature = [each for each in every if each.kind not in _OPEN]
    named = [each.name for each in signature if each.name in attributes]
    defaults = {each.name: each.default for each in signature if each.default is not each.empty}
    # An attribute says more than the argument of its name, such as the features that were named;
    # but a mapping has names, which an attribute may have left out.
    named = [name for name in named if not isinstance(given.get(name), Mapping)]
    return defaults | given | {name: attributes[name] for name in named}


def _recorded(value: Any) -> Any:
    """Return a value as a configuration can hold it."""
    if isinstance(value, Mapping):
        return {str(name): _recorded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_recorded(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | Tensor) or not hasattr(value, "__dict__"):
        return recorded_parameters(value) if is_dataclass(value) else describe(value)
    return recorded_parameters(value)


def selector_name(kind: type) -> str:
    """Return what the command line calls a class of selectors; its own name in small letters else.

    Of several configurations with one class, that is the one with the class's name, or else the
    shortest.
    """
    target = f"siftclip.selectors.{kind.__name__}"
    return _names_by_target().get(target, kind.__name__.lower())


@functools.cache
def _names_by_target() -> dict[str, str]:
    names: dict[str, list[str]] = {}
    for file in files("siftclip.configs").joinpath("selector").iterdir():
        target = _TARGET.search(file.read_text(encoding="utf-8"))
        if target is not None:
            names.setdefault(target.group(1), []).append(file.name.removesuffix(".yaml"))
    return {target: _plainest(target.rpartition(".")[2], some) for target, some in names.items()}


def _plainest(kind: str, names: list[str]) -> str:
    def order(name: str) -> tuple[bool, int, str]:
        return name.replace("_", "") != kind.lower(), len(name), name

    return min(names, key=order)
