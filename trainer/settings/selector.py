"""A selector's node, which stays open: what a selector takes is up to its class."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from siftclip.errors import ParameterError, require_fraction
from siftclip.plugins import AUTO_FRACTION, SELECTOR_GROUP, USUAL_FRACTION, installed_in_words
from siftclip.trainer.settings.fields.rules import Fault, Unset, is_inside, joined
from siftclip.trainer.settings.fields.section import Recorded

if TYPE_CHECKING:
    from siftclip.selectors.core.base import Selector


_PLUGIN = "siftclip.selectors.build_plugin"  # the `_target_` of a plug-in
_OF_ANY_PLUGIN = ("plugin", "fraction")  # what its node lists beside the parameters of its own
_PARAMETERS = "parameters"  # the mapping of these
_IN_PLACE_OF = {"covariance": "target"}  # by a parameter: the one that need not be given then
_NO_NAME = re.compile(r"[/\\\x00-\x1f\x7f]")  # characters that no folder may have


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectorNode(Recorded):
    """A selector: its name, and the `_target_` and parameters that build it."""

    place: str  # "selector", or "online.selector"
    name: str
    parameters: Mapping[str, Any]
    written: Mapping[str, Any]  # the node in the configuration, where `features.name` is the pool's
    built: Selector | None = None  # the selector itself, where it was made in Python
    features: str | None = None  # what it reads where it names no features

    @classmethod
    def of(
        cls,
        place: str,
        written: Mapping[str, Any],
        parameters: Mapping[str, Any] | None = None,
        *,
        features: str | None = None,
    ) -> SelectorNode:
        """Build a node from plain values.

        Args:
            place: where it stands.
            written: the values, with the name.
            parameters: the same as the selector shall get them, where they differ.
            features: the name of those that it reads where it names none.
        """
        flat = _without_needless(flat_plugins(written))
        given = written if parameters is None else parameters
        rest = {**_without_needless(flat_plugins(given))}
        name = rest.pop("name", None)
        name = _default_name(rest) if name is None else str(name)
        recorded = _with_usual_fractions(flat)
        return cls(place=place, name=name, parameters=rest, written=recorded, features=features)

    def record(self) -> dict[str, Any]:
        return {**self.written}

    @property
    def fraction(self) -> Any:
        """How much the selector shall keep, if it says so itself."""
        return _with_usual_fractions(self.parameters).get("fraction")

    def with_parameters(self, **changes: Any) -> SelectorNode:
        """Return the node with other parameters; what is recorded stays."""
        return replace(self, parameters={**self.parameters, **changes})

    def without_fraction(self) -> SelectorNode:
        """Return the node without a fraction among its parameters; what is recorded stays."""
        rest = {name: value for name, value in self.parameters.items() if name != "fraction"}
        return replace(self, parameters=rest)

    def faults(self, option: str) -> Iterator[Fault | str]:
        """Yield what the node lacks, and the shares that no selector of ours could keep.

        Other parameters are checked by their classes, when all that is needed is there.
        """
        unset = {**dict(_unset(self.written, option))}
        plugin = joined(option, "plugin")
        if plugin in unset and is_plugin(self.written):
            yield Fault(plugin, _which_plugin())
            # it takes its name from there
            unset = {name: unset[name] for name in unset.keys() - {plugin, joined(option, "name")}}
        missing = sorted(name for name, value in unset.items() if value.reason is None)
        if missing:
            needs = " ".join(f"{name}=..." for name in missing)
            yield f"The selector needs {needs}; see configs/selector for what they are."
        for name, value in unset.items():
            if value.reason is not None:
                yield Fault(name, value.reason)
        unfit = _NO_NAME.search(self.name) or not is_inside(self.name)
        if unfit or isinstance(self.written.get("name"), Mapping | list):
            rule = "must be a name that a folder can have, without a slash, of at most 200 bytes. "
            given = reprlib.repr(self.written.get("name"))
            yield Fault(joined(option, "name"), f"{rule}Got {given}.")
        for name, fraction in _fractions(self.written, option):
            try:
                require_fraction("fraction", fraction)
            except ParameterError as error:
                yield error.told_as(name)


def is_plugin(node: Mapping[str, Any]) -> bool:
    """Return whether a node describes a selector of another distribution."""
    return node.get("_target_") == _PLUGIN


def plugin_option(node: Mapping[str, Any], parameter: str) -> str | None:
    """Return what a parameter of a plug-in is called below its node; None if `node` is none."""
    if not is_plugin(node) or parameter.partition(".")[0] in _OF_ANY_PLUGIN:
        return None
    return f"{_PARAMETERS}.{parameter}"


def flat_plugins(node: Any) -> Any:
    """Copy a node, the `parameters` of each plug-in in it beside what any plug-in has.

    So that these count as the same parameters do where they are added with a plus.
    """
    if isinstance(node, list):
        return [flat_plugins(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    flat = {name: flat_plugins(value) for name, value in node.items()}
    own = flat.get(_PARAMETERS)
    if not is_plugin(flat) or not isinstance(own, Mapping):
        return flat
    del flat[_PARAMETERS]
    return {**flat, **own}


def _without_needless(node: Any) -> Any:
    """Copy a node, with null for what is left open and has another parameter in its place."""
    if isinstance(node, list):
        return [_without_needless(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    copied = {name: _without_needless(value) for name, value in node.items()}
    for name, other in _IN_PLACE_OF.items():
        if copied.get(name) is not None and next(_unset(copied.get(other), ""), None) is not None:
            copied[other] = None
    return copied


def _default_name(parameters: Mapping[str, Any]) -> str:
    """Return what a selector is called whose node has no name: its plug-in, or its class."""
    name = parameters.get("plugin") if is_plugin(parameters) else None
    return str(name or str(parameters.get("_target_")).rpartition(".")[2].lower())


def _with_usual_fractions(node: Any) -> Any:
    """Copy a node, with the usual fraction for those of plug-ins that leave it open."""
    if isinstance(node, list):
        return [_with_usual_fractions(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    copied = {name: _with_usual_fractions(value) for name, value in node.items()}
    if is_plugin(copied) and copied.get("fraction") == AUTO_FRACTION:
        copied["fraction"] = USUAL_FRACTION
    return copied


def _which_plugin() -> str:
    rule = "must be given: the name under which a distribution registered its selector."
    return f"{rule} {installed_in_words(SELECTOR_GROUP)}"


def _unset(value: Any, option: str) -> Iterator[tuple[str, Unset]]:
    if isinstance(value, Unset):
        yield option, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _unset(inner, joined(option, str(name)))


def _fractions(value: Any, option: str) -> Iterator[tuple[str, Any]]:
    """Yield the fractions of our selectors; a rule may draw more often than there are samples."""
    if not isinstance(value, Mapping):
        return
    fraction = value.get("fraction")
    is_ours = str(value.get("_target_", "")).startswith("siftclip.selectors.")
    if is_ours and fraction is not None and not isinstance(fraction, Unset):
        yield joined(option, "fraction"), fraction
    for name, inner in value.items():
        if name != "rule":
            yield from _fractions(inner, joined(option, str(name)))
