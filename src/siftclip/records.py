"""Records in JSON, read back only if they have the shape that they must have.

A shape is a `typing_extensions.TypedDict`, or any other annotation. Fields that it does not name
are kept as they are, since later versions may write more. pydantic, which wandb needs anyway, is
imported by the first check, which takes 0.1 s.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from annotated_types import Ge, Le, Predicate

from siftclip.errors import InputError
from siftclip.files import read_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

_LARGEST = 1e100


def is_unicode(text: str) -> bool:
    """Return whether a text can be written: JSON may hold half of a surrogate pair."""
    return text == text.encode(errors="replace").decode()


def is_moderate(number: float) -> bool:
    """Return whether sums and squares of such numbers are finite; False for NaN."""
    return abs(number) <= _LARGEST


Count = Annotated[int, Ge(0), Le(2**53)]  # whole numbers up to here are exact as floats
Number = Annotated[float, Predicate(is_moderate)]
Text = Annotated[str, Predicate(is_unicode)]
_RULES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "a text",
}
_PREDICATES = {is_unicode: "text of whole characters", is_moderate: "finite, and at most 1e100"}


def read_record(path: Path, shape: type[T], *, way_out: str = "") -> T:
    """Read a JSON file of a shape.

    Args:
        path: of the file.
        shape: what it must be.
        way_out: what to do about a file that is wrong, as one or more sentences.

    Raises:
        InputError: the file is missing, no JSON, or of another shape.
    """
    try:
        return checked(read_json(path), shape, owner=str(path))
    except InputError as error:
        raise InputError(f"{error} {way_out}".rstrip()) from None


def checked(record: object, shape: type[T], *, owner: str) -> T:
    """Return a value of JSON if it has a shape; nothing is converted.

    Args:
        record: the value.
        shape: what it must be.
        owner: what has the value, for messages.

    Raises:
        InputError: it has another shape; the first fault is told, with its place.
    """
    from pydantic import ValidationError

    try:
        _adapter(cast(Hashable, shape)).validate_python(record, strict=True)
        return cast(T, record)  # itself: pydantic's copy lacks what the shape does not name
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        raise InputError(f"{owner} lacks {place!r}.")
    rule = _rule_of(fault["type"], fault["msg"])
    where = f"{owner}: {place}" if place else owner
    raise InputError(f"{where} must be {rule}. Got {reprlib.repr(fault['input'])}.")


def _rule_of(kind: str, message: str) -> str:
    """Say what pydantic found broken as the rest of a sentence."""
    if kind == "predicate_failed":
        return next(rule for check, rule in _PREDICATES.items() if check.__name__ in message)
    return _RULES.get(kind) or message.removeprefix("Input should be ")


@functools.cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)
