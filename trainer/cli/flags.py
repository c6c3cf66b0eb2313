"""Options that begin with a dash: Hydra's own, and the few that stand for options of ours."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

# Those whose value is the next word, or stands behind a `=`
_TAKE_A_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c"),
    *("--package", "-p"),
)
_OTHERS = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"),
    *("--multirun", "-m", "--info", "-i"),
)
# Load a pickle, or serve shells alone; Hydra also knows each by its first letters
_REFUSED = re.compile(r"--e|--s|-sc")
_PRINTED = ("job", "hydra", "all")  # configurations
_WRITTEN = "Type options themselves, or put them into a file for --config-dir."


def spelled_out(words: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """Put options in the place of the flags that stand for them.

    Args:
        words: of the command line, as they were typed.
        flags: what each stands for: `OPTION=VALUE`, or an option whose value follows, as the next
            word or behind a `=`.
    """
    spelled: list[str] = []
    waiting: str | None = None  # an option whose value is the next word
    for word in words:
        name, equals, value = word.partition("=")
        option = flags.get(name)
        if waiting is not None:
            spelled.append(f"{waiting}={word}")
            waiting = None
        elif option is None or (equals and "=" in option):
            spelled.append(word)
        elif equals or "=" in option:
            spelled.append(f"{option}={value}" if equals else option)
        else:
            waiting = option
    return spelled if waiting is None else [*spelled, f"{waiting}="]


def flags_first(words: Sequence[str]) -> list[str]:
    """Put Hydra's own options in front: between overrides its parser would lose what follows."""
    flags: list[str] = []
    others: list[str] = []
    for word, is_hydras in marked(words):
        (flags if is_hydras else others).append(word)
    return flags + others


def marked(words: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield each word, and whether it is one of Hydra's own options or the value of one."""
    value_follows = False
    for word in words:
        yield word, value_follows or word[:1] == "-"
        value_follows = word in _TAKE_A_VALUE


def fault_of_flags(words: Sequence[str], own: Iterable[str] = ()) -> str | None:
    """Say which of Hydra's own options there is not, or lacks its value; None if all are right.

    Args:
        words: of the command line, without flags of the command.
        own: those flags, which a misspelt word may have been meant to be.
    """
    value_follows = False
    for word, following in pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        is_flag = word[:1] == "-" and not value_follows
        value_follows = is_flag and word in _TAKE_A_VALUE
        if not is_flag:
            continue
        fault = _fault_of(flag, value if equals else following, own)
        if fault is not None:
            return fault
    return None


def _fault_of(flag: str, value: str, own: Iterable[str]) -> str | None:
    if _REFUSED.match(flag) or flag not in (*_TAKE_A_VALUE, *_OTHERS):
        hydras = [name for name in (*_TAKE_A_VALUE, *_OTHERS) if name[:2] == "--"]
        known = [*own, *([] if _REFUSED.match(flag) else hydras)]
        close = difflib.get_close_matches(flag, known, n=1)
        return f"there is no option {flag}. {f'Did you mean {close[0]}?' if close else _WRITTEN}"
    if flag in _TAKE_A_VALUE and (not value or value[:1] == "-"):
        return f"{flag} needs a value behind it."
    if flag in ("--cfg", "-c") and value not in _PRINTED:
        return f"{flag} must be one of {', '.join(_PRINTED)}. Got {value!r}."
    return None
