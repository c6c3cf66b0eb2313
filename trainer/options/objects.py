"""Builds the objects that a part of the configuration describes, and knows where each one stands.

A node with a `_target_` becomes what that class or function makes of the node's other entries, as
with Hydra's `instantiate`; `_args_`, `_partial_`, `_convert_` and `_recursive_` mean the same.
Selectors know nothing of options; what is wrong with their parameters is told here by the option,
when they are built and later.
"""

from __future__ import annotations

import difflib
import functools
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from siftclip.errors import (
    InputError,
    ParameterError,
    call_by_name,
    full_name_of,
    name_of,
    takes_name,
)
from siftclip.reading import in_one_line
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.description import nested
from siftclip.trainer.settings.selector import plugin_option

_OF_HYDRA = ("_target_", "_convert_", "_recursive_", "_partial_")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an object stands in the configuration."""

    path: str  # of the node, such as selector.stages.vas
    node: Mapping[str, Any]
    target: Callable[..., Any]

    def subject(self, error: ParameterError) -> str:
        """Return the option that a fault of a parameter is told with, or else the node's."""
        parameter, owner = error.parameter, name_of(error.owner)
        if parameter is None:
            return f"{self.path}: {owner}"
        of_plugin = plugin_option(self.node, parameter)
        if of_plugin is not None:
            return f"{self.path}.{of_plugin}"
        if _has(self.node, parameter.split(".")):
            return f"{self.path}.{parameter}"
        if takes_name(self.target, parameter.partition(".")[0]):
            return f"+{self.path}.{parameter}"  # an option that the configuration does not list
        return f"{self.path}: {owner}: {parameter}" if owner else f"{self.path}: {parameter}"


@dataclass(slots=True)
class BuiltObjects:
    """What was built from parts of the configuration, and where each object stands in it."""

    # The objects are held, so that no other one gets their identity; members before what holds them
    _placed: list[tuple[object, _Place]] = field(default_factory=list)

    def build(self, node: Any, path: str) -> Any:
        """Build what a node describes, and all that is described in it.

        Args:
            node: plain values, without interpolations.
            path: where it stands in the configuration, such as `online.selector`.

        Raises:
            InputError: a class cannot be imported, or does not take what it is given.
        """
        return self._value(node, path, convert="none", recursive=True)

    @contextmanager
    def told_as_options(self) -> Iterator[None]:
        """Report faults of the parameters of these objects by their options, inside the block."""
        try:
            yield
        except ParameterError as error:
            place = self._place_of(error.owner)
            if place is None:
                raise
            raise InputError(error.told_as(place.subject(error))) from error

    def _place_of(self, owner: object) -> _Place | None:
        """Return where an object stands, or else the one that holds it as a parameter."""
        if owner is None or isinstance(owner, str):
            return None
        for known, place in self._placed:
            if known is owner:
                return place
        for known, place in self._placed:
            if any(part is owner for part in nested(known, type(owner))):
                return place
        return None

    def _value(self, node: Any, path: str, *, convert: str, recursive: bool) -> Any:
        if isinstance(node, dict):
            convert = node.get("_convert_", convert)
            recursive = node.get("_recursive_", recursive)
            if "_target_" in node:
                return self._object(node, path, convert=convert, recursive=recursive)
        if not isinstance(node, (dict, list)):
            return node
        items = node.items() if isinstance(node, dict) else enumerate(node)
        built = {
            key: self._value(item, f"{path}.{key}", convert=convert, recursive=recursive)
            for key, item in items
        }
        if isinstance(node, list):
            values = list(built.values())
            return values if convert != "none" else _config(values)
        if convert != "none":
            return built
        mapping = _config({})
        for key, value in built.items():
            mapping[key] = value
        return mapping

    def _object(self, node: dict[str, Any], path: str, *, convert: str, recursive: bool) -> Any:
        make = _factory(node["_target_"], f"{path}._target_")
        place = _Place(path=path, node=node, target=make.func)
        keywords = {
            key: self._value(item, f"{path}.{key}", convert=convert, recursive=True)
            if recursive
            else _raw(item, convert)
            for key, item in node.items()
            if key not in _OF_HYDRA
        }
        if _is_named(make.func):
            keywords.pop("name", None)
        arguments = keywords.pop("_args_", ())
        is_partial = node.get("_partial_", False)
        try:
            if is_partial:
                built = type(make)(make.func, *arguments, **keywords)
                vars(built).update(vars(make))  # where newer versions of Hydra keep what they check
            elif arguments:
                built = make(*arguments, **keywords)
            else:
                built = call_by_name(make.func, keywords, through=make)
        except ParameterError as error:
            known = self._place_of(error.owner) or place
            raise InputError(error.told_as(known.subject(error))) from error
        except InputError:
            raise
        except Exception as error:  # a class of somebody else may fail in any way
            raise InputError(
                f"{path}: {full_name_of(make.func)} cannot be built: {type(error).__name__}: "
                f"{in_one_line(error)}"
            ) from error
        self._placed.append((built, place))
        return built


def check_target(node: Mapping[str, Any], path: str) -> None:
    """Check that the class of a node can be imported, and build nothing.

    Raises:
        InputError: it cannot.
    """
    _factory(node.get("_target_"), f"{path}._target_")


def _factory(target: object, option: str) -> functools.partial[Any]:
    """Import what a `_target_` names, by the rules of Hydra, which refuses some names."""
    if not isinstance(target, str):
        raise InputError(f"{option} must be the name of a class with its module. Got {target!r}.")
    try:
        factory: functools.partial[Any] = instantiate({"_target_": target, "_partial_": True})
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Hydra's own texts are about importing, and long
            cause = cause.__cause__
        near, reason = _nearest_target(target), in_one_line(cause).rstrip(".")
        hint = f" Did you mean {near}?" if near not in (None, target) else ""
        raise InputError(
            f"{option} must be the name of a class with its module. Got {target!r}: {reason}.{hint}"
        ) from error
    return factory


def _nearest_target(target: str) -> str | None:
    """Return the name that was meant, if a single part of it is misspelt."""
    parts = target.split(".")
    for number, part in enumerate(parts[1:], start=1):
        module = sys.modules.get(".".join(parts[:number]))
        if module is None:
            return None
        inside = {name for name, value in vars(module).items() if isinstance(value, type)}
        inside |= {
            submodule.name for submodule in pkgutil.iter_modules(getattr(module, "__path__", ()))
        }
        public = getattr(module, "__all__", ())
        if part not in inside and parts[-1] in public:
            return ".".join([*parts[:number], parts[-1]])
        inside.update(public)
        if part not in inside:
            close = difflib.get_close_matches(part, sorted(inside), n=1)
            return ".".join([*parts[:number], close[0], *parts[number + 1 :]]) if close else None
    return None


def _is_named(target: Callable[..., Any]) -> bool:
    """Return whether a node of this class may have a name that is for tables and folders alone."""
    is_selector = isinstance(target, type) and issubclass(target, Selector)
    return is_selector and not takes_name(target, "name")


def _raw(item: Any, convert: str) -> Any:
    """Return what is not to be built, as Hydra hands it over."""
    return _config(item) if convert == "none" and isinstance(item, (dict, list)) else item


def _config(content: Any) -> Any:
    return OmegaConf.create(content, flags={"allow_objects": True})


def _has(node: Any, keys: Sequence[str]) -> bool:
    """Return whether there is an entry of a node by these keys, one inside the other."""
    for key in keys:
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, Mapping) and key in node:
            node = node[key]
        else:
            return False
    return True
