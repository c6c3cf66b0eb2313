"""Optimizers of timm in AdamW's place, such as Lion, LAMB and the Muon family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import nn

from siftclip.errors import InputError
from siftclip.reading import in_one_line

Group = dict[str, Any]

# Of the mapping: the optimizer's name, and patterns of what its fallback takes
NAME, FALLBACK = "name", "fallback"
_OURS = ("params", "lr", "weight_decay")
# What a continued run would lose, or a step here does not give
REFUSED: Mapping[str, str] = {
    "adahessian": "it needs second derivatives",
    **dict.fromkeys(("kron", "kronc", "kronw"), "it draws random numbers that no checkpoint keeps"),
}


def make_timm_optimizer(
    groups: Sequence[Group],
    options: Mapping[str, Any],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """Build an optimizer of timm, as open_clip's `--opt timm/NAME` does.

    Args:
        groups: of `parameter_groups`, with the flag `use_fallback` where `with_fallback` set it.
        options: `name`, and arguments of the optimizer, which come before those below.
        lr: of the head.
        weight_decay: of what is decayed.
        betas: where the optimizer takes two of them.
        eps: where the optimizer takes one number.

    Raises:
        InputError: as `check_timm`, or the optimizer refuses a value.
    """
    check_timm(options)
    name = str(options[NAME])
    taken, own = _parameters(name), _arguments(options)
    given: dict[str, Any] = {}
    if isinstance(taken.get("betas"), tuple) and len(taken["betas"]) == 2:
        given["betas"] = betas
    if isinstance(taken.get("eps"), float):
        given["eps"] = eps
    try:
        return create_optimizer_v2(
            [dict(group) for group in groups],
            name,
            lr=lr,
            weight_decay=weight_decay,
            **{**given, **{key: _plain(value) for key, value in own.items()}},
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"optim.timm: timm's {name} refuses: {in_one_line(error)}") from error


def check_timm(options: Mapping[str, Any]) -> None:
    """Check what can be known without a model.

    Args:
        options: as of `make_timm_optimizer`.

    Raises:
        InputError: there is no such optimizer here, or it does not take the arguments.
    """
    name = str(options[NAME])
    taken = _parameters(name)
    for key in _arguments(options):
        if key not in taken:
            close = get_close_matches(key, taken, n=1)
            hint = (
                f"Did you mean optim.timm.{close[0]}?" if close else f"It has {', '.join(taken)}."
            )
            raise InputError(f"optim.timm.{key} is no argument of timm's {name}. {hint}")
    if options.get(FALLBACK) and "fallback_lr_scale" not in taken:
        raise InputError(
            f"optim.timm.fallback is of timm's Muon family, and optim.timm.name={name} is none of "
            "it. Leave it out."
        )


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in (NAME, FALLBACK)}


def with_fallback(
    groups: Sequence[Group], model: nn.Module, options: Mapping[str, Any]
) -> list[Group]:
    """Split groups by whether parameters go to the fallback of timm's Muon family.

    Args:
        groups: of `parameter_groups`.
        model: whose parameters they have.
        options: `fallback`, shell patterns of whole names.

    Raises:
        InputError: a pattern matches no parameter.
    """
    patterns = options.get(FALLBACK) or ()
    if not patterns:
        return list(groups)
    names = {id(each): of for of, each in model.named_parameters()}
    for pattern in patterns:
        if not any(fnmatchcase(of, pattern) for of in names.values()):
            raise InputError(
                f"optim.timm.fallback: no parameter of the model matches {pattern!r}. Patterns "
                f"cover the whole name; names are such as {list(names.values())[:3]}."
            )

    def falls_back(parameter: nn.Parameter) -> bool:
        return any(fnmatchcase(names[id(parameter)], pattern) for pattern in patterns)

    split = []
    for group in groups:
        for fallback in (False, True):
            members = [each for each in group["params"] if falls_back(each) == fallback]
            if members:
                flag = {"use_fallback": True} if fallback else {}
                split.append({**group, "params": members, **flag})
    return split


def _parameters(name: str) -> dict[str, Any]:
    """Return the arguments of an optimizer with their defaults, without those given anyway.

    Raises:
        InputError: there is no such optimizer here.
    """
    known = [str(each) for each in list_optimizers()]
    if name in REFUSED:
        raise InputError(f"optim.timm.name={name} is refused: {REFUSED[name]}. Use another one.")
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}."
        raise InputError(f"optim.timm.name must be an optimizer of timm. Got {name!r}. {hint}")
    try:
        made: Any = get_optimizer_class(name, bind_defaults=False)
    except (ImportError, RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"optim.timm.name={name} needs what is not here: {in_one_line(error)}"
        ) from error
    found = inspect.signature(made).parameters
    return {key: each.default for key, each in found.items() if key not in _OURS}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
