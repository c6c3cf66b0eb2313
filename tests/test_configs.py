"""Every file under configs/ composes with every command, and what the help texts say is true."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from siftclip.selectors.core.base import Selector
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.builders.selection import selector_from
from siftclip.trainer.cli.application import _named
from siftclip.trainer.cli.main import COMMANDS
from siftclip.trainer.settings.commands import COMMANDS as READ_BY
from siftclip.trainer.settings.composed import plain_tree
from siftclip.trainer.settings.describing.help import register_resolvers
from siftclip.trainer.settings.fields.reader import read
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.store import STORED, composing
from siftclip.trainer.settings.unused import unused_options

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LISTS = Path(__file__).parent / "lists"
SHARED = "siftclip"  # what all commands build on

# One value for each option that a file leaves open (???).
VALUES = {
    "pool.root": "/data/pool",
    "features.name": "mine",
    "features.model.name": "ViT-B-32",
    "model.name": "ViT-B-32",
    "compact.output": "copy",
    "watch.run": "outputs/train/run",
    "diff.a": "outputs/train/run",
    "diff.b": "outputs/train/other",
    "download.folder": "/data/evalsets",
    "subset_import.path": "best.npy",
    "subset_export.subset": "best",
    "subset_export.path": "best.npy",
    "subset_show.name": "best",
    "subset_combine.name": "both",
    "subset_combine.operation": "union",
    "subset_combine.a": "best",
    "subset_verify.subset": "best",
    "reproduce.run": "outputs/train/run",
    "report.runs": ["outputs/train/run"],
    "runs_show.run": "outputs/train/run",
    "runs_rm.run": "outputs/train/run",
    "export.source": "outputs/train/run",
    "export.path": "model.pt",
    "target.root": "/data/tasks",
    "loss.plugin": "mine",
    "selector.path": "subset.npy",
    "selector.plugin": "clip_score",  # the package registers it as the example of the group
}
# The same for selectors, whose members may be at any depth, by the last part of the name.
VALUES_OF_MEMBERS = {
    "path": "subset.npy",
    "column": "score",
    "target": "target.npz",
    "entities": str(LISTS / "synsets.txt"),
    "entries": str(LISTS / "entries.txt"),
}
# What words without = stand for
POSITIONAL = {
    "eval": ["model.name", "model.pretrained"],
    "eval watch": ["watch.run"],
    "eval diff": ["diff.a", "diff.b"],
    "eval download": ["download.folder"],
    "subset import": ["subset_import.path", "subset_import.name"],
    "subset export": ["subset_export.subset", "subset_export.path"],
    "subset show": ["subset_show.name"],
    "subset combine": [f"subset_combine.{word}" for word in ("name", "operation", "a", "b")],
    "subset verify": ["subset_verify.subset"],
    "show": ["show.selection"],
    "diff": ["show.selection", "show.other"],
    "report": ["report.runs"],
    "reproduce": ["reproduce.run"],
    "runs list": ["runs_list.kinds"],
    "runs show": ["runs_show.run"],
    "runs rm": ["runs_rm.run"],
    "runs gc": ["runs_gc.kinds"],
}
# These take little more than the words behind them
OF_FEW_OPTIONS = ("subset list", "subset show", "runs list", "runs show")
WITHOUT_POOL = (
    *("eval", "eval watch", "eval diff", "eval download", "demo", "export", "target"),
    *("subset import", "subset export", "subset list", "subset show", "subset combine"),
    *(
        "subset verify",
        "runs list",
        "runs show",
        "runs rm",
        "runs gc",
        "report",
        "show",
        "diff",
        "reproduce",
    ),
)  # these do without pool.root

# Numbers that files of selectors set otherwise than the classes do by themselves.
OTHER_DEFAULTS = {
    ("KMeans", "spherical"),  # DataComp's image-based filter
    ("NormSim", "p"),  # several papers
    ("SoftmaxSampling", "temperature"),  # of cosines
}

# How many there were when this was written: a test that finds none would pass.
AT_LEAST = {"experiment": 4, "model": 4, "scale": 3, "selector": 4}


def groups() -> dict[str, list[str]]:
    """The options of every group."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        group = path.parent.relative_to(CONFIGS).as_posix()
        if group != ".":
            found.setdefault(group, []).append(path.stem)
    for stored in STORED:  # and those that stand in the dataclasses
        if stored.group is not None:
            found.setdefault(stored.group, []).append(stored.name)
    return {group: sorted(options) for group, options in sorted(found.items())}


GROUPS = groups()
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options]


