"""What all options are, from the groups that define them: for `explain`, help texts and docs."""

from __future__ import annotations

import ast
import functools
import importlib.resources
import inspect
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import yaml

from siftclip.trainer.settings.commands import COMMANDS
from siftclip.trainer.settings.common import CommonSettings, SelectOptions
from siftclip.trainer.settings.fields.marks import Example, Follows, Late, Open, Rare
from siftclip.trainer.settings.fields.rules import alternatives, hints, joined, mark_of, words
from siftclip.trainer.settings.read_command import groups
from siftclip.trainer.settings.selector import SelectorNode
from siftclip.trainer.settings.store import STORED, Stored, node_of

OPEN = "???"  # how a configuration writes what has no value


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of the commands."""

    name: str  # dotted
    hint: Any  # its annotation
    meaning: str
    kind: type  # the group that has it
    choices: tuple[str, ...]  # the configurations that have it: "online=every_step"; empty: all
    defaults: Mapping[str, Any]  # by such a configuration; "" where it is the same in all
    commands: tuple[str, ...]  # that need it

    @property
    def group(self) -> str:
        """The group that it is in; empty at the top level."""
        return self.name.partition(".")[0] if "." in self.name else ""

    @property
    def is_selector(self) -> bool:
        """Whether it is a selector's node."""
        return any(kind.plain is SelectorNode for kind in alternatives(self.hint))

    @property
    def is_choice_of_group(self) -> bool:
        """Whether it says which configuration of its group this is."""
        hint = groups().get(self.group)
        several = hint is not None and len(alternatives(hint)) > 1
        return several and self.name == joined(self.group, next(iter(hints(self.kind))))

    @property
    def allowed(self) -> str:
        """What it can be, in words."""
        if self.is_selector:
            return f"a selector: {_chosen_by(self.name)}NAME"
        return words(self.hint)

    @property
    def type(self) -> str:
        """Its type, in a word."""
        names = [_type_name(kind.plain, kind.origin) for kind in alternatives(self.hint)]
        return " or ".join(dict.fromkeys(names))

    @property
    def default(self) -> str:
        """Its default, as it is typed."""
        follows = mark_of(self.hint, Follows)
        if follows is not None:
            return f"that of {follows.option}"
        if self.is_choice_of_group or (self.is_selector and not self.defaults):
            return f"set by {self.group or self.name}=NAME"
        texts = {choice: _default_text(value, self.name) for choice, value in self.defaults.items()}
        if len(set(texts.values())) < 2:
            return next(iter(texts.values()), "null")
        return "; ".join(f"{text} ({choice})" for choice, text in texts.items())

    @property
    def example(self) -> str:
        """The option with a value, as it is typed in a shell."""
        if self.is_selector:
            return f"{_chosen_by(self.name)}learnability"
        if self.is_choice_of_group:
            return self.choices[-1]
        example = mark_of(self.hint, Example)
        value = _example(self.hint, next(iter(self.defaults.values()), None), self.name)
        plus = "+" if mark_of(self.hint, Rare) is not None else ""
        return shlex.quote(f"{plus}{self.name}={value if example is None else example.text}")


# ---- all of them --------------------------------------------------------------------------------
@functools.cache
def all_options() -> dict[str, Option]:
    """Return all options by dotted names; what stands in several configurations is one option."""
    options: dict[str, Option] = {}
    for kind in (CommonSettings, SelectOptions):
        users = tuple(name for name, command in COMMANDS.items() if kind in hints(command).values())
        for option in _options_of(kind, "", "", users):
            options[option.name] = option
    for group, hint in groups().items():
        users = tuple(name for name, command in COMMANDS.items() if group in hints(command))
        if hint is SelectorNode:
            options[group] = Option(
                name=group,
                hint=hint,
                meaning="Selects before training; its own parameters are in docs/selectors.md.",
                kind=SelectorNode,
                choices=(),
                defaults={},
                commands=users,
            )
            continue
        for kind in (alternative.plain for alternative in alternatives(hint)):
            for choice in _choices_of(kind, group):
                for option in _options_of(kind, group, choice, users):
                    options[option.name] = _united(options.get(option.name), option)
    return options


def takes_more(name: str) -> bool:
    """Return whether a mapping takes names that the configuration lacks: `+NAME.MORE=VALUE`."""
    options = all_options()
    if "selector" in name.split("."):
        return True
    while name:
        known = options.get(name)
        if known is not None and mark_of(known.hint, Open) is not None:
            return True
        name = name.rpartition(".")[0]
    return False


