"""The lists of options in `--help`: `${option:NAME}` and `${choices:GROUP}` in the help texts.

A help text in configs/COMMAND.yaml names the options that it shows; what they mean comes from the
groups that define them.
"""

from __future__ import annotations

import textwrap
from typing import Any

from omegaconf import OmegaConf

from siftclip.trainer.settings.describing.describe import all_options, as_typed, configurations

COLUMN = 31  # where meanings begin
WIDTH = 100


def option_line(name: str, value: Any = None) -> str:
    """Format an option and its meaning as a line of a help text; the next ones continue it.

    Args:
        name: of the option.
        value: as it is shown behind the name; None for its default.
    """
    option = all_options()[name]
    default = next(iter(option.defaults.values()), None)
    return _line(f"{name}={as_typed(default if value is None else value)}", option.meaning)


def choices_line(group: str) -> str:
    """Format the configurations that a group can be chosen by, as a line of a help text."""
    return _line(f"{group}=NAME", ", ".join(configurations(group)))


def _line(left: str, right: str) -> str:
    text = right if right.endswith("...") else right.removesuffix(".")
    if not text[:2].isupper():
        text = text[:1].lower() + text[1:]
    wrapped = textwrap.wrap(text, WIDTH - COLUMN - 2, break_on_hyphens=False)
    first, *others = wrapped
    head = f"{left:<{COLUMN}}" if len(left) < COLUMN else f"{left}  "
    # the text stands two columns in
    return "\n".join([head + first, *(" " * (COLUMN + 2) + line for line in others)])


def register_resolvers() -> None:
    """Make OmegaConf fill in these lines."""
    OmegaConf.register_new_resolver("option", option_line, replace=True)
    OmegaConf.register_new_resolver("choices", choices_line, replace=True)
