"""Moves credentials into the environment, and leaves references to it.

Hydra writes overrides into files, submitit and Lightning hand them on, wandb records `sys.argv`.
All of them get `pool.root=https://${oc.env:SIFTCLIP_SECRET_1}@host/pool` in place of what was
typed, which means the same in this process and in those that it starts. What a file of the user's
has is replaced as well where Hydra writes the whole configuration.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from itertools import count, pairwise
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from siftclip.redaction import (
    HIDDEN,
    begins_as_url,
    hidden,
    hide_in_url,
    is_reference,
    names_credentials,
    remember_all,
)

VARIABLE = "SIFTCLIP_SECRET_{}"
OPTIONS = "storage_options"  # all values in it count
_PACKAGE = ("--package", "-p")  # of a configuration, which Hydra prints alone


def without_credentials(word: str) -> str:
    """Return an override with references to the environment for its credentials; others unchanged.

    What Hydra cannot read is returned as it is: it ends in a message, which shows no credentials.
    """
    key, equals, value = word.partition("=")
    names = key.lstrip("+~").split(".")
    is_secret = any(map(_is_secret, names))
    if not equals or not (is_secret or "://" in value or _may_have_some(value)):
        return word
    try:
        parsed = OverridesParser.create().parse_override(word).value()
        remember_all({names[-1]: _plain(parsed)})
        written = _written(parsed, is_secret)
    except (HydraException, NotImplementedError):
        remember_all({names[-1]: value})
        return word
    return f"{key}={written}" if _moved_parts(written) > _moved_parts(value) else word


def holds_credentials(key: str, value: str) -> bool:
    """Return whether what is typed for an option may be, or name, credentials."""
    return any(map(_is_secret, key.lstrip("+~").split("."))) or _may_have_some(value)


@contextmanager
def safe_config(words: Sequence[str]) -> Iterator[None]:
    """Hide the credentials of a configuration that Hydra prints in the block, for `--cfg`.

    Args:
        words: of the command line.
    """
    text = StringIO()
    with redirect_stdout(text):
        yield
    whole = text.getvalue().rstrip()
    of_access = any(map(_is_secret, _package(words).split(".")))
    if not isinstance(yaml.safe_load(whole), dict | list):
        print(HIDDEN if of_access else whole)
        return
    tree = OmegaConf.to_container(OmegaConf.create(whole))
    safe = hidden(tree, of_access=of_access)
    print(whole if safe == tree else OmegaConf.to_yaml(OmegaConf.create(safe)).rstrip())


def _package(words: Sequence[str]) -> str:
    """Return the part of a configuration that shall be printed; "" for all of it."""
    for word, following in pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if flag in _PACKAGE:
            return value if equals else following
    return ""


class MovesCredentials(Callback):  # type: ignore[misc]  # Hydra has no types
    """Hydra calls it before it writes a configuration, see `configs/siftclip.yaml`."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Replace what a single job has."""
        _replace_in(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Replace what a sweep has, which goes into its `multirun.yaml` and to its launcher."""
        _replace_in(config)


def _replace_in(config: DictConfig) -> None:
    tree = OmegaConf.to_container(config, resolve=False)
    with flag_override(config, ["readonly", "struct"], [False, False]):
        for path, value in _leaves({name: tree[name] for name in tree if name != "hydra"}):
            *parents, name = path
            node: Any = config
            for parent in parents:
                node = node[parent]
            if isinstance(value, str):
                names = [part for part in path if isinstance(part, str)]
                node[name] = _moved(value, any(map(_is_secret, names)))
            elif any(_is_secret(part) for part in path):
                node[name] = f"${{oc.decode:{_reference(str(value))}}}"


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield texts and numbers of a configuration that may be credentials, by their place."""
    items: Iterable[Any] = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    elif isinstance(tree, str | int | float) and not isinstance(tree, bool) and tree != "???":
        yield path, tree
    for name, inner in items:
        yield from _leaves(inner, (*path, name))


def _may_have_some(value: str) -> bool:
    """Return whether a value is a mapping or a list that may name credentials."""
    return value[:1] in "{[" and (OPTIONS in value or names_credentials(value, of_access=True))


def _moved_parts(text: str) -> int:
    return text.count(VARIABLE.format(""))


def _written(value: Any, is_secret: bool) -> str:
    """Write a value as Hydra reads it, its credentials as references.

    Raises:
        NotImplementedError: it is a sweep over numbers or names.
    """
    if isinstance(value, ChoiceSweep):
        return f"choice({','.join(_written(each, is_secret) for each in value.list)})"
    if isinstance(value, dict):
        items = (
            f"{_key(name)}:{_written(inner, is_secret or _is_secret(name))}"
            for name, inner in value.items()
        )
        return f"{{{','.join(items)}}}"
    if isinstance(value, list):
        return f"[{','.join(_written(inner, is_secret) for inner in value)}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return f"'${{oc.decode:{_reference(str(value))}}}'" if is_secret else str(value)
    if isinstance(value, str | QuotedString):
        text = value if isinstance(value, str) else value.text
        return str(QuotedString(_moved(text, is_secret), Quote.single).with_quotes())
    raise NotImplementedError


def _moved(text: str, is_secret: bool) -> str:
    if is_secret:
        return text if is_reference(text) else _reference(text)
    if begins_as_url(text):
        return hide_in_url(text, by=_reference)
    # an override, of an arm of a comparison
    return without_credentials(text) if "=" in text else text


def _is_secret(name: object) -> bool:
    return str(name) == OPTIONS or names_credentials(str(name))


def _key(name: object) -> str:
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(name))


def _plain(value: Any) -> Any:
    if isinstance(value, ChoiceSweep):
        return _plain(value.list)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value.text if isinstance(value, QuotedString) else value


def _reference(secret: str) -> str:
    """Put a text into the environment, and return what OmegaConf finds it by."""
    for number in count(1):
        name = VARIABLE.format(number)
        if os.environ.setdefault(name, secret) == secret:
            return f"${{oc.env:{name}}}"
    raise AssertionError("numbers do not end")