def _options_of(kind: type, prefix: str, choice: str, users: tuple[str, ...]) -> Iterator[Option]:
    same = [stored for stored in STORED if stored.kind is kind and choice in ("", _label(stored))]
    node = {**node_of(kind), **(same[0].own_values() if same else {})}
    if same:
        node = {name: value for name, value in node.items() if name not in same[0].left_out}
    yield from _walk(kind, prefix, node, choice, users)


def _walk(
    kind: type, prefix: str, node: Mapping[str, Any], choice: str, users: tuple[str, ...]
) -> Iterator[Option]:
    texts = meanings(kind)
    for name, hint in hints(kind).items():
        inner = [alternative.plain for alternative in alternatives(hint) if alternative.is_group]
        if inner and SelectorNode not in inner:
            below = node.get(name)
            below = below if isinstance(below, dict) else {}
            yield from _walk(inner[0], joined(prefix, name), below, choice, users)
            continue
        yield Option(
            name=joined(prefix, name),
            hint=hint,
            meaning=texts[name],
            kind=kind,
            choices=(choice,) if choice else (),
            defaults={choice: node[name]} if name in node else {},
            commands=users,
        )


def _choices_of(kind: type, group: str) -> list[str]:
    """List the configurations that a group is chosen by, where there are several."""
    in_group = [stored for stored in STORED if stored.group == group]
    if len(in_group) < 2:
        return [""]
    return [_label(stored) for stored in in_group if stored.kind is kind]


def _label(stored: Stored) -> str:
    return f"{stored.group}={stored.name}"


def _chosen_by(name: str) -> str:
    """Return what chooses a selector's node."""
    return "selector=" if name == "selector" else f"selector@{name}="


def _united(known: Option | None, option: Option) -> Option:
    if known is None:
        return option
    return Option(
        name=option.name,
        hint=known.hint if known.hint == option.hint else known.hint | option.hint,
        meaning=known.meaning,
        kind=known.kind,
        choices=(*known.choices, *option.choices),
        defaults={**known.defaults, **option.defaults},
        commands=known.commands,
    )


@functools.cache
def meanings(kind: type) -> dict[str, str]:
    """Return the texts below the fields of a group, those of its base classes included."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("siftclip."):
            texts |= _texts(base)
    return texts


def _texts(kind: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    texts = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(words_))):
                    texts[field.target.id] = " ".join(words_.split())
    return texts


def configurations(group: str) -> list[str]:
    """List the names that a group can be chosen by: GROUP=NAME."""
    folder = importlib.resources.files("siftclip.configs").joinpath(group)
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    names = {name.removesuffix(".yaml") for name in files if name.endswith(".yaml")}
    return sorted(names | {stored.name for stored in STORED if stored.group == group})


# ---- words --------------------------------------------------------------------------------------
def _type_name(plain: Any, origin: Any) -> str:
    if plain is type(None):
        return "null"
    if origin is Literal:
        return "auto" if get_args(plain) == ("auto",) else "choice"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", tuple: "list"}
    return names.get(origin, "mapping" if origin is Mapping else "selector")


def _default_text(value: Any, name: str) -> str:
    if value == OPEN:
        group = name.partition(".")[0]
        return f"set by {group}=NAME" if group in ("scale", "model") else "none: it must be given"
    return as_typed(value)


def as_typed(value: Any) -> str:
    """Format a value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        return yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return str(value)


def _example(hint: Any, default: Any, name: str) -> str:
    """Return a possible value of the option, other than its default if that is easily said."""
    kinds = alternatives(hint)
    for kind in kinds:
        others = [choice for choice in get_args(kind.plain) if choice != default]
        if kind.origin is Literal and others:
            return str(others[0])
    if any(kind.plain is bool for kind in kinds):
        return "false" if default is True else "true"
    if any(kind.plain in (int, float) for kind in kinds):
        number = isinstance(default, int | float) and not isinstance(default, bool)
        below_one = any(
            type(mark).__name__ in ("Le", "Lt") for kind in kinds for mark in kind.marks
        )
        return as_typed(default) if number else "0.5" if below_one else "2"
    for kind in kinds:
        if kind.origin is tuple:
            elements = alternatives(get_args(kind.plain)[0])
            return "[a,b]" if any(element.plain is str for element in elements) else "[1,2]"
    if mark_of(hint, Late) is None and isinstance(default, str) and default != OPEN:
        return default
    if name.rpartition(".")[2] in _PATHS:
        return "some/path"
    return "{}" if any(kind.origin is Mapping for kind in kinds) else "name"


_PATHS = ("root", "path", "folder", "output", "run_dir", "output_dir", "cache_dir", "source", "run")
