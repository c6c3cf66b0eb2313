"""What the commands share: Hydra reads the overrides, errors of the user become one message."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    CompactHydraException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from siftclip.errors import InputError
from siftclip.first_rank import is_first_rank
from siftclip.interrupts import begin_work, end_work
from siftclip.plugins import LOSS_GROUP, SELECTOR_GROUP, installed_names
from siftclip.trainer.cli.choices import (
    chosen_group,
    list_of_choices,
    near_choice,
    positional_model,
    several_choices,
)
from siftclip.trainer.cli.endings import (
    FAILURE,
    FULL_ERROR,
    end,
    end_faulty,
    end_internal,
    end_interrupted,
    end_stopped,
    follows_interrupt,
    message_of,
)
from siftclip.trainer.cli.plugin_faults import TRACEBACK, fault_of_plugin
from siftclip.trainer.cli.typed_credentials import without_credentials
from siftclip.trainer.cli.yaml_faults import YAML_FAULTS, fault_of_yaml
from siftclip.trainer.runtime.launch import TrainingStopped
from siftclip.trainer.settings.describing.describe import takes_more
from siftclip.trainer.settings.describing.help import register_resolvers
from siftclip.trainer.settings.read_command import read_command
from siftclip.trainer.settings.store import composing, register
from siftclip.trainer.settings.unused import unused_options

log = logging.getLogger(__name__)
T = TypeVar("T")

CONFIGS = "pkg://siftclip.configs"
# Hydra's options whose value is the next word
_TAKE_A_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c"),
    *("--package", "-p", "--experimental-rerun"),
)
PLUGIN_GROUPS = {"selector": SELECTOR_GROUP, "loss": LOSS_GROUP}  # by the group of configurations
# Where a plug-in can stand, and the mapping below it with the parameters of its own
PLUGIN_PLACES = ("loss", "selector", "online.selector", "online.first_stage.selector")
PARAMETERS = "parameters"
_ARMS = "compare.arms"
# Mappings whose names are the user's own, and what no configuration lists: no `+` is needed
OPEN_MAPPINGS = (
    *("eval.classnames", "eval.templates", "eval.groups", "compare.arms"),
    *(f"{place}.{PARAMETERS}" for place in PLUGIN_PLACES),
    *("trainer.callbacks", "trainer.loggers", "trainer.plugins"),
    *("trainer.profiler", "trainer.options"),
)
# Files of selectors that are null unless they are named: the node of one is made where it is
_NULL_FILE = re.compile(
    r"(?P<node>(online\.(first_stage\.)?)?selector(\.\w+)*\.(covariance|text_target))"
    r"\.(?P<name>path|key)"
)

# What Hydra says, in words alone, as a plain ValueError of `eval=3`, or of options of its own
_VALUE_ERRORS = ("Config group override must be", "Only one of --run", "The --resolve flag")


def application(
    command: str, kind: type[T], *, positional: Sequence[str] = ()
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Turn `stage(settings)` into the main function of a command, configured by `<command>.yaml`.

    A blank in the command, such as `data compact`, is `_` in the name of the file.

    Args:
        command: as it is typed.
        kind: what the stage takes.
        positional: the options that words without `=` stand for, in order.
    """

    def decorate(stage: Callable[[T], None]) -> Callable[[], None]:
        def main() -> None:
            # Loader processes are forked after a tokenizer was used, which Hugging Face warns of.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            # A log that a library cannot write, such as wandb's, is no reason for a traceback.
            logging.raiseExceptions = False
            arguments = list(sys.argv)
            full_error = os.environ.get(FULL_ERROR)
            register()
            register_resolvers()
            # Hydra reads sys.argv itself; it must not take the command for an override.
            typed = _flags_first(_overrides(arguments, command))
            _refuse_flags(typed, command)
            _refuse_lists(typed, command)
            words, typed = _without_credentials(_named(command, typed, positional), typed)
            arguments[len(arguments) - len(typed) :] = typed
            sys.argv = [f"siftclip {command}", *words]
            run = _hydra_main(command, words, _job(command, kind, stage, arguments, full_error))
            if full_error == "1":
                run()
            else:
                _run_hydra(run, command, dict(zip(words, typed, strict=True)), full_error)

        return main

    return decorate


