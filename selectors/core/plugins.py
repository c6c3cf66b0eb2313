"""Selectors of other distributions, found through the entry-point group `siftclip.selectors`."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from siftclip.plugins import SELECTOR_GROUP, PluginGroup
from siftclip.selectors.core.base import Selector

SELECTORS = PluginGroup(
    name=SELECTOR_GROUP,
    base=Selector,  # type: ignore[type-abstract]  # mypy 4717
    public_name="siftclip.selectors.Selector",
)


def find_plugins() -> dict[str, EntryPoint]:
    """Find the installed selectors by name.

    Raises:
        InputError: two distributions give the same name.
    """
    return SELECTORS.find()


def build_plugin(plugin: str, **parameters: Any) -> Selector:
    """Build the selector which a distribution registered as `plugin`.

    Raises:
        InputError: no such plug-in, it cannot be imported, or it does not take the parameters.
    """
    return SELECTORS.build(plugin, parameters, owner=build_plugin)
