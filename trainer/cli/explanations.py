"""What is wrong with the options that were typed, in place of what Hydra says of them."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from siftclip.errors import InputError
from siftclip.plugins import LOSS_GROUP, SELECTOR_GROUP, installed_names
from siftclip.trainer.cli.choices import chosen_group, near_choice, no_choice, several_choices
from siftclip.trainer.cli.typed_credentials import holds_credentials
from siftclip.trainer.settings.describing.describe import takes_more
from siftclip.trainer.settings.read_command import compose
from siftclip.trainer.settings.store import composing

T = TypeVar("T")

PLUGIN_GROUPS = {"selector": SELECTOR_GROUP, "loss": LOSS_GROUP}  # by the group of configurations
# Where a plug-in can stand, and the mapping below it with the parameters of its own
PLUGIN_PLACES = ("loss", "selector", "online.selector", "online.first_stage.selector")
PARAMETERS = "parameters"
ARMS = "compare.arms"
_NO_NAME = "there is no name in front of a '=', or behind a '~'; options are written NAME=VALUE."
NO_NAME_OF_CHOICE = "Config group override must be"  # of Hydra, in words alone


def explain(error: Exception, command: str, typed: Mapping[str, str]) -> str:
    """Explain what is wrong with the options of a command, and the way out.

    Args:
        error: Hydra's.
        command: as it is typed.
        typed: what was typed, by what Hydra was given.
    """
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        return _no_configuration(str(error.missing_cfg_file), error.options, typed.values())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return f"Cannot find primary config {error.missing_cfg_file!r}."
    if isinstance(error, OverrideParseException):
        return _unreadable(typed.get(error.override, error.override))
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        return _not_an_option(_typed_key(cause.full_key, typed), typed, command)
    return _by_its_words(error, command, typed) or hydras_words(error)


def _by_its_words(error: Exception, command: str, typed: Mapping[str, str]) -> str | None:
    """Explain one of Hydra's messages that says by its words alone what it is about.

    `ConfigCompositionException` has no fields, and of these faults no cause that has any.
    """
    text = str(error)
    if "~" in typed.values():
        return _NO_NAME
    if text.startswith(NO_NAME_OF_CHOICE):
        word = next((word for word in typed.values() if chosen_group(word) is not None), "")
        return no_choice(word)
    if match := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        if chosen_group(match[1]) is not None:
            return several_choices(match[1], match[1])
        key, _, value = match[1].partition("=")
        as_list = "" if "(" in value else f"A list is written {key}=[{value}]; "
        return (
            f"{match[1]} names several values of one option. {as_list}--multirun runs one job for "
            "each."
        )
    unknown = re.match(r"Could not override '(.*?)'|Could not delete .* '(.*?)'\s+does not", text)
    if unknown:
        return _not_an_option(unknown[1] or unknown[2] or "", typed, command)
    merged = re.match(r"Error merging override \+*(.+?)=(.*)", text, re.DOTALL)
    if merged and "Cannot merge DictConfig" in str(error.__cause__):
        return f"{merged[1]} must be a mapping, {_shape(merged[1])}. Got {merged[2]}."
    if text.startswith("Could not append to config. An item is already at"):
        given = next((w for w in typed.values() if re.match(r"\+(?!\+)", w) and w in text), "+")
        return f"{given} would add what is there already. Leave the + out: {given[1:]}"
    return None


def _typed_key(full_key: str, typed: Iterable[str]) -> str:
    """Find the whole key that was typed; OmegaConf names only the part up to the first fault."""
    keys = (word.partition("=")[0].lstrip("+~") for word in typed)
    return next((key for key in keys if key.startswith(f"{full_key}.")), full_key)


def hydras_words(error: BaseException) -> str:
    """Shorten Hydra's or OmegaConf's message and its cause's, without what is for programmers."""
    # both append what they know to their messages, below: the search path, the fields of the error
    text = re.split(r"Config search path:|\s*full_key: ", str(error).strip())[0]
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        text += "" if error.full_key in text else f" ({error.full_key})"
    cause = error.__cause__
    if cause is not None and not isinstance(error, OmegaConfBaseException):
        reason = hydras_words(cause)
        text = f"{text}: {reason}" if text and reason not in text else text or reason
    return " ".join(text.split()) or type(error).__name__


def _not_an_option(key: str, typed: Iterable[str], command: str) -> str:
    """Say that a key is none of the options, and name the one that was meant, if it is close."""
    if not key:
        return _NO_NAME
    typed = list(typed)
    deleted = (word for word in typed if word[:1] == "~" and f"{key}.".startswith(f"{word[1:]}."))
    if (word := next(deleted, None)) not in (None, f"~{key}"):
        return (
            f"{key} is not an option once {word} has taken {word[1:]} away. Leave one of them out."
        )
    choices = [word for word in typed if re.fullmatch(r"[\w/]+(@[\w.]+)?=[\w-]+", word)]
    way_out = _way_out(key, command_options(command, choices))
    return f"{key} is not an option.{way_out} List all options: siftclip {command} --cfg job"


