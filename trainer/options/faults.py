"""Tells faults of the lower floors, which know nothing of a configuration, by their options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from siftclip.errors import InputError, ParameterError


@contextmanager
def options_of(options: Mapping[str, str]) -> Iterator[None]:
    """Report faults of some parameters by their options, inside the block.

    Args:
        options: by the parameters that are read from them. A parameter stands for its items, too,
            whose names follow behind a dot.
    """
    try:
        yield
    except ParameterError as error:
        name, dot, item = (error.parameter or "").partition(".")
        if name not in options:
            raise
        raise InputError(error.told_as(f"{options[name]}{dot}{item}")) from error


def under(node: str, *parameters: str, **renamed: str) -> dict[str, str]:
    """Return the options of a part of the configuration, by parameters.

    Args:
        node: the part.
        parameters: that are called as their options.
        renamed: the other parameters, with the names of their options in that part.
    """
    options = {name: name for name in parameters} | renamed
    return {name: f"{node}.{option}" for name, option in options.items()}
