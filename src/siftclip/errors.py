"""The exceptions for faults of the user's input, and the checks that raise them."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

from siftclip.redaction import begins_as_url, shown

T = TypeVar("T")
C = TypeVar("C", bound=str)

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LONGEST_LINE = 2000  # characters; of a longer line the begin and the end are told
_LINE_BEGIN, _LINE_END = 1500, 400
MAX_PART_BYTES = 255  # of a name between two slashes: the most that file systems take
_NOTHING: Any = object()  # no value belongs to the message


class InputError(ValueError):
    """A file or a parameter is not what it must be.

    The message names the owner (class or command), the parameter or file, the rule, the value and,
    where there is one, the way out. The command line prints it without a traceback. What it quotes
    of others is as it may be `shown`, without credentials and without what a terminal obeys, and of
    a line of thousands of characters the middle is left out.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_told(part) if isinstance(part, str) else part for part in args))

    @property
    def fault(self) -> str:
        """What is wrong, without a way out that not everybody needs, see `DamagedError`."""
        return str(self)


class DamagedError(InputError):
    """A file that was kept cannot be used, and must go."""

    def __init__(self, fault: object, way_out: str = "") -> None:
        """Set what is wrong, and what a person has to do where nothing makes the file again."""
        self._fault = str(fault)
        super().__init__(f"{self._fault} {way_out}".rstrip())

    @property
    def fault(self) -> str:
        """What is wrong with the file, as one or more sentences."""
        return self._fault


class ParameterError(InputError):
    """A parameter of an object or a function is not what it must be.

    The message is for Python: "Vas: fraction must be above 0. Got -1." Whoever knows which option
    the parameter was read from tells the same with its name, see `told_as`.

    Attributes:
        owner: whose parameter it is: an object, a class, a function or a name; None if the name of
            the parameter says all.
        parameter: its name, that of an item with the item's behind a dot; None where several do not
            go together, which `rule` names.
        rule: what holds for it, as the rest of a sentence that begins with the parameter, or else
            with the owner.
        value: what was given; `got` is how the message says it.
        way_out: what to do, as one or more sentences; may be empty.

    Example:
        >>> from siftclip.errors import ParameterError
        >>> from siftclip.selectors import ClipScore
        >>> try:
        ...     ClipScore(fraction=2)
        ... except ParameterError as error:
        ...     print(error)
        ClipScore: fraction must be a number in the range (0, 1], for example 0.3. Got 2.
    """

    def __init__(
        self,
        rule: str,
        *,
        owner: object = None,
        parameter: str | None = None,
        value: Any = _NOTHING,
        got: str | None = None,
        way_out: str = "",
    ) -> None:
        self.owner, self.parameter, self.rule = owner, parameter, _told(rule)
        self.value = None if value is _NOTHING else value
        quoted = repr(value) if got is None and value is not _NOTHING else got
        self.got = None if quoted is None else _told(quoted)
        self.way_out = way_out
        super().__init__(rule)

    def __str__(self) -> str:
        names = (name_of(self.owner), self.parameter)
        return self.told_as(": ".join(name for name in names if name))

    def told_as(self, subject: str) -> str:
        """Return the message with `subject` as the name of what is wrong."""
        end = "" if self.rule.endswith(".") else "."  # a rule may end with what another error says
        got = "" if self.got is None else f" Got {self.got}."
        way_out = f" {self.way_out}" if self.way_out else ""
        return f"{subject} {self.rule}{end}{got}{way_out}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to another process without the owner itself, which may be large."""
        words = {
            "owner": name_of(self.owner),
            "parameter": self.parameter,
            "got": self.got,
            "way_out": self.way_out,
        }
        return _from_words, (self.rule, words)


def _told(text: str) -> str:
    """Return what a message tells of a text."""
    return "\n".join(map(_shortened, shown(text).split("\n")))


def _shortened(line: str) -> str:
    if len(line) <= _LONGEST_LINE:
        return line
    gap = f"[{len(line) - _LINE_BEGIN - _LINE_END:,} characters left out]"
    return f"{line[:_LINE_BEGIN]} {gap} {line[-_LINE_END:]}"


