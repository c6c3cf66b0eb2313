"""Selectors of other distributions, found through the entry-point group `siftclip.selectors`."""

from __future__ import annotations

import copy
from importlib.metadata import EntryPoint
from typing import Any

from siftclip.errors import ParameterError, full_name_of
from siftclip.plugins import (
    AUTO_FRACTION,
    SELECTOR_GROUP,
    USUAL_FRACTION,
    PluginGroup,
    texts_for_numbers,
)
from siftclip.selectors.core.arrays import GIVEN
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.selectors.core.memory_source import MemorySource

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


def takes_fraction(plugin: str) -> bool:
    """Return whether the selector which a distribution registered as `plugin` takes a fraction.

    Raises:
        InputError: no such plug-in, or it cannot be imported.
    """
    return SELECTORS.takes(plugin, "fraction", owner=build_plugin)


def build_plugin(plugin: str, **parameters: Any) -> Selector:
    """Build the selector which a distribution registered as `plugin`.

    Args:
        plugin: its name.
        **parameters: its own. A `fraction` of "auto" is the usual one where the selector takes a
            fraction and neither a threshold nor a rule is given; it and None are left out where the
            selector takes none.

    Raises:
        InputError: no such plug-in, it cannot be imported, or it does not take the parameters.
    """
    taken = _as_taken(plugin, parameters)
    selector = SELECTORS.build(plugin, taken, owner=build_plugin)
    for name in texts_for_numbers(type(selector), taken):
        _try_out(selector, name, taken[name])
    return selector


def _as_taken(plugin: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters as the plug-in takes them, see `build_plugin`."""
    # what its node has beside its own, which not every plug-in takes
    open_values = {"name": (plugin,), "fraction": (None, AUTO_FRACTION)}
    taken = {
        name: value
        for name, value in parameters.items()
        if value not in open_values.get(name, ()) or SELECTORS.takes(plugin, name)
    }
    if "fraction" in taken and taken["fraction"] in open_values["fraction"]:
        has_rule = any(taken.get(name) is not None for name in ("threshold", "rule"))
        usual = taken["fraction"] == AUTO_FRACTION and not has_rule
        taken["fraction"] = USUAL_FRACTION if usual else None
    return taken


def _try_out(selector: Selector, parameter: str, value: str) -> None:
    """Select once among random samples, before a pool is opened, with a value that may be a slip.

    Raises:
        ParameterError: the selector fails as with a value of the wrong kind.
    """
    # in this case alone: a selector of somebody else may be slow, or write something
    from siftclip.selectors.core.checks import synthetic_chunk, synthetic_files

    try:
        tried = bind_features(copy.deepcopy(selector), GIVEN)
        chunk, files = synthetic_chunk(tried.requires), synthetic_files(tried.requires)
        tried.select(MemorySource(chunk, files=files))
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ParameterError(
            f"must be a number, as its default: {full_name_of(type(selector))} fails with "
            f"{type(error).__name__}: {error}",
            owner=selector,
            parameter=parameter,
            value=value,
        ) from error
    except Exception:
        return  # it may be the samples: if it is not, those of the pool tell
