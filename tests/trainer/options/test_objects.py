"""Objects of a configuration: as Hydra builds them, with faults told by the option that exists."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from siftclip.errors import InputError, ParameterError
from siftclip.selectors.core.compose import Then
from siftclip.selectors.core.description import describe
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, Logits
from siftclip.selectors.methods.vas import Vas
from siftclip.trainer.builders.online_options import check_online, loop_selector
from siftclip.trainer.builders.selection import score_stage, select_stage, selector_from
from siftclip.trainer.cli.main import main as siftclip
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.online.in_loop import StepDraw
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.options.objects import BuiltObjects
from siftclip.trainer.settings.loss import LossSettings
from siftclip.trainer.settings.online import OnlineSettings
from siftclip.trainer.settings.selector import SelectorNode

Compose = Callable[..., DictConfig]

VAS_CLIP = ["selector=vas_clip", "selector.stages.vas.target.path=target.npz"]
VAS = "selector.stages.vas"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """A selector alone."""

    selector: SelectorNode


@dataclass(frozen=True, slots=True, kw_only=True)
class InLoop:
    """What selectors of the loop are checked with."""

    selector: SelectorNode
    online: OnlineSettings
    loss: LossSettings


def told(build: Callable[[], Any]) -> str:
    """The message of the fault, which is one line."""
    with pytest.raises(InputError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- faults of a constructor --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        # a composition, and what stands inside of its members
        ([*VAS_CLIP, f"{VAS}.fraction=2"], f"{VAS}.fraction must be a number in the range (0, 1]"),
        ([*VAS_CLIP, f"{VAS}.target.path=7"], f"{VAS}.target.path must be text. Got 7."),
        ([*VAS_CLIP, f"{VAS}.target=null"], f"{VAS}: Vas needs exactly one of target and covar"),
        ([*VAS_CLIP, f"{VAS}=3"], f"{VAS} must be a Selector. Got int."),
        (
            [*VAS_CLIP, "~selector.stages", "+selector.stages={}"],
            "selector.stages must name at least one selector",
        ),
        (
            ["selector=quota", "selector.clusters.path=a.parquet", "selector.quotas=fair"],
            "selector.quotas must be one of proportional, equal. Got 'fair'.",
        ),
        (["selector=random", "selector.fraction=2"], "selector.fraction must be a number in the"),
        (["selector=semdedup", "selector.clustering.seed=-1"], "selector.clustering.seed must be"),
        # a rule
        (["selector=softmax", "selector.rule.fraction=2"], "selector.rule.fraction must be a num"),
        (["selector=softmax", "selector.rule.fraction=null"], "selector.rule: SoftmaxSampling nee"),
        (
            [
                *VAS_CLIP,
                f"{VAS}.fraction=null",
                f"+{VAS}.rule={{_target_: siftclip.selectors.core.rules.TopCount, count: -1}}",
            ],
            f"{VAS}.rule.count must be an integer of at least 0. Got -1.",
        ),
        # a parameter that the configuration does not list
        ([*VAS_CLIP, f"+{VAS}.of=all"], f"{VAS}.of must be one of pool, left. Got 'all'."),
        (["selector=vas_d", "~selector.steps"], "+selector.steps must be given: VasD needs it."),
        # a wrong name
        ([*VAS_CLIP, f"+{VAS}.fractoin=1"], f"{VAS}.fractoin is not a parameter of Vas. Did you m"),
        (["selector=random", "+selector.alpha=1"], "selector.alpha is not a parameter of Uniform."),
        (
            ["selector=softmax", "+selector.rule.temprature=1"],
            "selector.rule.temprature is not a parameter of SoftmaxSampling. "
            "Did you mean temperature?",
        ),
        # a wrong class
        (
            [*VAS_CLIP, f"{VAS}._target_=siftclip.selectors.methods.vas.Vass"],
            f"{VAS}._target_ must be the name of a class with its module. Got "
            "'siftclip.selectors.methods.vas.Vass'",
        ),
        (
            [*VAS_CLIP, f"{VAS}._target_=siftclip.selectors.vass.Vas"],
            "Did you mean siftclip.selectors.Vas?",
        ),
        ([*VAS_CLIP, f"{VAS}._target_=nowhere.Vas"], "'nowhere.Vas': No module named 'nowhere'."),
        ([*VAS_CLIP, f"{VAS}._target_=7"], f"{VAS}._target_ must be the name of a class"),
        ([*VAS_CLIP, f"{VAS}._target_=builtins.dict"], f"{VAS} must be a Selector. Got "),
        (["selector=random", "selector._target_=builtins.dict"], "selector._target_ must be a sub"),
        (["selector=random", "selector._target_=os.kill"], "selector._target_ must be the name"),
    ],
)
def test_faults_are_told_by_options(words: list[str], message: str, compose: Compose) -> None:
    """When the options are read, or when the selector is built."""
    assert message in told(lambda: selector_from(compose("select", words, kind=Selected).selector))


def test_an_option_that_is_not_listed_is_told_with_its_plus(compose: Compose) -> None:
    steps = "selector.stages.vas_d.steps"
    node = compose("select", ["selector=vas_d_clip", f"~{steps}"], kind=Selected).selector
    message = told(lambda: selector_from(node))
    assert message == f"+{steps} must be given: VasD needs it."
    option = message.split()[0]
    words = ["selector=vas_d_clip", f"~{steps}", f"{option}=7"]
    found = selector_from(compose("select", words, kind=Selected).selector)
    assert isinstance(found.selector, Then)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["selector@online.selector=learnability", "online.selector.loss=x"],
            "online.selector.loss must be one of softmax, sigmoid, pair. Got 'x'.",
        ),
        (
            ["selector@online.selector=learnability", "+online.selector.temperture=1"],
            "online.selector.temperture is not a parameter of Learnability.",
        ),
        (
            [
                "selector@online.selector=learnability",
                "online.first_stage.filter_ratio=0.5",
                "selector@online.first_stage.selector=random",
                "online.first_stage.selector.seed=-1",
            ],
            "online.first_stage.selector.seed must be an integer of at least 0. Got -1.",
        ),
    ],
)
def test_selectors_of_the_loop_are_told_by_their_options(
    words: list[str], message: str, compose: Compose
) -> None:
    config = compose("train", ["selector=random", "online=every_step", *words], kind=InLoop)
    assert message in told(
        lambda: check_online(config.online, config.selector, config.loss, "auto")
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["select", *VAS_CLIP, f"{VAS}.fraction=2"], f"{VAS}.fraction must be a number in the ran"),
        (["score", "selector=random", "+selector.sed=1"], "selector.sed is not a parameter of Uni"),
        (
            [
                *("train", "selector=random", "online=every_step", "online.selector.fraction=2"),
                "selector@online.selector=learnability",
            ],
            "online.selector.fraction must be a number in the range (0, 1]",
        ),
    ],
)
def test_the_command_line_says_so_in_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = ["pool.root=nowhere", f"output_dir={tmp_path}", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["siftclip", *words, *own])
    with pytest.raises(SystemExit) as stopped:
        siftclip()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"siftclip {words[0]}: error: {message}")


def test_plain_python_names_the_class_and_the_parameter() -> None:
    with pytest.raises(ParameterError) as caught:
        Vas(features="l14", modality="image", target="pool", fraction=2)
    error = caught.value
    assert str(error).startswith("Vas: fraction must be a number in the range (0, 1]")
    assert (error.owner.__class__, error.parameter, error.value) == (Vas, "fraction", 2)  # type: ignore[attr-defined]
    with pytest.raises(ParameterError, match=r"Vas: fractoin is not .* Did you mean fraction\?"):
        Vas(features="l14", modality="image", target="pool", fractoin=0.2)


# ---- later faults -------------------------------------------------------------------------------
def memory_source(samples: int = 40, keys: Sequence[str] = ("x_img",)) -> MemorySource:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(samples, 4, generator=generator), dim=1)
    uids = np.arange(2 * samples, dtype=np.uint64).reshape(-1, 2)
    rows = np.arange(samples)
    chunk = Chunk(rows=rows, uids=uids, features=dict.fromkeys(keys, features))
    unbiased = Logits(scale=1.0, has_bias=False)
    return MemorySource(chunk, logits={"learner": unbiased, "reference": unbiased})


def test_a_later_fault_of_a_nested_object_is_told_by_its_option() -> None:
    node = {
        "_target_": "siftclip.selectors.core.compose.Then",
        "stages": {
            "dedup": {
                "_target_": "siftclip.selectors.methods.semdedup.SemDeDup",
                "key": "x_img",
                "fraction": 0.3,
                "keep": "hard",
                "seed": 0,
                "clustering": {
                    "_target_": "siftclip.selectors.fitting.clusters.KMeans",
                    "clusters": "auto",
                    "samples_per_cluster": 1,
                    "sample": 3,
                    "seed": 0,
                },
            }
        },
    }
    objects = BuiltObjects()
    selector = objects.build(node, "selector")

    def select() -> None:
        with objects.told_as_options():
            selector.select(memory_source())

    assert told(select).startswith(
        "selector.stages.dedup.clustering.sample must be at least the number of clusters, 40 of 40"
    )
    with pytest.raises(ParameterError, match=r"^KMeans: sample must be at least"):
        selector.select(memory_source())  # in plain Python


def test_a_later_fault_of_a_column_is_told_by_the_option_of_its_selector(
    compose: Compose, demo_data: DemoData, tmp_path: Path
) -> None:
    words = [f"output_dir={tmp_path}", f"pool.root={demo_data.pool}", "progress=false"]
    column = ["selector=clip_score_column", "selector.column=nothing"]
    config = compose("select", [*words, *column])
    assert told(lambda: select_stage(config)).startswith("selector.column must be a column of ")
    assert told(lambda: score_stage(config)).startswith("selector.column must be a column of ")
    stages = (
        "{half: {_target_: siftclip.selectors.Uniform, seed: 1, fraction: 0.5}, "
        "best: {_target_: siftclip.selectors.External, path: null, column: nothing, "
        "fraction: 0.1}}"
    )
    config = compose(
        "select", [*words, "selector=vas_clip", "~selector.stages", f"+selector.stages={stages}"]
    )
    message = told(lambda: select_stage(config))
    assert message.startswith("selector.stages.best.column must be a column of ")


def test_a_later_fault_in_the_loop_is_told_by_its_option(compose: Compose) -> None:
    config = compose(
        "train",
        [
            "selector=random",
            "online=every_step",
            "selector@online.selector=learnability",
            "online.selector.loss=sigmoid",
        ],
        kind=InLoop,
    )
    built = loop_selector(config.online)
    draw = StepDraw(
        selector=built.selector,
        objects=built.objects,
        schedule=Schedule(filter_ratio=0.5),
        total_steps=2,
        groups=1,
        seed=0,
    )
    source = memory_source(keys=built.selector.requires.features)
    message = told(lambda: draw(source, 0, 20))
    assert message.startswith("online.selector.learner.logit_bias of 'learner' must be given")


# ---- as Hydra builds them -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "builtins.dict", "a": {"b": [1, {"c": 2}]}, "d": [3, [4]]},
        {"_target_": "builtins.dict", "a": {"b": [1]}, "_convert_": "all"},
        {"_target_": "builtins.dict", "a": {"b": [1]}, "_convert_": "partial"},
        {"_target_": "builtins.dict", "a": {"_target_": "builtins.list"}, "_recursive_": False},
        {"_target_": "builtins.dict", "a": {"_target_": "builtins.list"}},
        {"_target_": "builtins.list", "_args_": [[1, {"_target_": "builtins.list"}]]},
        {"_target_": "builtins.dict", "a": {"_target_": "builtins.sorted", "_partial_": True}},
        {"_target_": "builtins.max", "_partial_": True, "_args_": [2], "default": 1},
        {"a": [{"_target_": "builtins.list"}], "b": None},
        [1, {"_target_": "builtins.dict", "a": 1}],
    ],
)
def test_nodes_are_built_as_by_hydra(node: Any) -> None:
    ours, theirs = BuiltObjects().build(node, "selector"), instantiate(node)
    assert same(ours, theirs)


def same(one: Any, other: Any) -> bool:
    """Whether two values are of the same types and content, at any depth."""
    if type(one) is not type(other):
        return False
    if isinstance(one, functools.partial):
        parts = ("func", "args", "keywords")
        return all(same(getattr(one, part), getattr(other, part)) for part in parts)
    if isinstance(one, (dict, DictConfig)):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple, ListConfig)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Keeps:
    """Keeps what it is given, as a selector of somebody else may do."""

    _arguments: ClassVar[dict[str, Any]] = {}  # so that its attributes count as those of a selector

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.first = next(iter(given.values()))


@pytest.mark.parametrize(
    "given", [[1, 2.5, "a", None], [[1], {"b": [2]}], {"a": {"b": [1, {"c": 2}]}}, [{"d": 1}]]
)
def test_what_identifies_an_object_is_that_of_one_that_hydra_builds(given: Any) -> None:
    node = {"_target_": f"{__name__}.Keeps", "given": given, "other": [1]}
    assert describe(BuiltObjects().build(node, "selector")) == describe(instantiate(node))


def test_members_are_those_that_were_built_and_not_copies() -> None:
    node = {
        "_target_": "siftclip.selectors.core.compose.Or",
        "selectors": [{"_target_": "siftclip.selectors.Uniform", "seed": 0, "fraction": 1}],
    }
    objects = BuiltObjects()
    built = objects.build(node, "selector")
    assert describe(built) == describe(instantiate(node))
    message = r"^selector\.selectors\.0\.seed is wrong\."
    with pytest.raises(InputError, match=message), objects.told_as_options():
        raise ParameterError("is wrong", owner=built.selectors[0], parameter="seed")


def test_an_error_of_another_object_stays_as_it_is() -> None:
    objects = BuiltObjects()
    objects.build({"_target_": "builtins.dict"}, "selector")
    for owner in (None, "Vas", object()):
        told_so = pytest.raises(ParameterError, match=r"seed is wrong\.$")
        with told_so, objects.told_as_options():
            raise ParameterError("is wrong", owner=owner, parameter="seed")


def test_a_class_that_fails_in_its_own_way_is_named() -> None:
    node = {"_target_": "builtins.int", "_args_": ["seven"]}
    message = told(lambda: BuiltObjects().build(node, "selector.rule"))
    assert message.startswith("selector.rule: int cannot be built: ValueError: invalid literal")


# ---- other parts of the configuration -----------------------------------------------------------
def test_parameters_are_told_by_the_options_they_are_read_from() -> None:
    names = under("pool", "root", options="storage_options")
    assert names == {"root": "pool.root", "options": "pool.storage_options"}
    for parameter, option in [
        ("root", "pool.root"),
        ("options.key", "pool.storage_options.key"),
        ("cache", "cache"),
    ]:
        message = rf"^{option} must be set\. Got 0\. Set it\."
        with pytest.raises(InputError, match=message), options_of(names):
            raise ParameterError("must be set", parameter=parameter, value=0, way_out="Set it.")
