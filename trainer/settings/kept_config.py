"""The configuration of a run as data, from which a command is composed that repeats it.

A run directory may come from anybody. What its config.yaml says is taken over as values, option by
option. It decides neither what is executed (a `_target_` must be a class of Siftclip's selectors),
nor where something is written, nor which server is asked: for these the command line is asked, by
name. References (`${...}`) are refused, since they could read the environment.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from hydra.core.config_store import ConfigStore

import siftclip.selectors
from siftclip.aliases import old_name
from siftclip.errors import InputError
from siftclip.files import identity_hash
from siftclip.redaction import HIDDEN, begins_as_url, printable
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.composed import Composed
from siftclip.trainer.settings.data import BudgetSettings
from siftclip.trainer.settings.fields.rules import alternatives, hints, joined
from siftclip.trainer.settings.logger import LoggerSettings
from siftclip.trainer.settings.selector import SelectorNode
from siftclip.trainer.settings.store import STORED, node_of

_NAME = "of_run_"  # begins the name of the configurations that a run gives to the groups
_PLUGIN = "siftclip.selectors.build_plugin"
_OPEN = "???"
_DEFAULTS = "defaults"
_REFERENCE = re.compile(r"\\*\$\{")
_EXTENSIONS = ("callbacks", "plugins")  # of the trainer, which may change what is trained
_LOOKING_ON = ("loggers", "profiler")  # the same, which do not
# Options that say where something is written, or how this machine works: the user's own
OF_THE_MACHINE = (
    *("pool.cache_dir", "pool.index_workers", "pool.shard_cache_gb", "eval.cache_dir"),
    *(f"trainer.{name}" for name in _LOOKING_ON),
)
_SELECTORS = ("selector", "online.selector", "online.first_stage.selector")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptConfig:
    """What a run's configuration gives to a command."""

    groups: Mapping[str, Mapping[str, Any]]  # the values of each group of options
    values: Mapping[str, Any]  # of single options: the seed, and the budget
    left_out: tuple[str, ...]  # options that are not taken over, with their values, as sentences
    refused: Mapping[str, str]  # what must be typed: options, and why, with what to type

    @property
    def name(self) -> str:
        """What the command line calls the configurations of this run."""
        return f"{_NAME}{identity_hash(self.groups)}"

    def part(self, names: Sequence[str]) -> KeptConfig:
        """Return some groups alone, with the budget."""
        return KeptConfig(
            groups={name: self.groups[name] for name in names if name in self.groups},
            values={name: value for name, value in self.values.items() if name != "seed"},
            left_out=self.left_out,
            refused={o: why for o, why in self.refused.items() if o.partition(".")[0] in names},
        )

    def words(self, typed: Sequence[str]) -> list[str]:
        """Return the overrides that choose what the run has, in front of what was typed.

        Raises:
            InputError: something that the run does not decide was not typed.
        """
        keys = [word.partition("=")[0].lstrip("+~") for word in typed if "=" in word or "~" in word]
        missing = [
            f"{option} {why}"
            for option, why in self.refused.items()
            if not any(_covers(key, option) for key in keys)
        ]
        if missing:
            raise InputError("\n  ".join(missing) if len(missing) == 1 else _several(missing))
        chosen = [group for group in self.groups if group not in keys]
        return [
            *(f"{group}={self.name}" for group in chosen),
            *(f"{name}={_typed(value)}" for name, value in self.values.items()),
        ]

    def register(self) -> None:
        """Make Hydra find the groups: GROUP=NAME."""
        for group, node in self.groups.items():
            ConfigStore.instance().store(
                group=group, name=self.name, node={**node}, package=group, provider="siftclip"
            )


def _several(missing: Sequence[str]) -> str:
    return "\n  ".join([f"{len(missing)} options must be typed:", *missing])


def _covers(key: str, option: str) -> bool:
    """Return whether typing a key decides about an option: it, or all of what it is in."""
    group = key.partition("@")[2] or key
    return option == group or option.startswith(f"{group}.")


def kept_config(config: Mapping[str, Any], *, owner: str) -> KeptConfig:
    """Take over the configuration of a run.

    Args:
        config: as it was read, plain values.
        owner: its file, for messages.

    Raises:
        InputError: it is none of a run, or has what such a file never has.
    """
    _require_plain(config, owner)
    taken = _Taken(owner=owner)
    groups: dict[str, dict[str, Any]] = {}
    for group, hint in hints(TrainCommand).items():
        if hint in (CommonSettings, LoggerSettings, Composed) or group == "budget":
            continue
        values = config.get(group)
        if not isinstance(values, Mapping):
            raise InputError(f"{owner} is not the configuration of a run: it has no {group}.")
        groups[group] = taken.group(hint, values, group)
    _settle_places(groups, config, taken)
    for place in _SELECTORS:
        node = _at(groups, place)
        if isinstance(node, dict):
            _restore_references(node, place, config)
    values = {"seed": _seed(config, owner), **taken.budget(config.get("budget"))}
    return KeptConfig(
        groups=groups,
        values=values,
        left_out=tuple(taken.left_out),
        refused=taken.refused,
    )


