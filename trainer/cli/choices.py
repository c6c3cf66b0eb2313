"""Words that choose a configuration of a group: selector=NAME, selector@online.selector=NAME."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from siftclip.trainer.settings.store import configuration_groups, configuration_names

_CHOICE = re.compile(r"\+{0,2}(?P<group>[\w/]+)(?:@[\w.]+)?=(?P<value>.*)", re.DOTALL)
# What a configuration of this group sets is a difference from the others: several go together
_JOINED = ("experiment",)


def chosen_group(word: str) -> str | None:
    """Return the group that a word chooses a configuration of; None if it is another option."""
    match = _CHOICE.fullmatch(word)
    return match["group"] if match and match["group"] in configuration_groups() else None


def list_of_choices(word: str) -> str | None:
    """Say what to write in place of a list of configurations, which Hydra would mix into one.

    None: the word is no such list.
    """
    match = _CHOICE.fullmatch(word)
    group = chosen_group(word)
    if match is None or group is None or group in _JOINED:
        return None
    items = re.fullmatch(r"\[(.*,.*)\]", match["value"].strip(), re.DOTALL)
    if items is None:
        return None
    names = re.sub(r"\s+", "", items[1])
    return several_choices(word, f"{word.partition('=')[0]}={names}")


def several_choices(word: str, swept: str) -> str:
    """Say that one configuration is taken of a group, and how to run a job for each of several."""
    group = chosen_group(word)
    return (
        f"{word} names several configurations, and a command takes one of {group}. "
        f"To run one job for each: --multirun {swept}"
    )


def no_choice(word: str) -> str:
    """Say what a group takes where a word gives it something else, such as null."""
    group = chosen_group(word) or "GROUP"
    names = ", ".join(configuration_names(group)) if group in configuration_groups() else "names"
    return f"{word}: {group} takes the name of a configuration, one of {names}."


def near_choice(name: str, names: Sequence[str]) -> str | None:
    """Return the configuration that was meant, whether small letters and underscores were typed."""
    plain = {re.sub(r"[-.]", "_", known.lower()): known for known in names}
    close = difflib.get_close_matches(re.sub(r"[-.]", "_", name.lower()), plain, n=1)
    return plain[close[0]] if close else None


def positional_model(word: str) -> str | None:
    """Return the choice of a model's configuration that a bare word stands for: `vit_b_32`."""
    return f"model={word}" if word in configuration_names("model") else None