def _way_out(key: str, options: Mapping[str, bool]) -> str:
    """Say what may have been meant, with a blank in front; empty if nothing is near."""
    parent, _, last = key.rpartition(".")
    if key in options:
        return f" A configuration of your own has something else in the place of {parent}."
    siblings = {name.rpartition(".")[2]: name for name in options if _parent(name) == parent}
    close = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1)]
    if not close and parent in PLUGIN_PLACES and f"{parent}.{PARAMETERS}" in options:
        return f" A parameter of a plug-in is written {parent}.{PARAMETERS}.{last}=VALUE."
    if not options.get(parent):
        close += difflib.get_close_matches(key, options, n=1, cutoff=0.8)
    close += [parent] if parent in options and not options[parent] else []
    same = [name for name in options if name.rpartition(".")[2] == last]
    close += same if len(same) == 1 else []
    if close:
        return f" Did you mean {close[0]}?"
    if options.get(parent) and takes_more(parent):
        return f" Unknown options of {parent} need a plus: +{key}=VALUE."
    return ""


def _no_configuration(missing: str, options: Sequence[str], typed: Iterable[str]) -> str:
    group, _, name = missing.rpartition("/")
    words = (word for word in typed if re.match(rf"\+*{re.escape(group)}(@[^=]*)?=", word))
    given = next((word for word in words if name in word), f"{group}={name}")
    if group in PLUGIN_GROUPS and name in installed_names(PLUGIN_GROUPS[group]):
        choice = given.partition("=")[0].lstrip("+")
        place = choice.partition("@")[2] or group
        return (
            f"{given}: {name} is an installed plug-in, and no configuration. Write {choice}=plugin "
            f"{place}.plugin={name}"
        )
    close = near_choice(name, options)
    hint = f" Did you mean {given.partition('=')[0]}={close}?" if close else ""
    if group == "model":
        hint += " Any other model of open_clip is written model=open_clip model.name=NAME."
    return (
        f"{given}: there is no such configuration{'' if name in given else f' {name}'}. There are "
        f"{', '.join(options)}.{hint}"
    )


def _unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} has no '='; options are written NAME=VALUE."
    if re.fullmatch(r"[+~]*[\w/@:$-]+(\.[\w/@:$-]+)*", key) is None:
        return f"{key!r} cannot be the name of an option. Got {override!r}."
    if holds_credentials(key, value):
        return (
            f"the value of {key} cannot be read, and is not shown, since it may hold credentials. "
            'Texts with other characters than letters stand in double quotes: {NAME: "VALUE"}, '
            "and the whole for the shell in single ones."
        )
    if key == ARMS and value[:1] == "[":
        return f"{key} must be a mapping, {_shape(key)}. Got {value}."
    in_brackets = _quoted_items(value)
    if in_brackets is not None:
        if key == ARMS:  # each arm has a list
            in_brackets = re.sub(r':("[^"]*")', r":[\1]", in_brackets)
        inner = shlex.quote(f"{key}={in_brackets}")
        return (
            f"the value of {key} cannot be read. Got {value!r}; texts with a = stand in double "
            f"quotes: {inner}"
        )
    escaped = value.replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{escaped}"')
    return f"the value of {key} cannot be read. Got {value!r}; quoted for the shell it is {quoted}"


def _shape(mapping: str) -> str:
    """Show how a mapping of options is written."""
    return 'such as {half: ["selector.fraction=0.5"]}' if mapping == ARMS else "{NAME: VALUE}"


def _quoted_items(value: str) -> str | None:
    """Quote what has a = in a list or mapping; None if the value cannot be read then either."""
    if value[:1] not in ("[", "{"):
        return None
    quoted = re.sub(r"(?<=[\[{,:])\s*([^\[\]{},:\"']+=[^\[\]{},\"']*)", r'"\1"', value)
    try:
        OverridesParser.create().parse_override(f"key={quoted}")
    except HydraException:
        return None
    return quoted


def command_options(command: str, choices: list[str]) -> dict[str, bool]:
    """List all options of a command by their dotted names, with whether they hold others.

    Args:
        choices: overrides that choose configurations; left out if they do not compose.
    """
    name = command.replace(" ", "_")
    with nullcontext() if GlobalHydra.instance().is_initialized() else composing():
        try:
            config = hydra.compose(name, overrides=choices, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError):
            config = hydra.compose(name, return_hydra_config=True)
    groups = [str(group) for group in config.hydra.runtime.choices]
    return {**dict.fromkeys(groups, False), **dict(_keys(OmegaConf.to_container(config)))}


def _keys(node: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    for key, value in node.items():
        yield f"{prefix}{key}", isinstance(value, dict)
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def composed(kind: type[T], command: str, overrides: Sequence[str]) -> T:
    """Compose what a command takes from further words; faults are told as of those that are typed.

    Raises:
        InputError: see `siftclip.trainer.settings.read_command.compose`.
    """
    try:
        return compose(kind, command, overrides)
    except InputError as error:
        if not isinstance(error.__cause__, HydraException | OmegaConfBaseException):
            raise
        message = explain(error.__cause__, command, {word: word for word in overrides})
        raise InputError(message) from None


def typed_value(words: Sequence[str], option: str) -> Any:
    """Return the value of an option as Hydra reads it; None if it is not typed, or typed wrong.

    What is wrong with it is told when all words are read.
    """
    named = [word for word in words if word.startswith(f"{option}=")]
    if not named:
        return None
    try:
        value = OverridesParser.create().parse_override(named[-1]).value()
    except HydraException:
        return None
    if isinstance(value, list):
        return [str(getattr(item, "text", item)) for item in value]
    return str(getattr(value, "text", value))


def quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