def _from_words(rule: str, words: Mapping[str, Any]) -> ParameterError:
    return ParameterError(rule, **words)


def name_of(owner: object) -> str:
    """Return what messages call the owner of a parameter: its class; "" for None."""
    if owner is None or isinstance(owner, str):
        return owner or ""
    return str(getattr(owner, "__name__", type(owner).__name__))


def full_name_of(target: object) -> str:
    """Name a class or function, with its module where that is neither Siftclip's nor Python's."""
    module = str(getattr(target, "__module__", None) or "builtins")
    known = module.partition(".")[0] in ("siftclip", "builtins")
    return name_of(target) if known else f"{module}.{name_of(target)}"


def call_by_name(
    target: Callable[..., T],
    parameters: Mapping[str, Any],
    *,
    through: Callable[..., T] | None = None,
) -> T:
    """Call a class or a function with keyword arguments.

    Args:
        target: the class or function.
        parameters: the arguments by name.
        through: what to call in its place, if it is wrapped.

    Raises:
        ParameterError: it does not take one of them, or needs another.
    """
    _check_names(target, parameters, checks_rest=not takes_any(target))
    try:
        return (through or target)(**parameters)
    except TypeError:  # what a `**` takes is expected to have a name that a base class knows
        _check_names(target, parameters, checks_rest=True)
        raise


def check_names(target: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Check the names of arguments, also of those that a constructor hands on to its base class.

    Raises:
        ParameterError: one is not known, with the one that was meant, or one is missing.
    """
    _check_names(target, given, checks_rest=True)


def _check_names(
    target: Callable[..., Any], given: Mapping[str, Any], *, checks_rest: bool
) -> None:
    try:
        parameters, known = _signature(target), parameters_of(target)
    except (TypeError, ValueError):  # some that are written in C tell nothing
        return
    for name in given if checks_rest else ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            names = f"Its parameters are {', '.join(known)}." if known else "It has none."
            raise ParameterError(
                f"is not a parameter of {name_of(target)}",
                owner=target,
                parameter=name,
                way_out=f"Did you mean {close[0]}?" if close else names,
            )
    for name, parameter in parameters.items():
        is_needed = parameter.kind in _NAMED and parameter.default is parameter.empty
        if is_needed and name not in given:
            rule = f"must be given: {name_of(target)} needs it"
            raise ParameterError(rule, owner=target, parameter=name)


def takes_any(target: Callable[..., Any]) -> bool:
    """Return whether a class or a function takes keyword arguments of any name, with a `**`."""
    try:
        parameters = _signature(target).values()
    except (TypeError, ValueError):
        return True
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def takes_name(target: Callable[..., Any], name: str) -> bool:
    """Return whether a class or a function has a parameter of a name, or takes any."""
    try:
        if name in parameters_of(target):
            return True
        return not isinstance(target, type) and takes_any(target)
    except (TypeError, ValueError):  # some that are written in C tell nothing
        return False


def parameters_of(target: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what a function or a class can be given.

    Where a constructor hands on the rest with a `**`, what its base class takes belongs to it.

    Raises:
        TypeError, ValueError: it does not tell.
    """
    kinds = target.__mro__ if isinstance(target, type) else (target,)
    names: dict[str, None] = {}
    for kind in kinds:
        if isinstance(kind, type) and "__init__" not in vars(kind) and kind is not target:
            continue
        parameters = _signature(kind).values()
        names |= {parameter.name: None for parameter in parameters if parameter.kind in _NAMED}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return tuple(names)


def _signature(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function, or of the constructor of a class, by name."""
    if isinstance(target, type) and target.__init__ is not object.__init__:  # type: ignore[misc]
        parameters = dict(inspect.signature(target.__init__).parameters)  # type: ignore[misc]
        parameters.pop(next(iter(parameters)))  # the object itself
        return parameters
    return dict(inspect.signature(target).parameters)


# ---- checks of one value: `parameter` is its name, `owner` as in `ParameterError` ----------------
def plain(value: Any) -> Any:
    """Return a number of numpy as Python's own, and others unchanged."""
    is_of_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_of_numpy else value


def require_path(parameter: str, value: object, *, owner: object = None) -> str:
    """Return `value` as text if it can be the name of a file or a folder."""
    if not isinstance(value, str | os.PathLike):
        rule = "must be a path, as text or a pathlib.Path"
        got = type(value).__name__
        raise ParameterError(rule, owner=owner, parameter=parameter, got=got)
    path = os.fspath(value)
    if not isinstance(path, str) or "\0" in path:
        rule = "must be a path in text, without a zero byte"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=path)
    longest = longest_part_bytes(path)
    if longest > MAX_PART_BYTES and not begins_as_url(path):
        rule = (
            f"has a name of {longest:,} bytes, and names of files and folders have at most "
            f"{MAX_PART_BYTES}"
        )
        raise ParameterError(rule, owner=owner, parameter=parameter, got=reprlib.repr(path))
    return path


def longest_part_bytes(path: str) -> int:
    """Return the length of the longest name in a path, in bytes."""
    return max(len(part.encode(errors="surrogatepass")) for part in path.split("/"))


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number that a float can hold, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def require_fraction(parameter: str, value: object, *, owner: object = None) -> float:
    """Return `value` as a float in (0, 1]."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        rule = "must be a number in the range (0, 1], for example 0.3"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=value)
    return float(value)


def require_int(
    parameter: str,
    value: object,
    *,
    minimum: int,
    maximum: float = math.inf,
    owner: object = None,
) -> int:
    """Return `value` as an int of at least `minimum`.

    `maximum` is far above what anybody wants: more of it would never end.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        rule = f"must be an integer of at least {minimum}"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=value)
    if value > maximum:
        rule = f"must be at most {maximum:,}"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=value)
    return value