def _job(
    command: str,
    kind: type[T],
    stage: Callable[[T], None],
    arguments: list[str],
    full_error: str | None,
) -> Callable[[DictConfig], None]:
    """Run the command on the composed configuration; a job of submitit does it in another process.

    Args:
        command: as it is typed.
        kind: what the stage takes.
        stage: the work itself.
        arguments: the whole command line: Lightning starts the other ranks with it.
        full_error: the user's value of `FULL_ERROR`.
    """

    @functools.wraps(stage)
    def job(config: DictConfig) -> None:
        _set_full_error(full_error)
        sys.argv = arguments
        begin_work()
        try:
            stage(_settings(command, kind, config))
        except (InputError, OmegaConfBaseException) as error:
            if full_error == "1":
                raise
            plain = _plain(config)
            # Those of an evaluation are the same on all ranks; a rank that trains may
            # be the only one to meet a fault.
            known = isinstance(error, InputError)
            message = message_of(error, plain) if known else _in_one_line(error)
            if error.__cause__ is not None and fault_of_plugin(error.__cause__, plain):
                message = f"{message} {TRACEBACK}"
            end_faulty(command, message, quiet=command.startswith("eval"))
        except TrainingStopped as stop:
            end_stopped(command, stop)
        except KeyboardInterrupt as error:
            end_interrupted(command, error)
        except BaseException as error:  # a class of somebody else may fail in any way
            if full_error == "1":
                raise
            _end_unforeseen(command, error, _plain(config))
        finally:
            end_work()

    return job


def _end_unforeseen(command: str, error: BaseException, plain: Any) -> NoReturn:
    """End the process for an exception of a plug-in, after an interrupt, or of Siftclip itself."""
    fault = fault_of_plugin(error, plain)
    if fault is not None:
        end_faulty(command, fault)
    if isinstance(error, SystemExit) or follows_interrupt(error):
        end_interrupted(command, error)
    if isinstance(error, BrokenPipeError) or not isinstance(error, Exception):
        raise error
    end_internal(command, error, _folder(plain))


def _settings(command: str, kind: type[T], config: DictConfig) -> T:
    """Read what the command takes, and say which options it does not read."""
    settings = read_command(kind, config)
    unused = unused_options(kind, HydraConfig.get().overrides.task, config)
    for override, group in unused if is_first_rank(os.environ) else ():
        log.warning("%s changes nothing: siftclip %s does not read %s", override, command, group)
    return settings


def _plain(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)


def _folder(plain: Mapping[str, Any]) -> Path | None:
    """Return the folder that a command writes into, if it has one that is there."""
    folder = plain.get("output_dir")
    return Path(folder) if isinstance(folder, str) and os.path.isdir(folder) else None


def _hydra_main(
    command: str, words: list[str], job: Callable[[DictConfig], None]
) -> Callable[[], None]:
    """Return Hydra's main function for a command, or what prints its help, where asked for."""
    config_name = command.replace(" ", "_")
    options = [word for word in words if word != "--help"]
    if len(options) < len(words) and not any(word[:1] == "-" for word in options):
        return functools.partial(_print_help, config_name, options)
    run: Callable[[], None] = hydra.main(
        config_path=CONFIGS, config_name=config_name, version_base="1.3"
    )(job)
    return run


