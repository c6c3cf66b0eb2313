"""A plug-in selector's options: its own parameters, its name, and the features that it reads."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.errors import InputError
from siftclip.selectors import ClipScore
from siftclip.trainer.builders.online_identity import online_identity
from siftclip.trainer.builders.online_options import check_online, loop_selector, schedule_from
from siftclip.trainer.builders.selection import select_stage, selector_from, source_from
from siftclip.trainer.settings.given import named_group
from siftclip.trainer.settings.selector import SelectorNode

Compose = Callable[..., Any]

PLUGIN = ["selector=plugin", "selector.plugin=clip_score"]  # the package registers it itself
IN_LOOP = [
    "online=every_step",
    "selector@online.selector=plugin",
    "online.selector.plugin=clip_score",
]
REFERENCE = "online.reference.features.name=noise"


@pytest.mark.parametrize("group", ["selector", "online.selector"])
def test_parameters_are_those_that_are_added_with_a_plus(
    group: str, base: list[str], compose: Compose
) -> None:
    def node(*options: str) -> SelectorNode:
        settings = compose("train", [*base, *PLUGIN, *IN_LOOP, REFERENCE, *options])
        found: SelectorNode = settings.selector if group == "selector" else settings.online.selector
        return found

    added = node(f"+{group}.features=noise")
    given = node(f"++{group}.parameters.features=noise")
    assert given == added
    assert given.record() == added.record()
    assert "parameters" not in given.record()


def test_parameters_make_no_other_run_than_the_plus(base: list[str], compose: Compose) -> None:
    def identity(option: str) -> dict[str, Any]:
        settings = compose("train", [*base, *IN_LOOP, REFERENCE, option])
        source: PoolSource = source_from(settings, may_launch=False)
        return online_identity(settings.online, source, world_size=1)

    added = identity("+online.selector.features=learner")
    assert identity("++online.selector.parameters.features=learner") == added
    assert "parameters" not in added["selector"]


def test_plugins_inside_compositions_have_parameters_too(base: list[str], compose: Compose) -> None:
    member = "{_target_: siftclip.selectors.build_plugin, plugin: clip_score, %s}"
    given = member % "fraction: 0.5, parameters: {features: noise}"
    added = member % "fraction: 0.5, features: noise"
    stages = f"{{one: {given}, two: {added}}}"
    settings = compose(
        "select", [*base, "selector=vas_clip", "~selector.stages", f"+selector.stages={stages}"]
    )
    one, two = settings.selector.parameters["stages"].values()
    assert one == two


def test_faults_name_the_option_that_was_typed(base: list[str], compose: Compose) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(InputError) as error:
            selector_from(compose("select", [*base, *PLUGIN, *options]).selector)
        return str(error.value)

    assert refused("++selector.parameters.foo=1").startswith(
        "selector.parameters.foo is not a parameter of ClipScore. Its parameters are features, "
    )
    assert refused("++selector.parameters.of=some").startswith("selector.parameters.of must be ")
    assert refused("selector.fraction=a").startswith("selector.fraction must be ")


def test_a_plugin_without_a_name_is_told_in_one_sentence(base: list[str], compose: Compose) -> None:
    message = (
        "selector.plugin must be given: the name under which a distribution registered its "
        "selector. Installed are clip_score."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        compose("select", [*base, "selector=plugin"])
    with pytest.raises(InputError, match=r"^online\.selector\.plugin must be given: .*\.$"):
        compose("train", [*base, "online=every_step", "selector@online.selector=plugin"])


def test_python_is_told_how_a_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siftclip.trainer.settings.given.installed_names", lambda group: ["focal"])
    with pytest.raises(InputError, match=r"It is a plug-in: {'name': 'plugin', 'plugin': 'focal'}"):
        named_group("loss", "focal")
    with pytest.raises(InputError, match=r"Got 'other'\.$"):
        named_group("loss", "other")


# ---- features that a selector does not name ------------------------------------------------------
def test_open_features_are_those_of_the_pool(base: list[str], compose: Compose) -> None:
    settings = compose("select", [*base, *PLUGIN])
    built = selector_from(settings.selector).selector
    assert isinstance(built, ClipScore)
    assert built.features == "noise"
    named = compose("select", [*base, "selector=clip_score"])
    assert list(select_stage(settings).rows) == list(select_stage(named).rows)


@pytest.mark.parametrize("features", ["learner", "noise"])
@pytest.mark.parametrize("cadence", ["every_step", "every_n_steps", "every_epoch"])
def test_open_features_in_the_loop_are_those_of_the_loop(
    features: str, cadence: str, base: list[str], compose: Compose
) -> None:
    loop = [*IN_LOOP, f"online={cadence}", f"online.features={features}", REFERENCE]
    online = compose("train", [*base, *loop]).online
    selector = loop_selector(online).selector
    assert selector.requires.features == (f"{features}_img", f"{features}_txt")


def test_a_first_stage_is_bound_as_the_loop_is(base: list[str], compose: Compose) -> None:
    options = [
        *IN_LOOP,
        "online.features=noise",
        "selector@online.first_stage.selector=plugin",
        "online.first_stage.selector.plugin=clip_score",
        REFERENCE,
    ]
    online = compose("train", [*base, *options]).online
    built = loop_selector(online, online.first_stage.selector).selector
    assert built.requires.features == ("noise_img", "noise_txt")


# ---- classes that take no fraction, and nodes without a name -------------------------------------
MODULE = """
import numpy as np
import torch
from siftclip.selectors import Choice, Requirements, ScoreSelector, Selector


