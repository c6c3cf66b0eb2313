"""Whether a value is what the annotation of an option asks for, and the words for what it is not.

Annotations are `bool`, `int`, `float`, `str`, `Literal`, `tuple[X, ...]`, `Mapping[str, X]`, `Any`,
groups of options (dataclasses), unions of these, and all of them `Annotated` with a range or with
one of `siftclip.trainer.settings.fields.marks`.
"""

from __future__ import annotations

import functools
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from siftclip.errors import MAX_PART_BYTES, is_finite, longest_part_bytes
from siftclip.redaction import HIDDEN, begins_as_url
from siftclip.trainer.settings.fields.marks import AtMost, Credentials, Inside, Local, Needs, Words

Mark = TypeVar("Mark")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an option."""

    option: str  # its dotted name
    reason: str  # "must be above 0. Got -1."

    def __str__(self) -> str:
        return f"{self.option} {self.reason}"


@dataclass(frozen=True, slots=True)
class Unset:
    """A value that is not there."""

    reason: str | None = None  # why, where it would have come from another option


@dataclass(frozen=True, slots=True)
class Type:
    """One alternative of an annotation."""

    plain: Any  # without `Annotated`
    marks: tuple[Any, ...]

    @property
    def origin(self) -> Any:
        return get_origin(self.plain) or self.plain

    @property
    def is_group(self) -> bool:
        return is_dataclass(self.plain)


@functools.cache
def alternatives(hint: Any) -> tuple[Type, ...]:
    """Return what an annotation allows; of `Annotated[int, Ge(1)] | None` two types."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        return tuple(
            Type(inner_type.plain, (*inner_type.marks, *marks))
            for inner_type in alternatives(inner)
        )
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(inner_type for part in get_args(hint) for inner_type in alternatives(part))
    return (Type(hint, ()),)


def mark_of(hint: Any, kind: type[Mark]) -> Mark | None:
    """Return the mark of a kind that an annotation bears, if any."""
    marks = [mark for alternative in alternatives(hint) for mark in alternative.marks]
    return next((mark for mark in marks if isinstance(mark, kind)), None)


def hints(kind: type) -> Mapping[str, Any]:
    """Return the annotations of a dataclass's fields, in their order."""
    return _hints(kind)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    all_hints = get_type_hints(kind, include_extras=True)
    return {field.name: all_hints[field.name] for field in fields(kind)}


def required(kind: type) -> frozenset[str]:
    """Return the fields of a dataclass that have no default."""
    return frozenset(
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    )


def joined(*parts: str) -> str:
    """Join the parts of a dotted name that are not empty."""
    return ".".join(part for part in parts if part)


# ---- words --------------------------------------------------------------------------------------
def words(hint: Any) -> str:
    """Say what an annotation asks for: "an integer of at least 1, or null"."""
    marked = mark_of(hint, Words)
    kinds = alternatives(hint)
    parts = [_words_of(kind) for kind in kinds if kind.plain is not types.NoneType]
    text = marked.text if marked is not None else ", or ".join(dict.fromkeys(parts))
    return f"{text}, or null" if len(parts) < len(kinds) else text


def _words_of(kind: Type) -> str:
    if kind.origin is Literal:
        choices = get_args(kind.plain)
        return str(choices[0]) if len(choices) == 1 else f"one of {list(choices)}"
    if kind.origin is tuple:
        return f"a list of {_PLURALS.get(alternatives(get_args(kind.plain)[0])[0].plain, 'values')}"
    if kind.plain is int:
        return _integer(kind.marks)
    if kind.plain is str and _is_marked(kind.marks, Local):
        return _LOCAL
    if kind.plain is float:
        span = _span(kind.marks)
        return f"a finite number {span}" if span else "a finite number"
    return _NAMES.get(kind.origin, "a group of options")


_NAME_BYTES = 200  # of what gets an ending before it is the name of a file
_LOCAL = "a path on this machine"
_PLURALS: dict[Any, str] = {str: "texts", int: "integers", float: "numbers"}
_NAMES: dict[Any, str] = {
    bool: "true or false",
    str: "text",
    Mapping: "a mapping",
    Any: "a value",
    types.NoneType: "null",
}


def _integer(marks: Sequence[Any]) -> str:
    low = next((mark.ge for mark in marks if isinstance(mark, Ge)), None)
    high = next((mark.le for mark in marks if isinstance(mark, Le)), None)
    if low is not None and high is not None:
        return f"an integer in the range [{low}, {high}]"
    return "an integer" if low is None else f"an integer of at least {low}"


def _span(marks: Sequence[Any]) -> str:
    """Say the range that marks allow a number: "above 0", "in the range [0, 1)"."""
    if _is_marked(marks, Inside):
        return f"a name, without .. and without / in front, of at most {_NAME_BYTES} bytes"
    if _is_marked(marks, Local):
        return f"{_LOCAL}, and no URL"
    low = high = ""
    for mark in marks:
        if isinstance(mark, Ge | Gt):
            low = f"[{mark.ge}" if isinstance(mark, Ge) else f"({mark.gt}"
        if isinstance(mark, Le | Lt):
            high = f"{mark.le}]" if isinstance(mark, Le) else f"{mark.lt})"
    if low and high:
        return f"in the range {low}, {high}"
    return low.replace("[", "at least ").replace("(", "above ")


