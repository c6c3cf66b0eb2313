"""Writes docs/options.md: `make docs`, which runs this module with the name of the file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.describing.describe import Option, all_options, configurations

HEADER = """# Options

All options of all commands, written by `make docs` from the dataclasses in `trainer/settings/`,
where defaults and meanings stand. `siftclip explain OPTION` prints one of them, with its type, an
example and the commands that use it; `siftclip COMMAND --cfg job` prints the composed
configuration of a command.

An option of a group is typed as `GROUP.NAME=VALUE`, and `GROUP=NAME` chooses a configuration of the
group. Options that a configuration does not list are set with a plus in front: `+NAME=VALUE`.
"""


def reference() -> str:
    """Return the text of docs/options.md."""
    return "\n".join([HEADER, *_sections()])


def _sections() -> Iterator[str]:
    by_group: dict[str, list[Option]] = {}
    for option in all_options().values():
        by_group.setdefault(option.group, []).append(option)
    for group, options in by_group.items():
        yield f"## {group or 'At the top level'}\n"
        chosen = configurations(group) if group else []
        if len(chosen) > 1:
            yield f"Chosen with `{group}=NAME`: {', '.join(f'`{name}`' for name in chosen)}.\n"
        yield from _tables(options)


def _tables(options: list[Option]) -> Iterator[str]:
    """Yield a table for all options of a group, or one per set of configurations that have them."""
    for choices in dict.fromkeys(option.choices for option in options):
        of_choices = [option for option in options if option.choices == choices]
        kind = of_choices[0].kind
        if kind is not CommonSettings and of_choices[0].name.count(".") == 1:
            yield " ".join((kind.__doc__ or "").partition("\n\n")[0].split()) + "\n"
        several = len({option.choices for option in options}) > 1
        if several:
            yield f"With {', '.join(f'`{choice}`' for choice in choices)}:\n"
        yield "| option | default | allowed | meaning |\n|---|---|---|---|"
        for option in of_choices:
            cells = (f"`{option.name}`", option.default, option.allowed, option.meaning)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