def _run_hydra(
    run: Callable[[], None], command: str, typed: Mapping[str, str], full_error: str | None
) -> None:
    """Run, and tell faults of the options in one message; `typed` as for `_explain`."""
    _set_full_error("1")  # until the job begins: faults of the options come to here
    try:
        run()
    except (HydraException, OmegaConfBaseException, *YAML_FAULTS) as error:
        of_yaml = fault_of_yaml(error)
        if of_yaml is not None:
            end_faulty(command, of_yaml, quiet=True)
        if type(error) is CompactHydraException:  # of a job of submitit: see _end
            print(error, file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        is_explained = isinstance(error, (HydraException, OmegaConfBaseException))
        if not is_explained and not str(error).startswith(_VALUE_ERRORS):
            raise
        end_faulty(command, _explain(error, command, typed), quiet=True)
    finally:
        _set_full_error(full_error)


def _print_help(config_name: str, overrides: list[str]) -> None:
    """Print the help text, without all groups of Hydra, which it formats whether shown or not."""
    with composing():
        config = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
        print(config.hydra.help.template)


def _overrides(arguments: list[str], command: str) -> list[str]:
    """Return what follows the command. `--help` alone is Hydra's; a bare `-h` means the same."""
    words = command.split()
    at = arguments.index(words[0]) + len(words)
    return ["--help" if argument == "-h" else argument for argument in arguments[at:]]


def _flags_first(words: list[str]) -> list[str]:
    """Put Hydra's own options in front: between overrides its parser would lose what follows."""
    flags: list[str] = []
    others: list[str] = []
    value_follows = False
    for word in words:
        (flags if value_follows or word[:1] == "-" else others).append(word)
        value_follows = word in _TAKE_A_VALUE
    return flags + others


def _refuse_flags(typed: list[str], command: str) -> None:
    """End the command for options of Hydra that load a pickle, or serve shells alone.

    Hydra also knows each by its first letters.
    """
    for word in typed:
        if re.match(r"--e|--s|-sc", word):
            flag = word.partition("=")[0]
            way_out = "Type options themselves, or put them into a file for --config-dir."
            end_faulty(command, f"there is no option {flag}. {way_out}", quiet=True)


def _refuse_lists(typed: list[str], command: str) -> None:
    """End the command where several configurations of a group are given as a list."""
    for word in typed:
        fault = list_of_choices(word)
        if fault is not None:
            end_faulty(command, fault, quiet=True)


def _set_full_error(value: str | None) -> None:
    if value is None:
        os.environ.pop(FULL_ERROR, None)
    else:
        os.environ[FULL_ERROR] = value


# ---- words: what is typed, as Hydra reads it ----------------------------------------------------
def _named(command: str, arguments: list[str], positional: Sequence[str]) -> list[str]:
    """Translate the arguments to what Hydra reads, one for one.

    Bare words get the names of the options that they stand for. What Hydra's own options take,
    such as the folder behind `--config-dir`, stays as it is.
    """
    names = iter(positional)
    overrides, value_follows = [], False
    for argument in arguments:
        of_hydra = value_follows or argument[:1] == "-"
        value_follows = argument in _TAKE_A_VALUE
        if of_hydra:
            overrides.append(argument)
            continue
        if not positional or _is_override(argument, command):
            overrides.append(_opened(_with_quoted_path(argument)))
            continue
        name = next(names, None)
        if name is None:
            end(
                f"siftclip {command}: error: too many words without '='. Got {argument!r}; words "
                f"stand for {', '.join(positional)}.",
                FAILURE,
            )
        model = positional_model(argument) if name == "model.name" else None
        is_model = model is not None and not Path(argument).exists()
        overrides.append(str(model) if is_model else f"{name}={_quoted(argument)}")
    return overrides


def _without_credentials(words: list[str], typed: list[str]) -> tuple[list[str], list[str]]:
    """Return overrides, and what was typed for them, without credentials."""
    safe = list(map(without_credentials, words))
    given = zip(words, safe, typed, strict=True)
    return safe, [as_typed if word == same else same for word, same, as_typed in given]


def _is_override(word: str, command: str) -> bool:
    """Return whether a word is `OPTION=VALUE` and not a path, which may hold a `=`, too."""
    key, equals, _ = word.partition("=")
    if not equals:
        return word[:1] in ("~", "+")
    if re.fullmatch(r"[\w./@:$~+-]+", key) is None:
        return False
    # a folder named seed=0 must not change what seed=0 means
    return not Path(word).exists() or key.lstrip("~+") in _options(command, [])


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _with_quoted_path(override: str) -> str:
    """Quote the path of an override if it exists; without quotes Hydra misreads it."""
    key, _, value = override.partition("=")
    try:
        if not value or not Path(value).exists():
            return override
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return f"{key}={_quoted(value)}"
    except (OSError, ValueError):  # too long for a path
        return override
    return f"{key}={_quoted(value)}" if parsed.is_sweep_override() else override


def _opened(override: str) -> str:
    """Add `++` to an override that adds to one of `OPEN_MAPPINGS`, or makes a file of a null.

    Hydra's keys take no slash and nest at dots, so that such names are written as a mapping, which
    it merges: `++eval.groups={vtab/dtd:FILE}`.
    """
    key, equals, value = override.partition("=")
    plain = key.lstrip("+")
    file = _NULL_FILE.fullmatch(plain)
    if equals and file is not None:
        text = value if value[:1] in ("'", '"', "") or value == "null" else _quoted(value)
        target = "_target_:siftclip.selectors.FeatureFile"
        return f"++{file['node']}={{{target},{file['name']}:{text or _quoted('')}}}"
    plus = key[: len(key) - len(plain)] or "++"
    mapping = next((name for name in OPEN_MAPPINGS if f"{plain}.".startswith(f"{name}.")), None)
    if not equals or mapping is None:
        return override
    name = plain[len(mapping) + 1 :]
    if not name or re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII):
        return f"{plus}{plain}={value}"
    name = re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", name)
    return f"{plus}{mapping}={{{name}:{value or _quoted('')}}}"


