"""Finds the options that were given to a command which does not read them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig

from siftclip.trainer.settings.composed import references
from siftclip.trainer.settings.fields.rules import hints
from siftclip.trainer.settings.read_command import groups

# Groups with configurations that set options of other groups, too
_REACHING = ("experiment", "scale", "loss")


def unused_options(
    kind: type, overrides: Sequence[str], config: DictConfig
) -> Iterator[tuple[str, str]]:
    """Yield each override of a group that a command does not read, and the name of the group.

    Scripts give the same options to several commands, so that this is worth a warning only.

    Args:
        kind: what the command takes.
        overrides: in Hydra's words.
        config: what was composed from them; what it refers to is read.
    """
    read = {name for kind in (kind, *getattr(kind, "PASSES_TO", ())) for name in hints(kind)}
    not_read = groups().keys() - read - references(config)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        chosen, _, package = key.partition("@")
        group = re.split(r"[./]", package or chosen)[0]
        if group in not_read and not (key == group and group in _REACHING):
            yield override, group
