"""The base class of groups of options, and types that many of them share.

    lr: Annotated[float, Gt(0)] = 5e-4
    \"\"\"Learning rate at the peak, after the warm-up.\"\"\"

An annotation has the type and the range, the text below it the meaning. Defaults stand nowhere
else; `siftclip explain`, the lists in `--help` and the tables in docs come from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Le

from siftclip.confidential import ConfidentialUrl, confidential
from siftclip.errors import InputError, plain
from siftclip.trainer.settings.fields.marks import AtMost, Credentials, Inside, Local, Rare
from siftclip.trainer.settings.fields.rules import faults, hints, joined, mark_of

_LARGEST = AtMost(10**15)  # products of two such numbers are still told from infinity
Count: TypeAlias = Annotated[int, Ge(1), _LARGEST]
WholeNumber: TypeAlias = Annotated[int, Ge(0), _LARGEST]
Seed: TypeAlias = Annotated[int, Ge(0), AtMost(2**32 - 1)]  # of numpy, and so of Lightning
Workers: TypeAlias = Annotated[int, Ge(1), AtMost(1024)]  # processes or threads
Samples: TypeAlias = Annotated[int, Ge(1), AtMost(2**22)]  # in memory together
Pixels: TypeAlias = Annotated[int, Ge(1), AtMost(8192)]  # of a side of what a model takes
Resamples: TypeAlias = Annotated[int, Ge(0), AtMost(10**6)]
Seconds: TypeAlias = Annotated[float, Ge(0), AtMost(10**9)]  # more overflows the system's clocks
Positive: TypeAlias = Annotated[float, Gt(0)]
NotNegative: TypeAlias = Annotated[float, Ge(0)]
Fraction: TypeAlias = Annotated[float, Gt(0), Le(1)]
Share: TypeAlias = Annotated[float, Ge(0), Le(1)]
Name: TypeAlias = Annotated[str, Inside()]
LocalPath: TypeAlias = Annotated[str, Local()]
Auto: TypeAlias = Literal["auto"]
KeySplit: TypeAlias = Literal["first_dot", "last_dot"]
Weights: TypeAlias = Literal["auto", "ema", "raw"]


class Section:
    """A group of options. Whoever makes one: its values are of the types and in the ranges.

    A whole number may stand for a float, and is kept as it was given: stored identities tell the
    two apart.

    Raises:
        InputError: a value is not, or options do not go together.
    """

    __slots__ = ()

    PLACE: ClassVar[str] = ""  # the dotted name of the group, for messages

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, plain(getattr(self, name)))
            for fault in faults(hint, getattr(self, name), joined(self.PLACE, name)):
                raise InputError(str(fault))
            if mark_of(hint, Credentials) is not None:
                object.__setattr__(self, name, confidential(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Check what options must be together."""


class Recorded:
    """A node that knows what the configuration had in its place."""

    __slots__ = ()

    def record(self) -> dict[str, Any]:
        """Return what the configuration had."""
        raise NotImplementedError


def to_plain(value: Any) -> Any:
    """Convert to dicts, lists and scalars, as the configuration had it; for stored records."""
    if isinstance(value, Recorded):
        return value.record()
    if is_dataclass(value) and not isinstance(value, type):
        return {
            name: to_plain(getattr(value, name))
            for name, hint in hints(type(value)).items()
            if getattr(value, name) is not None or mark_of(hint, Rare) is None
        }
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(inner) for inner in value]
    return str(value) if isinstance(value, ConfidentialUrl) else value
