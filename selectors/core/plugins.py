"""Selectors of other distributions, found through the entry-point group `siftclip.selectors`."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from siftclip import plugins
from siftclip.errors import InputError, ParameterError, call_by_name
from siftclip.selectors.core.base import Selector

GROUP = "siftclip.selectors"


def find_plugins() -> dict[str, EntryPoint]:
    """Find the installed selectors by name.

    Raises:
        InputError: two distributions give the same name.
    """
    return plugins.find_plugins(GROUP)


def build_plugin(plugin: str, **parameters: Any) -> Selector:
    """Build the selector which a distribution registered as `plugin`.

    Raises:
        InputError: no such plug-in, it cannot be imported, or it does not take the parameters.
    """
    points = find_plugins()
    if plugin not in points:
        raise ParameterError(
            f"must be one of {sorted(points)}, the entry points of the group {GROUP!r} that are "
            "installed",
            owner=build_plugin,
            parameter="plugin",
            value=plugin,
        )
    name = f"The plug-in {plugin!r} ({points[plugin].value})"
    try:
        selector = call_by_name(points[plugin].load(), parameters)
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"{name} could not be built with {parameters}: {error}.") from error
    if not isinstance(selector, Selector):
        raise InputError(f"{name} must be a subclass of siftclip.selectors.Selector.")
    return selector
