"""What the annotation of an option can say beside its type and its range (`annotated_types`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AtMost:
    """A bound far above what anybody wants; no list shows it.

    Beyond it a command would eat all memory, start processes without end or overflow a number,
    before it could say a word.
    """

    limit: float


@dataclass(frozen=True, slots=True)
class Words:
    """What the option must be, where its type alone says too little: "a list of patterns"."""

    text: str


@dataclass(frozen=True, slots=True)
class Needs:
    """What to say of an option without a value, or of a group that is none, after its name."""

    text: str
    plugins: str | None = None
    """An entry-point group whose installed names are said, too."""


@dataclass(frozen=True, slots=True)
class Follows:
    """The default is the value of another option."""

    option: str


@dataclass(frozen=True, slots=True)
class Example:
    """A value, as it is typed."""

    text: str


@dataclass(frozen=True, slots=True)
class Late:
    """Left open (???), and null to the commands that can do without."""


@dataclass(frozen=True, slots=True)
class Rare:
    """Not listed, and not part of any record, while it is null: `+NAME=VALUE` sets it."""


@dataclass(frozen=True, slots=True)
class Inside:
    """A part of a path, which does not lead out of the folder that it is in."""


@dataclass(frozen=True, slots=True)
class Local:
    """A path on this machine: of a URL a folder would be made, its password in its name."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """May hold passwords or keys: kept as what never prints, see `siftclip.confidential`."""


@dataclass(frozen=True, slots=True)
class Open:
    """A mapping that takes names of the user's own."""
