"""Groups of options as Python gives them: an object, a mapping of what differs, a name, or nothing.

Defaults, checks and messages are those of the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from siftclip.errors import InputError
from siftclip.plugins import LOSS_GROUP, installed_names
from siftclip.trainer.settings.fields.reader import Reader
from siftclip.trainer.settings.fields.rules import Unset, alternatives, required
from siftclip.trainer.settings.store import STORED, Stored

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def given_group(
    kind: Any, group: str, given: Any = None, *, follows: Mapping[str, Any] | None = None
) -> Any:
    """Return a group of options.

    Args:
        kind: its class, or a union of classes.
        group: its name, such as "optim".
        given: an object of `kind`; a mapping of the options that differ from their defaults, with
            groups inside it as mappings or objects; a name that the command line has for the group,
            such as "siglip" for "loss"; or None for the defaults.
        follows: the values of options of other groups, such as "features.name", which are defaults
            of some in this one; null where it has none.

    Raises:
        InputError: an option is wrong, missing or unknown; all of them are told.
    """
    if isinstance(given, tuple(choice.plain for choice in alternatives(kind))):
        return given
    values = _merged(_defaults(group, given), given if isinstance(given, Mapping) else {})
    reader = Reader()
    read = reader.read(kind, _followed(values, follows or {}), group)
    reader.raise_if_faulty()
    return read


def named_group(group: str, name: str) -> Stored:
    """Find what the command line calls GROUP=NAME.

    Raises:
        InputError: there is none of that name.
    """
    names = {stored.name: stored for stored in STORED if stored.group == group}
    if name not in names:
        is_plugin = group == "loss" and name in installed_names(LOSS_GROUP)
        way_out = (
            f" It is a plug-in: {{'name': 'plugin', 'plugin': {name!r}}}." if is_plugin else ""
        )
        raise InputError(f"{group} must be one of {sorted(names)}. Got {name!r}.{way_out}")
    return names[name]


def _defaults(group: str, given: Any) -> Mapping[str, Any]:
    """Return the options of a group that `given` chooses, by its name or by its first option."""
    stored = [stored for stored in STORED if stored.group == group]
    if isinstance(given, str):
        return _all_values(named_group(group, given))
    if given is not None and not isinstance(given, Mapping):
        raise InputError(
            f"{group} must be an object, a mapping of options, or one of "
            f"{sorted(each.name for each in stored)}. Got {given!r}."
        )
    if len(stored) > 1 and given:
        values = [_all_values(each) for each in stored]
        tag = next(iter(values[0]))
        for own in values:
            if tag in given and own.get(tag) == given[tag]:
                return own
    return _all_values(stored[0]) if stored else {}


def _all_values(stored: Stored) -> dict[str, Any]:
    """Return the defaults of a group; what has none, such as a selector, is marked."""
    open_values = {name: Unset("must be given.") for name in required(stored.kind)}
    return open_values | stored.own_values()


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**values}
    for name, change in changes.items():
        before = merged.get(name)
        both = isinstance(before, Mapping) and isinstance(change, Mapping)
        merged[name] = _merged(before, change) if both else change  # type: ignore[arg-type]
    return merged


def _followed(value: Any, follows: Mapping[str, Any]) -> Any:
    """Put in the values of other options, and mark what has none."""
    if isinstance(value, Mapping):
        return {name: _followed(inner, follows) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_followed(inner, follows) for inner in value]
    if not isinstance(value, str):
        return value
    reference = _REFERENCE.fullmatch(value)
    if reference is not None:
        return follows.get(reference.group(1))
    return Unset() if value == "???" else value