class Length(ScoreSelector):
    requires = Requirements(captions=True)

    def score(self, chunk):
        return torch.tensor([float(len(caption)) for caption in chunk.captions])


class Long(Length):
    def __init__(self, characters: int = 1):
        super().__init__(threshold=float(characters))
        self.characters = characters


class All(Selector):
    def select(self, source):
        return Choice(multiplicities=np.ones(len(source), dtype=np.int64))


def make(keep=0.5):
    return Length(fraction=keep)
"""
POINTS = {"length": "Length", "with-dash": "Length", "long": "Long", "all": "All", "make": "make"}
EVERY_STEP = ["online=every_step", "selector@online.selector=plugin", REFERENCE]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several plug-ins of one distribution, and one whose module cannot be imported."""
    info = tmp_path / "kinds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kinds\nVersion: 1.0\n")
    points = [f"{name} = kinds_of:{target}" for name, target in POINTS.items()]
    (info / "entry_points.txt").write_text(
        "\n".join(["[siftclip.selectors]", *points, "broken = no_such_module:Broken"])
    )
    (tmp_path / "kinds_of.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("kinds_of", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", POINTS)
def test_any_class_works_without_a_word_about_fractions(
    name: str, base: list[str], compose: Compose
) -> None:
    settings = compose("select", [*base, "selector=plugin", f"selector.plugin={name}"])
    assert settings.selector.name == name
    built = selector_from(settings.selector).selector
    kept = {"Length": 0.5 if name == "make" else 0.3}.get(type(built).__name__)
    assert getattr(getattr(built, "rule", None), "fraction", None) == kept
    assert len(select_stage(settings).rows)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["long", "all", "make"])
def test_a_fraction_that_a_class_does_not_take_is_refused(
    name: str, base: list[str], compose: Compose
) -> None:
    options = ["selector=plugin", f"selector.plugin={name}", "selector.fraction=0.5"]
    with pytest.raises(InputError, match=r"^selector\.fraction is not a parameter of "):
        selector_from(compose("select", [*base, *options]).selector)
    options[-1] = "selector.fraction=null"
    selector_from(compose("select", [*base, *options]).selector)


@pytest.mark.usefixtures("installed")
def test_an_own_rule_takes_the_place_of_the_usual_fraction(
    base: list[str], compose: Compose
) -> None:
    options = ["selector=plugin", "selector.plugin=length", "++selector.parameters.threshold=3"]
    built = selector_from(compose("select", [*base, *options]).selector).selector
    assert type(built.rule).__name__ == "Threshold"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="needs exactly one of fraction, threshold and rule"):
        selector_from(compose("select", [*base, *options, "selector.fraction=0.2"]).selector)


