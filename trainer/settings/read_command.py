"""From a composed configuration to what a command takes, all faults of its options told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from siftclip.errors import InputError
from siftclip.trainer.settings.commands import COMMANDS
from siftclip.trainer.settings.common import CommonSettings, SelectOptions
from siftclip.trainer.settings.composed import Composed, composed, plain_tree, references
from siftclip.trainer.settings.fields.reader import Reader
from siftclip.trainer.settings.fields.rules import (
    Fault,
    Unset,
    alternatives,
    hints,
    required,
    unknown,
)
from siftclip.trainer.settings.store import configuration_groups, register

T = TypeVar("T")

# The groups that stand at the top level itself
_TOP = (CommonSettings, SelectOptions)


def groups() -> dict[str, Any]:
    """Return all groups of options by their names, and the annotations of what they are."""
    hints_of: dict[str, Any] = {}
    for kind in COMMANDS.values():
        for name, hint in hints(kind).items():
            if hint not in (*_TOP, Composed):
                hints_of.setdefault(name, hint)  # later commands may do without some
    return hints_of


def top_level() -> dict[str, Any]:
    """Return the options at the top level that are no groups."""
    return {name: hint for kind in _TOP for name, hint in hints(kind).items()}


def read_command(kind: type[T], config: DictConfig) -> T:
    """Read what a command takes, from its configuration.

    What the command does not need may lack values, and must be right otherwise. A group that may be
    None is None where a value is missing that it would need.

    Raises:
        InputError: values are wrong, missing or unknown; all of them are told.
    """
    tree = plain_tree(config)
    reader = Reader(late=getattr(kind, "LATE", ()))
    given: dict[str, Any] = {}
    needed = hints(kind)
    for name, hint in needed.items():
        if hint is Composed:
            given[name] = composed(tree)
        elif hint in _TOP:
            values = {option: tree[option] for option in hints(hint) if option in tree}
            given[name] = reader.read(hint, values, "")
        elif _is_left_out(hint, tree.get(name)):
            given[name] = None
            needed = {other: needed[other] for other in needed if other != name}
        else:
            given[name] = reader.read(hint, tree.get(name, Unset()), name)
    others = Reader(needed=False)
    for name, hint in groups().items():
        if name not in needed and name in tree:
            others.read(hint, tree[name], name)
    reader.faults += others.faults
    reader.faults += _strangers(tree, config)
    reader.raise_if_faulty()
    return kind(**given)


def _is_left_out(hint: Any, value: Any) -> bool:
    """Return whether a group may be None, and lacks a value that it would need."""
    kinds = alternatives(hint)
    if not any(kind.plain is NoneType for kind in kinds) or not isinstance(value, Mapping):
        return False
    group = next(kind.plain for kind in kinds if kind.is_group)
    return any(isinstance(value.get(name, Unset()), Unset) for name in required(group))


def compose(kind: type[T], command: str, overrides: Sequence[str]) -> T:
    """Compose what a command takes from overrides of the command line. Initialise Hydra before.

    Args:
        kind: what is wanted; it may be less than what the command itself takes.
        command: whose configuration it is.
        overrides: in Hydra's words.

    Raises:
        InputError: they do not compose, or values are wrong, missing or unknown.
    """
    register()
    try:
        config = hydra.compose(command.replace(" ", "_"), overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(str(error)) from error
    return read_command(kind, config)


def _strangers(tree: Mapping[str, Any], config: DictConfig) -> list[Any]:
    """List the faults of names at the top level that mean nothing.

    A configuration may have values of its own there, if others refer to them.
    """
    known = [*groups(), *top_level()]
    strangers = [name for name in tree if name not in known]
    used = references(config) if strangers else set()
    return [_stranger(str(name), known) for name in strangers if name not in used]


def _stranger(name: str, known: Sequence[str]) -> Fault:
    if name in configuration_groups():
        first = "# @package _global_"
        return Fault(name, f"is a group of files, each of which begins with the line {first!r}.")
    return unknown(name, "", known)
