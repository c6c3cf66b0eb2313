"""Selectors of other distributions, found through the entry-point group `siftclip.selectors`."""

from __future__ import annotations

import copy
from importlib.metadata import EntryPoint
from typing import Any

from siftclip.errors import ParameterError, full_name_of
from siftclip.plugins import SELECTOR_GROUP, PluginGroup, texts_for_numbers
from siftclip.selectors.core.arrays import GIVEN
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.selectors.core.source import MemorySource

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
    selector = SELECTORS.build(plugin, parameters, owner=build_plugin)
    for name in texts_for_numbers(type(selector), parameters):
        _try_out(selector, name, parameters[name])
    return selector


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