def _require_plain(value: Any, owner: str, place: str = "") -> None:
    """Check that nothing refers to something else, and keys are texts that cannot steer Hydra."""
    if isinstance(value, str):
        if _REFERENCE.search(value):
            raise InputError(
                f"{owner}: {place} has a reference, {reprlib.repr(value)}. The configuration of a "
                "run is written with its values."
            )
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str) or _REFERENCE.search(name):
                raise InputError(f"{owner}: {place} has the name {reprlib.repr(name)}.")
            _require_plain(inner, owner, joined(place, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _require_plain(inner, owner, joined(place, str(number)))


@dataclass(slots=True)
class _Taken:
    """Collects what is not taken over."""

    owner: str
    left_out: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def group(self, hint: Any, values: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Take the values of a group that this version knows; what is missing has its default."""
        kinds = [kind.plain for kind in alternatives(hint) if kind.is_group]
        if SelectorNode in kinds:
            return self.selector(values, place)
        kind = self._chosen(kinds, values, place)
        node = _defaults(kind, values, place)
        for name, value in values.items():
            option = joined(place, name)
            if name not in hints(kind):
                self.left_out.append(f"{option} is unknown to this version: {_shown(value)}")
            elif option in OF_THE_MACHINE:
                if value not in (None, node.get(name)):
                    self.left_out.append(f"{option} is this machine's own: {_shown(value)}")
            elif option in (f"trainer.{each}" for each in _EXTENSIONS) and value:
                self._refuse_extension(option, value)
            else:
                node[name] = self._value(hints(kind)[name], value, option)
        return node

    def _value(self, hint: Any, value: Any, option: str) -> Any:
        has_group = any(kind.is_group for kind in alternatives(hint))
        if has_group and isinstance(value, Mapping):
            return self.group(hint, value, option)
        self._require_no_target(value, option)
        return value

    def _chosen(self, kinds: Sequence[type], values: Mapping[str, Any], place: str) -> type:
        """Find the group that values are of: several differ by their first option."""
        if len(kinds) == 1:
            return kinds[0]
        tag = next(iter(hints(kinds[0])))
        for kind in kinds:
            if values.get(tag) in get_args(hints(kind)[tag]):
                return kind
        raise InputError(
            f"{self.owner}: {joined(place, tag)} is {_shown(values.get(tag))}, which this version "
            "does not know."
        )

    def selector(self, node: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Take a selector's node if its classes are Siftclip's own."""
        taken: dict[str, Any] = {}
        for name, value in node.items():
            option = joined(place, name)
            if name == _DEFAULTS:  # Hydra would read it as a list of configurations
                raise InputError(f"{self.owner}: {option} is no parameter of a selector.")
            if name == "_target_":
                if not isinstance(value, str) or value not in _own_targets():
                    self._refuse_target(option, value)
                    value = _OPEN
            elif isinstance(value, Mapping):
                value = self.selector(value, option)
            elif isinstance(value, list):
                value = self._selectors(value, option)
            taken[name] = value
        return taken

    def _selectors(self, values: list[Any], option: str) -> Any:
        """Take a list in a selector's node; as a whole, as single items cannot be typed."""
        inner = _Taken(owner=self.owner)
        items = [
            inner.selector(value, option)
            if isinstance(value, Mapping)
            else inner._selectors(value, option)
            if isinstance(value, list)
            else value
            for value in values
        ]
        if not inner.refused:
            return items
        targets = sorted({str(target) for target in _targets(values)} - _own_targets())
        self._refuse_target(option, ", ".join(targets))
        return _OPEN

    def _refuse_target(self, option: str, target: Any) -> None:
        self.refused[option] = (
            f"is {_shown(target)} in {self.owner}, which is no class of siftclip.selectors. What "
            "lies in a run directory does not decide what is executed: type it if you know it, "
            f"{option}={_shown(target)}."
        )

    def _refuse_extension(self, option: str, value: Any) -> None:
        targets = ", ".join(sorted({str(target) for target in _targets(value)}))
        self.refused[option] = (
            f"names {_shown(targets)} in {self.owner}. What lies in a run directory does not "
            f"decide what is executed: type it if you know it, {option}=[{{_target_:...}}], or "
            f"{option}=null to do without."
        )

    def _require_no_target(self, value: Any, option: str) -> None:
        targets = [*_targets(value)]
        if targets:
            raise InputError(f"{self.owner}: {option} has the class {_shown(targets[0])}.")

    def budget(self, values: Any) -> dict[str, Any]:
        """Take the budget, whose options are not in a group of configurations."""
        given = values if isinstance(values, Mapping) else {}
        known = hints(BudgetSettings)
        return {
            f"budget.{name}": value
            for name, value in given.items()
            if name in known and isinstance(value, int | float | NoneType)
        }


def _defaults(kind: type, values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the defaults of a group, in the configuration that has about the same options."""
    stored = [each.own_values() for each in STORED if each.group == place and each.kind is kind]
    nodes = [{**each} for each in stored] or [node_of(kind)]
    return min(nodes, key=lambda node: len(node.keys() ^ values.keys()))


def _settle_places(
    groups: Mapping[str, dict[str, Any]], config: Mapping[str, Any], taken: _Taken
) -> None:
    """Decide about places and servers: what is read may be named by a run, not who is asked."""
    pool, features = groups["pool"], groups["features"]
    root, options = str(pool.get("root")), pool.get("storage_options")
    if begins_as_url(root):
        taken.refused["pool.root"] = (
            f"is the URL {_shown(root)} in {taken.owner}. What lies in a run directory does not "
            f"decide which server is asked: type it, pool.root={_shown(root)}."
        )
    if isinstance(options, Mapping) and options:
        pool["storage_options"] = {}
        hidden = HIDDEN in str(options)
        taken.left_out.append(
            f"pool.storage_options are not taken over{', and not kept' if hidden else ''}: "
            f"{', '.join(map(printable, map(str, options)))}"
        )
    cache, model = _at(config, "pool.cache_dir"), features.get("model")
    if features.get("root") is None and isinstance(model, Mapping) and isinstance(cache, str):
        folder = Path(cache) / "features" / str(features.get("name"))
        if folder.is_dir():  # that it is read is no harm
            features["root"] = str(folder)


def _seed(config: Mapping[str, Any], owner: str) -> int:
    seed = config.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"{owner}: seed must be a whole number. Got {_shown(seed)}.")
    return seed


@functools.cache
def _own_targets() -> frozenset[str]:
    """Return the names of the classes that a selector of ours may consist of."""
    names = {_PLUGIN}
    for name in dir(siftclip.selectors):  # the public ones
        value = getattr(siftclip.selectors, name)
        if isinstance(value, type):
            module = value.__module__
            names |= {f"{each}.{name}" for each in ("siftclip.selectors", module, old_name(module))}
    return frozenset(names)


def _targets(value: Any) -> Iterator[Any]:
    """Yield what `_target_` names anywhere in a value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "_target_":
                yield inner
            else:
                yield from _targets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _targets(inner)


# ---- references ---------------------------------------------------------------------------------
def _restore_references(node: dict[str, Any], place: str, config: Mapping[str, Any]) -> None:
    """Put back the references of a selector's own file, where they give what the run has.

    A run's configuration has values in their place, those of a selector in the loop even of other
    features than it reads: there `features.name` means `online.features`.
    """
    name = node.get("name")
    path = importlib.resources.files("siftclip.configs").joinpath("selector", f"{name}.yaml")
    if not isinstance(name, str) or re.fullmatch(r"\w+", name) is None or not path.is_file():
        return
    file = yaml.safe_load(path.read_text(encoding="utf-8"))
    _restore(node, file, {"features.name": _at(config, "features.name"), "seed": config["seed"]})


def _restore(node: dict[str, Any], file: Mapping[str, Any], meant: Mapping[str, Any]) -> None:
    for name, text in file.items():
        value = node.get(name)
        if isinstance(text, Mapping) and isinstance(value, dict):
            _restore(value, text, meant)
        elif isinstance(text, str) and "${" in text:
            whole = re.fullmatch(r"\$\{([\w.]+)\}", text)
            filled = re.sub(r"\$\{([\w.]+)\}", lambda match: str(meant.get(match[1])), text)
            given = meant.get(whole[1]) if whole else filled
            if value == given and type(value) is type(given):
                node[name] = text


def _at(tree: Any, place: str) -> Any:
    for name in place.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)
    return printable(text[:300])


def _typed(value: Any) -> str:
    return "null" if value is None else str(value)
