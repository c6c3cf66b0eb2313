"""Selectors of other distributions, found through a real entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.selectors.core.base import Choice, Selector, Source
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.plugins import build_plugin, find_plugins
from siftclip.selectors.methods.clip_score import ClipScore

MODULE = """
import torch
from siftclip.selectors.core.base import ScoreSelector

class LowestUid(ScoreSelector):
    def __init__(self, *, sign, **rule):
        super().__init__(**rule)
        self.sign = sign

    def score(self, chunk):
        return torch.from_numpy(self.sign * (chunk.uids[:, 0] >> 11).astype("float32"))

class Fussy(ScoreSelector):
    def __init__(self, penalty=0.5, words="", **rule):
        super().__init__(**rule)
        self.penalty, self.words = penalty, words

    def score(self, chunk):
        if self.penalty == "other":
            raise RuntimeError("of another kind")
        penalty = 1 if self.penalty == "auto" else -self.penalty
        return torch.from_numpy(penalty * (chunk.uids[:, 0] >> 11).astype("float32"))

class NoSelector:
    pass
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install("name = module:object", ..., distribution="thirdparty")`: as pip would."""

    def make(*points: str, distribution: str = "thirdparty") -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        lines = "\n".join(("[siftclip.selectors]", *points))
        (info / "entry_points.txt").write_text(lines + "\n")
        (site / f"{distribution}_selectors.py").write_text(MODULE)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, f"{distribution}_selectors", raising=False)

    return make


def test_third_party_selector_is_found_and_built(install: Install) -> None:
    install("lowest = thirdparty_selectors:LowestUid")
    selector = build_plugin("lowest", sign=-1, fraction=0.25)
    assert type(selector).__name__ == "LowestUid"
    assert selector.sign == -1  # type: ignore[attr-defined]
    check_selector(lambda: build_plugin("lowest", sign=-1, fraction=0.25))


def test_own_entry_point_is_found() -> None:
    assert isinstance(build_plugin("clip_score", features="l14", fraction=0.5), ClipScore)


def test_unknown_plugin_lists_those_installed(install: Install) -> None:
    install("lowest = thirdparty_selectors:LowestUid")
    with pytest.raises(InputError, match=r"one of \['clip_score', 'lowest'\].*Got 'highest'"):
        build_plugin("highest")


def test_two_plugins_of_one_name_are_refused(install: Install) -> None:
    install("lowest = thirdparty_selectors:LowestUid")
    install("lowest = fourthparty_selectors:LowestUid", distribution="fourthparty")
    with pytest.raises(InputError, match=r"called 'lowest': \w+_selectors:LowestUid and \w+_sel"):
        find_plugins()


def test_the_same_distribution_twice_on_the_path_is_no_clash(install: Install) -> None:
    install("lowest = thirdparty_selectors:LowestUid")
    install("lowest = thirdparty_selectors:LowestUid", distribution="copy_of_it")
    assert find_plugins()["lowest"].value == "thirdparty_selectors:LowestUid"


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("broken = no_such_module:LowestUid", "could not be built.*no_such_module"),
        ("broken = thirdparty_selectors:Missing", "could not be built.*Missing"),
        ("broken = thirdparty_selectors:NoSelector", "must be a subclass of .*Selector"),
    ],
)
def test_broken_plugin_is_named(install: Install, point: str, message: str) -> None:
    install(point)
    with pytest.raises(InputError, match=f"plug-in 'broken' .*{message}"):
        build_plugin("broken")


def test_parameters_that_a_plugin_does_not_take_are_named(install: Install) -> None:
    install("lowest = thirdparty_selectors:LowestUid")
    with pytest.raises(InputError, match=r"^LowestUid: colour is not a parameter.* sign, fraction"):
        build_plugin("lowest", sign=1, fraction=0.5, colour="red")
    with pytest.raises(InputError, match=r"^LowestUid needs exactly one of"):
        build_plugin("lowest", sign=1)


def test_a_class_without_a_constructor_takes_nothing() -> None:
    class All(Selector):
        def select(self, source: Source) -> Choice:
            return Choice(multiplicities=np.ones(len(source), dtype=np.int64))

    All()
    with pytest.raises(InputError, match=r"^All: fraction is not a parameter of All\. It has none"):
        All(fraction=0.3)
    with pytest.raises(TypeError, match="too many positional arguments"):
        All(0.3)


def test_text_in_place_of_a_number_is_found_before_there_are_samples(install: Install) -> None:
    install("fussy = thirdparty_selectors:Fussy")
    message = (
        r"^Fussy: penalty must be a number, as its default: thirdparty_selectors\.Fussy fails with "
        r"TypeError: .* Got 'abc'\.$"
    )
    with pytest.raises(InputError, match=message):
        build_plugin("fussy", penalty="abc", fraction=0.5)
    build_plugin("fussy", penalty="auto", fraction=0.5)  # a word that the class knows
    build_plugin("fussy", penalty="other", fraction=0.5)  # it fails for another reason


def test_selectors_are_tried_out_for_nothing_else(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("fussy = thirdparty_selectors:Fussy")
    monkeypatch.setattr("siftclip.selectors.core.plugins._try_out", None)
    build_plugin("fussy", penalty=2, words="abc", fraction=0.5)