# ---- values -------------------------------------------------------------------------------------
def _is_of(kind: Type, value: object) -> bool:
    """Return whether a value is of a type, whatever its range; a list may hold anything."""
    if kind.plain is Any:
        return True
    if kind.origin is Literal:
        return any(
            value == choice and type(value) is type(choice) for choice in get_args(kind.plain)
        )
    if kind.plain is bool or kind.plain is str:
        return isinstance(value, kind.plain)
    if kind.plain is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind.plain is float:
        return is_finite(value)
    if kind.origin is tuple:
        return isinstance(value, list | tuple)
    if kind.origin is Mapping:
        return isinstance(value, Mapping)
    return value is None if kind.plain is types.NoneType else isinstance(value, kind.plain)


def _is_in_range(kind: Type, value: Any) -> bool:
    return all(_holds(mark, value) for mark in kind.marks)


def _holds(mark: Any, value: Any) -> bool:
    match mark:
        case Ge(bound):
            return bool(value >= bound)
        case Gt(bound):
            return bool(value > bound)
        case Le(bound):
            return bool(value <= bound)
        case Lt(bound):
            return bool(value < bound)
        case MinLen(length):
            return len(value) >= length
        case AtMost(limit):
            return not isinstance(value, int | float) or value <= limit
        case Inside():
            return is_inside(value)
        case Local():
            return not begins_as_url(value)
    return True


def is_inside(text: str) -> bool:
    """Return whether a part of a path stays in the folder that it is in, and can be shown."""
    parts = PurePath(text).parts
    stays = bool(parts) and ".." not in parts and not text.startswith("/")
    return stays and text.isprintable() and longest_part_bytes(text) <= _NAME_BYTES


def _fault_of_text(hint: Any, text: str) -> str | None:
    """Say what is wrong with a text whatever it is for; None if nothing is."""
    if "\0" in text:
        return f"must not hold a zero byte. Got {text!r}."
    may_be_path = any(kind.plain is str for kind in alternatives(hint)) and not begins_as_url(text)
    if may_be_path and longest_part_bytes(text) > MAX_PART_BYTES:
        return (
            f"has a name of {longest_part_bytes(text):,} bytes. Names of files and folders have "
            f"at most {MAX_PART_BYTES}. Got {reprlib.repr(text)}."
        )
    return None


def _is_marked(marks: Sequence[Any], kind: type) -> bool:
    return any(isinstance(mark, kind) for mark in marks)


def faults(hint: Any, value: Any, option: str) -> Iterator[Fault]:
    """Yield what is wrong with a value, which holds groups of options as objects."""
    fitting = [kind for kind in alternatives(hint) if _is_of(kind, value)]
    of_text = _fault_of_text(hint, value) if isinstance(value, str) else None
    if of_text is not None:
        yield Fault(option, of_text)
        return
    if not fitting:
        yield Fault(option, _refusal(hint, value, option))
        return
    if any(_is_in_range(kind, value) for kind in fitting):
        inner = next(kind for kind in fitting if _is_in_range(kind, value))
        yield from _inner_faults(hint, inner, value, option)
        return
    kind = fitting[0]
    span = _broken_bound(kind, value)
    if span is None:
        span = _integer(kind.marks) if kind.plain is int else _span(kind.marks)
    or_null = ", or null" if any(o.plain is types.NoneType for o in alternatives(hint)) else ""
    yield Fault(option, f"must be {span}{or_null}. Got {value!r}.")


def _broken_bound(kind: Type, value: Any) -> str | None:
    """Say the bound that alone makes a value wrong, if it is one that no list shows."""
    bounds = [mark for mark in kind.marks if isinstance(mark, AtMost) and not _holds(mark, value)]
    return f"at most {bounds[0].limit:,}" if bounds else None


def _inner_faults(hint: Any, kind: Type, value: Any, option: str) -> Iterator[Fault]:
    if kind.origin is Mapping:
        for name, inner in value.items():
            if not isinstance(name, str):
                yield Fault(option, f"must have texts for names. Got {name!r}.")
            yield from faults(get_args(kind.plain)[1], inner, joined(option, str(name)))
    if kind.origin is tuple:
        element = get_args(kind.plain)[0]
        for inner in value:
            if next(faults(element, inner, option), None) is not None:
                shown = list(value) if isinstance(value, tuple) else value
                bound = _broken_bound(alternatives(element)[0], inner)
                yield Fault(
                    option,
                    _refusal(hint, shown, option, element)
                    if bound is None
                    else f"must be {bound}, each. Got {shown!r}.",
                )
                return


def _refusal(hint: Any, value: Any, option: str, element: Any = None) -> str:
    if mark_of(hint, Credentials) is not None:
        value = HIDDEN
    if isinstance(value, int | float) and any(kind.plain is str for kind in alternatives(hint)):
        return (
            f"must be {words(hint)}. Got {value!r}, which YAML reads as a number or a truth value: "
            f"quote it, as in '{option}=\"{value}\"'."
        )
    if any(kind.is_group for kind in alternatives(hint)):
        needs = mark_of(hint, Needs)
        return f"{needs.text if needs else 'is a group of options.'} Got {value!r}."
    text = words(hint)
    if element is not None and mark_of(hint, Words) is None:
        text += f", each {words(element)}"
    return f"must be {text}. Got {value!r}."


def near(name: str, known: Sequence[str]) -> str | None:
    """Return the name that was meant, if one is near."""
    return next(iter(get_close_matches(name, known, n=1)), None)


def unknown(name: str, parent: str, known: Sequence[str]) -> Fault:
    """Return the fault of a name that is none of those that a group has."""
    close = near(name, known)
    hint = "" if close is None else f" Did you mean {joined(parent, close)}?"
    listed = f" {parent or 'The configuration'} has {', '.join(known)}." if close is None else ""
    return Fault(joined(parent, name), f"is not an option.{hint}{listed}")
