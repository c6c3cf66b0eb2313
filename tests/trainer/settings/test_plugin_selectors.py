"""A plug-in selector's options: its own parameters, its name, and the features that it reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.errors import InputError
from siftclip.selectors import ClipScore
from siftclip.trainer.builders.online_identity import online_identity
from siftclip.trainer.builders.online_options import loop_selector
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
