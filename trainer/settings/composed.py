"""A configuration as Hydra has composed it, turned into plain values: here OmegaConf ends."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from siftclip.redaction import hidden
from siftclip.trainer.settings.fields.rules import Unset
from siftclip.trainer.settings.selector import SelectorNode

# Selectors of the loop, in which `features.name` stands for `online.features`
_LOOP = ("online.selector", "online.first_stage.selector")
_REFERENCE = re.compile(r"\$\{\.*([\w.]+)\}")


@dataclass(frozen=True, slots=True)
class Composed:
    """All of a command's configuration, resolved, as a run keeps it.

    `???` is what has no value, and `***` stands in the place of passwords and keys.
    """

    values: Mapping[str, Any]

    def to_yaml(self) -> str:
        """Return the text of a run's `config.yaml`."""
        text: str = OmegaConf.to_yaml(OmegaConf.create({**self.values}))
        return text


def composed(tree: Mapping[str, Any]) -> Composed:
    """Build what a run keeps, from the values of `plain_tree`."""
    recorded = {str(name): _recorded(value) for name, value in tree.items()}
    return Composed(values=hidden(recorded))


def _recorded(value: Any) -> Any:
    if isinstance(value, SelectorNode):
        value = value.written
    if isinstance(value, Mapping):
        return {name: _recorded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_recorded(inner) for inner in value]
    return "???" if isinstance(value, Unset) else value


def plain_tree(config: DictConfig) -> dict[str, Any]:
    """Return the values of a configuration, references resolved, selectors as `SelectorNode`.

    What is left open, or refers to what is, is `Unset`.
    """
    tree: dict[str, Any] = _plain(OmegaConf.to_container(config, resolve=False), config)
    _put_node(tree, "selector", None, _text_at(tree, "features.name"))
    for place in _LOOP:
        if _at(tree, place) is not None:
            parameters = _at(_scoped_to_loop(config, tree), place)
            _put_node(tree, place, parameters, _text_at(tree, "online.features"))
    return tree


def references(config: DictConfig) -> set[str]:
    """Find the names at the top level that the configuration refers to."""
    text = OmegaConf.to_yaml(config, resolve=False)
    return {name.partition(".")[0] for name in re.findall(r"\$\{([\w.]+)", text)}


def _scoped_to_loop(config: DictConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    scoped = copy.deepcopy(config)
    if _at(tree, "online.features") is not None and _at(tree, "features") is not None:
        scoped.features.name = _at(tree, "online.features")
    values: dict[str, Any] = _plain(OmegaConf.to_container(scoped, resolve=False), scoped)
    return values


def _put_node(tree: dict[str, Any], place: str, parameters: Any, features: str | None) -> None:
    """Put a selector's node in the place of its values; the last two as for `SelectorNode.of`."""
    *parents, last = place.split(".")
    node = _at(tree, ".".join(parents)) if parents else tree
    if isinstance(node, dict) and isinstance(node.get(last), Mapping):
        node[last] = SelectorNode.of(place, node[last], parameters, features=features)


def _text_at(tree: Any, place: str) -> str | None:
    value = _at(tree, place)
    return value if isinstance(value, str) else None


def _at(tree: Any, place: str) -> Any:
    for name in place.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _plain(raw: Any, node: Any) -> Any:
    """Convert the values of a container from how they are written."""
    if isinstance(raw, dict):
        return {name: _value(inner, node, name) for name, inner in raw.items()}
    return [_value(inner, node, index) for index, inner in enumerate(raw)]


def _value(raw: Any, node: Any, key: Any) -> Any:
    if raw == "???":
        return Unset()
    if isinstance(raw, str) and OmegaConf.is_interpolation(node, key):
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            names = _REFERENCE.findall(raw)
            return Unset(f"takes its value from {' and '.join(names) or raw}, which is not set.")
        except OmegaConfBaseException as error:
            return Unset(f"refers to what is not there: {raw} ({str(error).splitlines()[0]}).")
        if isinstance(value, DictConfig | ListConfig):
            return _plain(OmegaConf.to_container(value, resolve=False), value)
        return value
    return _plain(raw, node[key]) if isinstance(raw, dict | list) else raw
