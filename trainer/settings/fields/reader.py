"""From plain values, as a configuration has them, to groups of options; all faults at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin

from siftclip.errors import InputError, plain
from siftclip.plugins import installed_in_words
from siftclip.trainer.settings.fields.marks import Late, Needs, Rare
from siftclip.trainer.settings.fields.rules import (
    Fault,
    Type,
    Unset,
    alternatives,
    faults,
    hints,
    joined,
    mark_of,
    required,
    unknown,
)
from siftclip.trainer.settings.fields.section import Section
from siftclip.trainer.settings.selector import SelectorNode

S = TypeVar("S", bound=Section)


def read(kind: type[S], values: Mapping[str, Any], place: str = "") -> S:
    """Read a group of options from plain values; what these do not name has its default.

    Raises:
        InputError: values are wrong, missing or unknown; all of them are told.
    """
    reader = Reader()
    section: S = reader.read(kind, values, place)
    reader.raise_if_faulty()
    return section


def read_kept(kind: type[S], values: Mapping[str, Any], place: str = "") -> S:
    """Read what an earlier version has written: names that are gone are passed over."""
    known = {name: value for name, value in values.items() if name in hints(kind)}
    return read(kind, known, place)


@dataclass(slots=True)
class Reader:
    """Reads groups of options, and collects what is wrong with them."""

    faults: list[Fault | str] = field(default_factory=list)
    needed: bool = True  # False: only what is wrong whoever needs it, no missing value
    late: tuple[str, ...] = ()  # options marked `Late` that are needed here

    def raise_if_faulty(self) -> None:
        """Raise InputError if something was wrong."""
        texts = list(dict.fromkeys(map(str, self.faults)))
        if len(texts) == 1:
            raise InputError(texts[0])
        if texts:
            raise InputError("\n  ".join([f"{len(texts)} options are wrong:", *texts]))

    def read(self, hint: Any, value: Any, option: str) -> Any:
        """Read the value of an option as its annotation has it; None after a fault."""
        value = plain(value)
        if isinstance(value, Unset):
            self._missing(hint, value, option)
            return None
        groups = [alternative for alternative in alternatives(hint) if alternative.is_group]
        if groups and isinstance(value, SelectorNode):
            self.faults += value.faults(option) if self.needed else []
            return value
        if groups and isinstance(value, Mapping):
            kind = self._chosen(groups, value, option)
            return None if kind is None else self._group(kind, value, option)
        missing = next(_unset_within(value), None)
        if missing is not None:
            self._missing(hint, missing, option)
            return None
        refusals = list(faults(hint, value, option))
        self.faults += refusals
        return None if refusals else _with_tuples(hint, value)

    def _missing(self, hint: Any, value: Unset, option: str) -> None:
        is_late = mark_of(hint, Late) is not None and option not in self.late
        if not self.needed or is_late:
            return
        needs = mark_of(hint, Needs)
        self.faults.append(Fault(option, value.reason or _text_of(needs)))

    def _chosen(self, groups: list[Type], values: Mapping[str, Any], option: str) -> Any:
        """Find the group that values are of: several differ by their first option."""
        if len(groups) == 1:
            return groups[0].plain
        tag = next(iter(hints(groups[0].plain)))
        by_tag = {
            name: group.plain for group in groups for name in get_args(hints(group.plain)[tag])
        }
        given = values.get(tag)
        kind = by_tag.get(given) if isinstance(given, str) else None
        if kind is None:
            known = list(by_tag)
            self.faults.append(
                Fault(joined(option, tag), f"must be one of {known}. Got {given!r}.")
            )
        elif not listed(kind) <= values.keys() | {tag}:
            self.faults.append(
                Fault(
                    f"{joined(option, tag)}={given}",
                    f"comes with options of its own: write {option}={given}.",
                )
            )
            return None
        return kind

    def _group(self, kind: Any, values: Mapping[str, Any], option: str) -> Any:
        before = len(self.faults)
        known = hints(kind)
        self.faults += [unknown(str(n), option, list(known)) for n in values if n not in known]
        given = {
            name: self.read(hint, values[name], joined(option, name))
            for name, hint in known.items()
            if name in values
        }
        for name in sorted(required(kind) - given.keys()):
            self.read(known[name], Unset(), joined(option, name))
        if len(self.faults) > before or not self.needed:
            return None
        try:
            return kind(**given)
        except InputError as error:
            self.faults.append(str(error))
            return None


def listed(kind: type) -> set[str]:
    """List the options of a group that a configuration always has."""
    return {name for name, hint in hints(kind).items() if mark_of(hint, Rare) is None}


def _text_of(needs: Needs | None) -> str:
    """Say what an option without a value needs."""
    if needs is None:
        return "must be given."
    return needs.text + (f" {installed_in_words(needs.plugins)}" if needs.plugins else "")


def _unset_within(value: Any) -> Iterator[Unset]:
    """Yield what has no value inside lists and mappings."""
    if isinstance(value, Unset):
        yield value
    elif isinstance(value, list | Mapping):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _unset_within(inner)


def _with_tuples(hint: Any, value: Any) -> Any:
    """Convert lists to the tuples that the annotation asks for."""
    for kind in alternatives(hint):
        if kind.origin is tuple and isinstance(value, list):
            element = get_args(kind.plain)[0]
            return tuple(_with_tuples(element, inner) for inner in value)
        if get_origin(kind.plain) is not Literal and isinstance(value, Mapping):
            parts = get_args(kind.plain)
            if len(parts) == 2:
                return {name: _with_tuples(parts[1], inner) for name, inner in value.items()}
    return value