def combinations(*, selectors: int | None = None, alone: bool = True) -> Iterator[list[str]]:
    """Overrides that name every option once: alone where it sets other groups, else together.

    With `selectors` only the first so many of that group, which is longer than all others; without
    `alone` not the options that set other groups.
    """
    setting_others = ("experiment", "scale")
    if alone:
        yield from ([f"{group}={name}"] for group, name in OPTIONS if group in setting_others)
    together = [
        [f"{group}={option}" for option in options[: selectors if group == "selector" else None]]
        for group, options in GROUPS.items()
        if group not in setting_others
    ]
    for row in itertools.zip_longest(*together):
        yield [override for override in row if override is not None]


@pytest.fixture(autouse=True)
def hydra_tree() -> Iterator[None]:
    """Hydra, initialised as the commands do it, and left as if nothing had been."""
    GlobalHydra.instance().clear()
    with composing():
        yield
    GlobalHydra.instance().clear()


def open_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of what is `???` in plain, unresolved values."""
    for key, value in node.items():
        if value == "???":
            yield prefix + key
        elif isinstance(value, dict):
            yield from open_keys(value, f"{prefix}{key}.")


def fill(config: DictConfig) -> set[str]:
    """Give every option that is left open a value, and say which these were."""
    missing = set(open_keys(OmegaConf.to_container(config, resolve=False)))
    for key in missing:
        OmegaConf.update(config, key, VALUES.get(key) or value_of_member(key))
    return missing


def value_of_member(key: str) -> str:
    """A value for what a selector leaves open, at any depth of a composition."""
    assert key.startswith("selector."), key
    return VALUES_OF_MEMBERS[key.rpartition(".")[2]]


def config_name(command: str) -> str:
    """The name of a command's file: `data_compact` of `data compact`."""
    return command.replace(" ", "_")


def composed(command: str, *overrides: str) -> DictConfig:
    """The configuration of a command, nothing left open."""
    config = compose(config_name=config_name(command), overrides=list(overrides))
    fill(config)
    return config


def resolved(config: DictConfig) -> dict[str, Any]:
    """The same as plain values; a missing value or a dangling interpolation fails."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return plain


def template(command: str) -> str:
    """What `siftclip COMMAND --help` prints, before Hydra fills in the names."""
    register_resolvers()
    config = OmegaConf.load(CONFIGS / f"{config_name(command)}.yaml")
    return str(config.hydra.help.template)


def examples(command: str) -> list[list[str]]:
    """The example lines of a help text, as lists of words."""
    part = template(command).partition("Examples:\n")[2].partition("\n\n")[0]
    return [shlex.split(line) for line in part.splitlines()]


def arguments_of(words: list[str], command: str) -> list[str]:
    """What follows the command, whether siftclip is started directly or by torchrun."""
    if words[0] == "siftclip":
        start = 1
    else:
        assert words[0] == "torchrun"
        start = words.index("siftclip.trainer.cli") + 1
        assert words[start - 2] == "-m"
    first = start + len(command.split())
    assert " ".join(words[start:first]) == command
    return words[first:]


def jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep; of the only job where nothing is swept."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{item.key_or_group}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [str(item.input_line)]
        for item in parsed
    ]
    return [list(job) for job in itertools.product(*choices)]


# ---- the tree -----------------------------------------------------------------------------------
def test_every_command_has_a_config_and_every_config_a_command() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*map(config_name, COMMANDS), SHARED}


def test_nothing_was_overlooked() -> None:
    assert sorted(itertools.chain(*combinations())) == sorted("=".join(pair) for pair in OPTIONS)
    for group, count in AT_LEAST.items():
        assert len(GROUPS[group]) >= count
    assert len(GROUPS) >= 12
    in_files = len(list(CONFIGS.rglob("*.y*ml"))) - len(COMMANDS) - 1
    in_code = sum(stored.group is not None for stored in STORED)
    assert len(OPTIONS) == in_files + in_code >= 33
    assert in_code >= 15


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose_with_every_option(command: str) -> None:
    assert resolved(composed(command))["seed"] == 0
    # the commands that select or train share their nodes for it; test_selectors_build has them all
    for overrides in combinations(selectors=6, alone=command in ("train", "compare")):
        assert resolved(composed(command, *overrides)), overrides


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_an_experiment_gives_way_to_the_command_line(experiment: str) -> None:
    config = composed("train", f"experiment={experiment}", "scale.samples_seen=77", "seed=5")
    assert (config.scale.samples_seen, config.seed) == (77, 5)


@pytest.mark.parametrize("source", ["compare", *(f"experiment={e}" for e in GROUPS["experiment"])])
def test_arms_compose_and_their_selectors_build(source: str) -> None:
    base = [source] if "=" in source else []
    arms = OmegaConf.to_container(composed("compare", *base).compare.arms, resolve=False)
    assert isinstance(arms, dict)
    for own in arms.values():
        config = composed("compare", "pool.root=/data/pool", *base, *own)
        selector = selector_from(plain_tree(config)["selector"]).selector
        assert isinstance(selector, Selector)


@pytest.mark.parametrize("group", ["experiment", "scale"])
def test_combinations_begin_with_a_header(group: str) -> None:
    for option in GROUPS[group]:
        lines = (CONFIGS / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
        assert lines[0] == "# @package _global_", option
        assert re.match(r"# \w.{20}", lines[1]), f"{group}/{option}.yaml says nothing of itself"


# ---- what the options build ---------------------------------------------------------------------
@pytest.mark.parametrize("option", GROUPS["selector"])
def test_selectors_build(option: str) -> None:
    # a plug-in's own parameters come with a plus; those of this one:
    own = ["+selector.features=l14"] if option == "plugin" else []
    config = composed("select", f"selector={option}", *own)
    assert resolved(config)
    built = selector_from(plain_tree(config)["selector"])
    assert isinstance(built.selector, Selector)
    assert built.name == (VALUES["selector.plugin"] if option == "plugin" else option)
    assert "_target_" in built.parameters  # what identifies the scores


def defaults_of(cls: type) -> dict[str, Any]:
    """Of all parameters of a class that have one, also of those that its base classes take."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    signatures = [inspect.signature(constructor) for constructor in reversed(constructors)]
    found = {name: one.default for each in signatures for name, one in each.parameters.items()}
    return {name: value for name, value in found.items() if value is not inspect.Parameter.empty}


