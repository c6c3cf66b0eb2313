"""Tells an exception in somebody else's class in one message, as faults of options are told."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from siftclip.errors import full_name_of
from siftclip.plugins import installed_points
from siftclip.reading import in_one_line

TRACEBACK = "HYDRA_FULL_ERROR=1 in front of the command shows the traceback."
# What a `_target_` may name beside third parties: their faults are not said to be in a plug-in
_NO_PLUGINS = {"siftclip", "lightning", "pytorch_lightning", "torch", "torchvision"}
_CONTRACT = "siftclip.selectors.core.base"  # where answers of selectors are checked
_USERS_OF_ANSWERS = ("siftclip.selectors.core.", "siftclip.trainer.builders.needs")
_LONGEST = 300  # characters of an exception's text


def fault_of_plugin(error: BaseException, config: Any) -> str | None:
    """Say whose class failed, and how; None if the exception passed through no plug-in.

    Args:
        error: as it was caught.
        config: plain values, whose `_target_` may name classes of third parties.
    """
    packages = {point.module.partition(".")[0] for point in installed_points()}
    packages |= {target.partition(".")[0] for target in _targets(config)}
    packages -= _NO_PLUGINS
    frames = [*traceback.walk_tb(error.__traceback__)]
    theirs = [entry for entry in frames if _module(entry[0]).partition(".")[0] in packages]
    if theirs:
        frame, line = theirs[-1]
        place = f"{Path(frame.f_code.co_filename).name}, line {line}"
        what = f"{type(error).__name__}: {_one_line(error)} ({place})"
        # a comprehension or a lambda has no name of its own
        named = [frame for frame, _ in theirs if frame.f_code.co_name[0] != "<"] or [frame]
        return f"{_name(named[-1])} failed, which is no part of Siftclip: {what}. {TRACEBACK}"
    broke_contract = isinstance(error, (TypeError, ValueError)) and frames and packages
    if broke_contract and _module(frames[-1][0]) == _CONTRACT:
        return f"{_one_line(error)} It is a fault of that class, which check_selector finds."
    owner = _owner_of_answer(frames, packages)
    if owner is None:
        return None
    return (
        f"what {full_name_of(owner)} answers, or holds as a parameter, cannot be used: "
        f"{type(error).__name__}: {_one_line(error)}. check_selector says more. {TRACEBACK}"
    )


def _owner_of_answer(frames: list[tuple[FrameType, int]], packages: set[str]) -> type | None:
    """Find the class of a plug-in whose answer the contract's own code was using at the end."""
    for frame, _ in reversed(frames):
        module = _module(frame)
        if not module.startswith("siftclip."):
            continue  # of a library that was called
        if not module.startswith(_USERS_OF_ANSWERS):
            return None
        for name in ("self", "selector", "member", "value"):
            kind = type(frame.f_locals.get(name))
            if kind.__module__.partition(".")[0] in packages:
                return kind
    return None


def _one_line(error: BaseException) -> str:
    text = in_one_line(error)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        target = node.get("_target_")
        if isinstance(target, str):
            yield target
        node = [*node.values()]
    if isinstance(node, list):
        for inner in node:
            yield from _targets(inner)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _name(frame: FrameType) -> str:
    """Return the method or function of a frame, with its class and module."""
    function = frame.f_code.co_name
    owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
    if owner is None:
        return f"{_module(frame)}.{function}"
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}.{function}"