def require_int_or_auto(
    parameter: str, value: object, *, minimum: int = 1, owner: object = None
) -> int | str:
    """Return `value` if it is "auto", or else as `require_int`: what scales with the pool."""
    if value == "auto":
        return "auto"
    if isinstance(value, str):
        rule = f"must be auto or an integer of at least {minimum}"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=value)
    return require_int(parameter, value, minimum=minimum, owner=owner)


def require_finite(parameter: str, value: object, *, owner: object = None) -> float:
    """Return `value` as a finite float."""
    value = plain(value)
    if not is_finite(value):
        raise ParameterError(
            "must be a finite number", owner=owner, parameter=parameter, value=value
        )
    return float(value)


def require_positive(parameter: str, value: object, *, owner: object = None) -> float:
    """Return `value` as a finite float above 0."""
    number = require_finite(parameter, value, owner=owner)
    if number <= 0:
        raise ParameterError("must be above 0", owner=owner, parameter=parameter, value=value)
    return number


def require_text(parameter: str, value: object, *, owner: object = None) -> str:
    """Return `value` if it is text."""
    if not isinstance(value, str):
        raise ParameterError(
            "must be text",
            owner=owner,
            parameter=parameter,
            value=value,
            way_out="YAML reads it as a number or a truth value where it stands without quotes: "
            f'quote it, as in "{value}".',
        )
    return value


def require_suffix(
    parameter: str, value: object, suffixes: tuple[str, ...], *, owner: object = None
) -> str | None:
    """Return `value` if it is None, or the name of a file that ends in one of `suffixes`."""
    if value is None:
        return None
    path = require_text(parameter, value, owner=owner)
    if begins_as_url(path):
        rule = "must be a file on this machine, and no URL"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=path)
    if not path.endswith(suffixes):
        rule = f"must end in {' or '.join(suffixes)}, or be null"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=path)
    return path


def require_choice(
    parameter: str, value: object, choices: tuple[C, ...], *, owner: object = None
) -> C:
    """Return that one of `choices` which `value` is."""
    for choice in choices:
        if value == choice:
            return choice
    rule = f"must be one of {', '.join(choices)}"
    raise ParameterError(rule, owner=owner, parameter=parameter, value=value)


def require_bool(parameter: str, value: object, *, owner: object = None) -> bool:
    """Return `value` if it is true or false."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ParameterError("must be true or false", owner=owner, parameter=parameter, value=value)
    return value