def nodes_of(value: Any) -> Iterator[dict[str, Any]]:
    """The nodes of plain values that name a class, at any depth."""
    if isinstance(value, dict) and "_target_" in value:
        yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, (dict, list)):
            yield from nodes_of(child)


def test_options_of_selectors_are_the_defaults_of_their_classes() -> None:
    compared = 0
    for option in GROUPS["selector"]:
        config = OmegaConf.load(CONFIGS / "selector" / f"{option}.yaml")
        for node in nodes_of(OmegaConf.to_container(config, resolve=False)):
            module, _, name = node["_target_"].rpartition(".")
            target = getattr(importlib.import_module(module), name)
            defaults = defaults_of(target) if isinstance(target, type) else {}  # of no function
            for key, value in node.items():
                default = defaults.get(key)
                is_set = isinstance(value, (bool, int, float)) or default == value
                if is_set and default is not None and (name, key) not in OTHER_DEFAULTS:
                    assert value == default, f"selector/{option}.yaml: {name}.{key}"
                    compared += 1
    assert compared > 90


@pytest.mark.parametrize("option", ["rn_tiny", "vit_tiny"])
def test_small_models_build(option: str) -> None:
    config = composed("train", f"model={option}")
    model = read(ModelSettings, plain_tree(config)["model"], "model")
    clip: Any = clip_model_from(model).model.eval()
    with torch.no_grad():
        images = clip.encode_image(torch.zeros(2, 3, 32, 32))
        texts = clip.encode_text(torch.zeros(2, 16, dtype=torch.int64))
    assert images.shape == texts.shape == (2, config.model.architecture.embed_dim)


# ---- the help texts -----------------------------------------------------------------------------
@pytest.mark.parametrize("command", COMMANDS)
def test_examples_compose(command: str) -> None:
    found = examples(command)
    assert len(found) >= 2
    for words in found:
        arguments = arguments_of(words, command)
        flags = {"--multirun", "-m", "--serve"}
        assert {word for word in arguments if word.startswith("-")} <= flags
        named = _named(command, arguments, POSITIONAL.get(command, []))
        overrides = [word for word in named if not word.startswith("-")]
        for job in jobs(overrides):
            config = compose(config_name=config_name(command), overrides=job)
            assert not list(unused_options(READ_BY[command], job, config)), words
            missing = fill(config)
            assert missing <= ({"pool.root"} if command in WITHOUT_POOL else set()), words
            assert resolved(config)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_only_options_that_exist(command: str) -> None:
    text = template(command)
    config = compose(config_name=config_name(command))
    named = re.findall(r"(?<![\w./=@-])([a-z][a-z_.]*)=", text.partition("Examples:")[0])
    assert len(named) >= (1 if command in OF_FEW_OPTIONS else 3)
    for key in named:
        node: Any = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        known = key in GROUPS or last in node.keys()  # noqa: SIM118 - `in node` is false for ???
        assert known, f"{key} is not an option of siftclip {command}"
    assert text.startswith(f"siftclip {command}: ")
    assert f"siftclip {command} --cfg job" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_all_of_a_group(command: str) -> None:
    text = template(command).partition("Examples:")[0]
    for line in re.sub(r"\n {30,}", " ", text).splitlines():  # a text may go on in the next line
        group, _, rest = line.strip().partition("=")
        if "siftclip select --help" in rest:
            continue  # many selectors, which that command lists
        if group in GROUPS and group != "experiment":  # some of these are inner parts of the demo
            missing = set(GROUPS[group]) - set(re.findall(r"\w+", rest))
            assert not missing, f"siftclip {command} --help, {group}: {missing}"