@pytest.mark.usefixtures("installed")
def test_the_usual_fraction_is_recorded_as_a_number(base: list[str], compose: Compose) -> None:
    options = ["selector=plugin", "selector.plugin=length"]
    left_open = compose("select", [*base, *options]).selector
    given = compose("select", [*base, *options, "selector.fraction=0.3"]).selector
    assert left_open.record() == given.record()
    assert left_open.fraction == 0.3


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["length", "with-dash", "long", "make"])
@pytest.mark.parametrize("fraction", [[], ["online.selector.fraction=0.5"]])
def test_in_the_loop_a_fraction_is_of_the_super_batch(
    name: str, fraction: list[str], base: list[str], compose: Compose
) -> None:
    options = [*EVERY_STEP, f"online.selector.plugin={name}", *fraction]
    online = compose("train", [*base, *options]).online
    loop_selector(online)
    kept = 0.5 if fraction else 0.3
    assert schedule_from(online).filter_ratio == pytest.approx(1 - kept)


@pytest.mark.usefixtures("installed")
def test_a_set_function_in_the_loop_is_told_what_works(base: list[str], compose: Compose) -> None:
    settings = compose("train", [*base, *EVERY_STEP, "online.selector.plugin=all"])
    arguments = (settings.selector, settings.loss, settings.trainer.strategy)
    with pytest.raises(InputError, match=r"online=every_epoch or online=every_n_steps\.$"):
        check_online(settings.online, *arguments)
    every = ["online=every_n_steps", "online.every_n_steps=2"]
    options = [*every, "selector@online.selector=plugin", "online.selector.plugin=all", REFERENCE]
    check_online(compose("train", [*base, *options]).online, *arguments)


@pytest.mark.usefixtures("installed")
def test_a_plugin_that_cannot_be_imported_spoils_no_other(
    base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=r"^The plug-in 'broken' .* No module named 'no_such_mod"):
        selector_from(
            compose("select", [*base, "selector=plugin", "selector.plugin=broken"]).selector
        )
    with pytest.raises(InputError, match=r"^online\.selector\.plugin must be one of .* Got 'nix'"):
        loop_selector(compose("train", [*base, *EVERY_STEP, "online.selector.plugin=nix"]).online)


@pytest.mark.usefixtures("installed")
def test_members_of_a_composition_may_come_with_their_names(
    base: list[str], compose: Compose
) -> None:
    member = "{name: %s, _target_: siftclip.selectors.build_plugin, plugin: %s, fraction: auto}"
    stages = ", ".join(f"{name}: {member % (name, name)}" for name in ("length", "long", "all"))
    ours = "{name: clip_score, _target_: siftclip.selectors.ClipScore, fraction: 0.5}"
    options = ["~selector.stages", f"+selector.stages={{{stages}, ours: {ours}}}"]
    settings = compose("select", [*base, "selector=vas_clip", *options])
    assert len(select_stage(settings).rows)


def test_a_node_without_a_name_is_called_as_its_class() -> None:
    node = SelectorNode.of("selector", {"_target_": "siftclip.selectors.ClipScore"})
    assert node.name == "clipscore"
    assert SelectorNode.of("selector", {"_target_": "x.Y", "name": "z"}).name == "z"
    plugin = {"_target_": "siftclip.selectors.build_plugin", "plugin": "length"}
    assert SelectorNode.of("selector", plugin).name == "length"


@pytest.mark.parametrize("name", ["a/b", "../x", "a\\b", "a\nb", ["a"], {"a": 1}])
def test_a_name_that_no_folder_can_have_is_refused(name: Any) -> None:
    node = SelectorNode.of("selector", {"_target_": "siftclip.selectors.Uniform", "name": name})
    (fault,) = node.faults("selector")
    assert str(fault).startswith("selector.name must be a name that a folder can have")
