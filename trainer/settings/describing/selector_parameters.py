"""What `siftclip explain` prints of a selector's parameter: what configs/selector says of it."""

from __future__ import annotations

import importlib.resources
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from siftclip.trainer.settings.describing.describe import OPEN, all_options, configurations

_LINE = re.compile(r"(\w+):(?: +([^#\s].*?))?(?: +# (.*))?")
_WIDTH = 100


class _Listed(NamedTuple):
    """A parameter as a configuration lists it."""

    default: str
    meaning: str


def selector_parameter(option: str) -> str | None:
    """Explain an option below a selector's node, such as `selector.fraction`; None: it is none."""
    place, _, name = option.rpartition(".")
    if place not in all_options() or not all_options()[place].is_selector:
        return None
    found: dict[_Listed, list[str]] = {}
    for selector in configurations("selector"):
        listed = dict(_listed(selector)).get(name)
        if listed is not None:
            found.setdefault(listed, []).append(selector)
    if not found:
        return None
    choice = "selector=" if place == "selector" else f"selector@{place}="
    return "\n".join([option, *(line for item in found.items() for line in _lines(choice, *item))])


def _lines(choice: str, listed: _Listed, selectors: list[str]) -> Iterator[str]:
    if listed.meaning:
        yield f"  meaning  {listed.meaning}"
    yield f"  default  {listed.default}"
    indent = " " * 11
    text = f"{choice}{','.join(selectors)}".replace(",", ", ")
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="  with     ",
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _listed(selector: str) -> Iterator[tuple[str, _Listed]]:
    """Yield the parameters that a configuration lists at its top, with its remarks on them."""
    path = importlib.resources.files("siftclip.configs") / "selector" / f"{selector}.yaml"
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _LINE.fullmatch(line)
        if match is not None and match[1] not in ("name", "_target_"):
            default = "none: it must be given" if match[2] == OPEN else match[2] or "several"
            yield match[1], _Listed(default, match[3] or "")
