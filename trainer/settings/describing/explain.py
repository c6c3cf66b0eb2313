"""What `siftclip explain` prints."""

from __future__ import annotations

from difflib import get_close_matches

from siftclip.trainer.settings.commands import COMMANDS
from siftclip.trainer.settings.describing.describe import Option, all_options, configurations
from siftclip.trainer.settings.describing.selector_parameters import selector_parameter
from siftclip.trainer.settings.read_command import groups

IN_FULL = 3  # so many options are explained in full, more are listed
USAGE = """siftclip explain OPTION: meaning, type, default and allowed values of an option

OPTION is a dotted name, or a part of one: optim.lr, optim, lr.
All options are also in docs/options.md. The groups are
"""


def explain(name: str) -> str | None:
    """Explain the options that a name, or a part of one, stands for.

    None if it stands for nothing.
    """
    options = matching(name)
    if not options:
        return selector_parameter(name)
    if len(options) <= IN_FULL:
        return "\n\n".join(in_full(option) for option in options)
    width = max(len(option.name) for option in options)
    lines = [f"{option.name:<{width}}  {option.meaning}" for option in options]
    return "\n".join([*_group_lines(name), *lines])


def matching(name: str) -> list[Option]:
    """Find the options that a name stands for: itself, those below it, or those that contain it."""
    options = all_options()
    if name in options:
        return [options[name]]
    below = [option for key, option in options.items() if key.startswith(f"{name}.")]
    last = [option for key, option in options.items() if key.endswith(f".{name}")]
    return below or last or [option for key, option in options.items() if name in key]


def nearest(name: str) -> list[str]:
    """Find names of options that may have been meant."""
    options = all_options()
    parts = [part for key in options for part in key.split(".")]
    return get_close_matches(name, dict.fromkeys([*options, *parts]))


def in_full(option: Option) -> str:
    """Explain an option in full."""
    commands = option.commands
    used = "all commands" if len(commands) == len(COMMANDS) else ", ".join(commands)
    lines = [
        option.name,
        f"  meaning  {option.meaning}",
        f"  type     {option.type}",
        f"  default  {option.default}",
        f"  allowed  {option.allowed}",
        f"  used by  {used}",
    ]
    if option.choices and len(option.choices) < len(configurations(option.group)):
        lines.append(f"  with     {', '.join(option.choices)}")
    return "\n".join([*lines, f"  example  {option.example}"])


def _group_lines(name: str) -> list[str]:
    chosen = configurations(name) if name in groups() else []
    return [f"{name}=NAME: {', '.join(chosen)}", ""] if len(chosen) > 1 else []


def overview() -> str:
    """Return what `siftclip explain` prints without an option."""
    names = [name for name in groups() if name != "selector"]
    return USAGE + "\n".join(f"  {name}" for name in names)
