"""Every built-in selector keeps the public contract."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest

import siftclip.selectors
from siftclip.selectors.base import Selector
from siftclip.selectors.checks import CHECKS, SelectorFactory, check_selector
from siftclip.selectors.clip_score import ClipScore
from siftclip.selectors.external import External
from siftclip.selectors.uniform import Uniform

BUILT_IN: dict[str, SelectorFactory] = {
    "uniform": lambda: Uniform(seed=5, fraction=0.3),
    "uniform, threshold": lambda: Uniform(seed=5, threshold=0.5),
    "clip_score": lambda: ClipScore(features="l14", fraction=0.3),
    "clip_score, threshold": lambda: ClipScore(features="b32", threshold=0.0),
    "external parquet": lambda: External(path="a.parquet", column="dfn", fraction=0.3),
    "external subset": lambda: External(path="a.npy"),
}


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_built_in_selector_passes(check: Callable[[SelectorFactory], None], name: str) -> None:
    check(BUILT_IN[name])


def test_every_selector_class_is_checked() -> None:
    def concrete(base: Any) -> set[type[Selector]]:
        found = set() if inspect.isabstract(base) else {base}
        return found.union(*(concrete(child) for child in base.__subclasses__()))

    modules = [module.name for module in pkgutil.iter_modules(siftclip.selectors.__path__)]
    for module in modules:
        importlib.import_module(f"siftclip.selectors.{module}")
    ours = {cls for cls in concrete(Selector) if cls.__module__.startswith("siftclip.selectors.")}
    assert ours == {type(make()) for make in BUILT_IN.values()}


def test_check_selector_runs_all_checks() -> None:
    check_selector(BUILT_IN["clip_score"])
