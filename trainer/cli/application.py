"""What the commands share: Hydra reads the overrides, errors of the user become one message."""

from __future__ import annotations

import difflib
import functools
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
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
from siftclip.plugins import LOSS_GROUP, SELECTOR_GROUP, installed_names
from siftclip.trainer.cli.plugin_faults import TRACEBACK, fault_of_plugin
from siftclip.trainer.cli.yaml_faults import YAML_FAULTS, fault_of_yaml
from siftclip.trainer.runtime.launch import TrainingStopped, find_launch
from siftclip.trainer.settings.describing.describe import takes_more
from siftclip.trainer.settings.describing.help import register_resolvers
from siftclip.trainer.settings.read_command import read_command
from siftclip.trainer.settings.store import composing, register

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
# Mappings whose names are the user's own, and what no configuration lists: no `+` is needed
OPEN_MAPPINGS = (
    *("eval.classnames", "eval.templates", "eval.groups", "compare.arms"),
    *(f"{place}.{PARAMETERS}" for place in PLUGIN_PLACES),
    *("trainer.callbacks", "trainer.loggers", "trainer.plugins"),
    *("trainer.profiler", "trainer.options"),
)
FULL_ERROR = "HYDRA_FULL_ERROR"  # if 1, Hydra raises its errors instead of printing them
FAILURE = 2  # exit status for faults of the user's input
INTERRUPTED = 130  # as a shell reports Ctrl-C


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
            arguments = list(sys.argv)
            full_error = os.environ.get(FULL_ERROR)
            register()
            register_resolvers()
            # Hydra reads sys.argv itself; it must not take the command for an override.
            typed = _overrides(arguments, command)
            words = _named(command, typed, positional)
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
        try:
            stage(read_command(kind, config))
        except (InputError, OmegaConfBaseException) as error:
            if full_error == "1":
                raise
            # Those of an evaluation are the same on all ranks; a rank that trains may
            # be the only one to meet a fault.
            message = str(error) if isinstance(error, InputError) else _in_one_line(error)
            if error.__cause__ is not None and fault_of_plugin(error.__cause__, _plain(config)):
                message = f"{message} {TRACEBACK}"
            _end_faulty(command, message, quiet=command.startswith("eval"))
        except TrainingStopped as stop:
            _leave(command, stop)
        except (KeyboardInterrupt, SystemExit) as error:
            _leave_interrupted(command, error)
        except Exception as error:  # a class of somebody else may fail in any way
            fault = None if full_error == "1" else fault_of_plugin(error, _plain(config))
            if fault is None:
                raise
            _end_faulty(command, fault, quiet=False)

    return job


def _plain(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)


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
            _end_faulty(command, of_yaml, quiet=True)
        if type(error) is CompactHydraException:  # of a job of submitit: see _end
            print(error, file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        is_explained = isinstance(error, (HydraException, OmegaConfBaseException))
        if not is_explained and not str(error).startswith(_VALUE_ERRORS):
            raise
        _end_faulty(command, _explain(error, command, typed), quiet=True)
    finally:
        _set_full_error(full_error)


def _print_help(config_name: str, overrides: list[str]) -> None:
    """Print the help text, without all groups of Hydra, which it formats whether shown or not."""
    with composing():
        config = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
        print(config.hydra.help.template)


def _leave(command: str, stop: TrainingStopped) -> NoReturn:
    """End the process as the signal would have done, which also ends a comparison or a sweep."""
    from siftclip.trainer.runtime.run_dir import is_rank_zero  # imports torch, as all that trains

    by_submitit = stop.signal not in (signal.SIGINT, signal.SIGTERM)
    if not is_rank_zero():
        # Lightning's own launcher kills rank 0 when another rank fails, and submitit's rank 0 has
        # to queue the job again.
        raise SystemExit(0 if by_submitit or find_launch(os.environ) is None else stop.exit_status)
    message = f"siftclip {command}: {stop}"
    if by_submitit:
        print(message, file=sys.stderr, flush=True)
        signal.raise_signal(stop.signal)  # its handler queues the job again, and exits
    _end(message, stop.exit_status)


def _leave_interrupted(command: str, error: BaseException) -> NoReturn:
    """End the process after Ctrl-C, or as it was going to end.

    Lightning turns an interrupt during training into sys.exit(1).
    """
    if not any(isinstance(cause, KeyboardInterrupt) for cause in (error, error.__context__)):
        raise error
    if is_first_rank(os.environ):
        print(f"\nsiftclip {command}: interrupted; the same command continues.", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


def _end_faulty(command: str, fault: str, *, quiet: bool) -> NoReturn:
    """End the process for a fault of the user; with `quiet` the first rank alone says it."""
    quiet = quiet and not is_first_rank(os.environ)
    _end("" if quiet else f"siftclip {command}: error: {fault}", FAILURE)


def _end(message: str, status: int) -> NoReturn:
    """Print why the command ends, if there is something to say, and end it."""
    if message:
        print(message, file=sys.stderr, flush=True)
    if "SUBMITIT_EXECUTOR" in os.environ:
        # Its jobs tell the command that waits for them of exceptions only, and Hydra prints this
        # kind without a traceback.
        raise CompactHydraException(message) from None
    raise SystemExit(status) from None


def _overrides(arguments: list[str], command: str) -> list[str]:
    """Return what follows the command. `--help` alone is Hydra's; a bare `-h` means the same."""
    words = command.split()
    at = arguments.index(words[0]) + len(words)
    return ["--help" if argument == "-h" else argument for argument in arguments[at:]]


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Return whether this process speaks for all that torchrun, srun or Lightning started with it.

    Lightning knows as well, but its import takes seconds.
    """
    if "RANK" in environment:
        return environment["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(environment.get(name, "0") == "0" for name in names)


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
            _end(
                f"siftclip {command}: error: too many words without '='. Got {argument!r}; words "
                f"stand for {', '.join(positional)}.",
                FAILURE,
            )
        overrides.append(f"{name}={_quoted(argument)}")
    return overrides


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
    """Add `++` to an override that adds to one of `OPEN_MAPPINGS`.

    Hydra's keys take no slash and nest at dots, so that such names are written as a mapping, which
    it merges: `++eval.groups={vtab/dtd:FILE}`.
    """
    key, equals, value = override.partition("=")
    plain = key.lstrip("+")
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
        key, _, value = match[1].partition("=")
        as_list = "" if "(" in value else f"A list is written {key}=[{value}]; "
        return (
            f"{match[1]} names several values of one option. {as_list}--multirun runs one job for "
            "each."
        )
    unknown = re.match(r"Could not override '(.*?)'|Could not delete .* '(.*?)'\s+does not", text)
    if unknown:
        return _not_an_option(unknown[1] or unknown[2], typed, command)
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
    close = difflib.get_close_matches(name, options, n=1)
    hint = f" Did you mean {group}={close[0]}?" if close else ""
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
    escaped = value.replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{escaped}"')
    return f"the value of {key} cannot be read. Got {value!r}; quoted for the shell it is {quoted}"


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
