"""The one exception for faults of the user's input, and the checks that raise it."""

from __future__ import annotations

import math


class InputError(ValueError):
    """A file or an option is not what it must be.

    The message names the owner (command or class), the option or file, the rule, the value and,
    where there is one, the way out. The command line prints it without a traceback.
    """


def require_fraction(option: str, value: object) -> float:
    """Return `value` as a float in (0, 1]; `option` is the name that the user wrote."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise InputError(
            f"{option} must be a number in the range (0, 1], for example 0.3. Got {value!r}."
        )
    return float(value)


def require_int(option: str, value: object, *, minimum: int) -> int:
    """Return `value` as an int of at least `minimum`; `option` is the name that the user wrote."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{option} must be an integer of at least {minimum}. Got {value!r}.")
    return value


def require_int_or_auto(option: str, value: object, *, minimum: int = 1) -> int | str:
    """Return `value` if it is "auto", or else as `require_int`: what scales with the pool."""
    if value == "auto":
        return "auto"
    if isinstance(value, str):
        raise InputError(
            f"{option} must be auto or an integer of at least {minimum}. Got {value!r}."
        )
    return require_int(option, value, minimum=minimum)


def require_finite(option: str, value: object) -> float:
    """Return `value` as a finite float; `option` is the name that the user wrote."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{option} must be a finite number. Got {value!r}.")
    return float(value)


def require_positive(option: str, value: object) -> float:
    """Return `value` as a finite float above 0; `option` is the name that the user wrote."""
    number = require_finite(option, value)
    if number <= 0:
        raise InputError(f"{option} must be above 0. Got {value!r}.")
    return number


def require_text(option: str, value: object) -> str:
    """Return `value` if it is text; `option` is the name that the user wrote."""
    if not isinstance(value, str):
        raise InputError(
            f"{option} must be text. Got {value!r}, which YAML reads as a number or a truth value: "
            f"quote it, as in '{option}=\"{value}\"'."
        )
    return value


def require_choice(option: str, value: object, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`; `option` is the name that the user wrote."""
    if value not in choices:
        raise InputError(f"{option} must be one of {', '.join(choices)}. Got {value!r}.")
    return str(value)


def require_bool(option: str, value: object) -> bool:
    """Return `value` if it is true or false; `option` is the name that the user wrote."""
    if not isinstance(value, bool):
        raise InputError(f"{option} must be true or false. Got {value!r}.")
    return value