# ---- faults of the options ----------------------------------------------------------------------
def _explain(error: Exception, command: str, typed: Mapping[str, str]) -> str:
    """Explain what is wrong with the options, and the way out.

    Args:
        error: Hydra's.
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
    return _by_its_words(error, command, typed) or _in_one_line(error)


def _by_its_words(error: Exception, command: str, typed: Mapping[str, str]) -> str | None:
    """Explain one of Hydra's messages that says by its words alone what it is about.

    `ConfigCompositionException` has no fields, and of these faults no cause that has any.
    """
    text = str(error)
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


def _in_one_line(error: BaseException) -> str:
    """Shorten Hydra's or OmegaConf's message and its cause's, without what is for programmers."""
    # both append what they know to their messages, below: the search path, the fields of the error
    text = re.split(r"Config search path:|\s*full_key: ", str(error).strip())[0]
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        text += "" if error.full_key in text else f" ({error.full_key})"
    cause = error.__cause__
    if cause is not None and not isinstance(error, OmegaConfBaseException):
        reason = _in_one_line(cause)
        text = f"{text}: {reason}" if text and reason not in text else text or reason
    return " ".join(text.split()) or type(error).__name__


def _not_an_option(key: str, typed: Iterable[str], command: str) -> str:
    """Say that a key is none of the options, and name the one that was meant, if it is close."""
    if not key:
        return "there is no name in front of a '='; options are written NAME=VALUE."
    typed = list(typed)
    deleted = (word for word in typed if word[:1] == "~" and f"{key}.".startswith(f"{word[1:]}."))
    if (word := next(deleted, None)) not in (None, f"~{key}"):
        return (
            f"{key} is not an option once {word} has taken {word[1:]} away. Leave one of them out."
        )
    choices = [word for word in typed if re.fullmatch(r"[\w/]+(@[\w.]+)?=[\w-]+", word)]
    way_out = _way_out(key, _options(command, choices))
    return f"{key} is not an option.{way_out} List all options: siftclip {command} --cfg job"


def _way_out(key: str, options: Mapping[str, bool]) -> str:
    """Say what may have been meant, with a blank in front; empty if nothing is near."""
    parent, _, last = key.rpartition(".")
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
    if re.fullmatch(r"[\w./@:$~+-]+", key) is None:
        return f"{key!r} cannot be the name of an option. Got {override!r}."
    if key == _ARMS and value[:1] == "[":
        return f"{key} must be a mapping, {_shape(key)}. Got {value}."
    in_brackets = _quoted_items(value)
    if in_brackets is not None:
        if key == _ARMS:  # each arm has a list
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
    return 'such as {half: ["selector.fraction=0.5"]}' if mapping == _ARMS else "{NAME: VALUE}"


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


def _options(command: str, choices: list[str]) -> dict[str, bool]:
    """List all options of a command by their dotted names, with whether they hold others.

    Args:
        choices: overrides that choose configurations; left out if they do not compose.
    """
    name = command.replace(" ", "_")
    with composing():
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
