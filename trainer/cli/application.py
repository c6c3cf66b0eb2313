"""What the commands share: Hydra reads the overrides, errors of the user become one message."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from siftclip.errors import InputError
from siftclip.first_rank import fault_of_launch, is_first_rank
from siftclip.interrupts import begin_work, end_work
from siftclip.trainer.cli.choices import list_of_choices, positional_model
from siftclip.trainer.cli.endings import (
    FAILURE,
    FULL_ERROR,
    end,
    end_faulty,
    end_internal,
    end_interrupted,
    end_stopped,
    fault_of_path,
    follows_interrupt,
    message_of,
)
from siftclip.trainer.cli.explanations import (
    NO_NAME_OF_CHOICE,
    PARAMETERS,
    PLUGIN_PLACES,
    command_options,
    explain,
    hydras_words,
    quoted,
)
from siftclip.trainer.cli.flags import fault_of_flags, flags_first, marked, spelled_out
from siftclip.trainer.cli.plugin_faults import TRACEBACK, fault_of_plugin
from siftclip.trainer.cli.typed_credentials import safe_config, without_credentials
from siftclip.trainer.cli.yaml_faults import YAML_FAULTS, fault_of_yaml
from siftclip.trainer.runtime.launch import TrainingStopped
from siftclip.trainer.settings.describing.help import register_resolvers
from siftclip.trainer.settings.read_command import read_command
from siftclip.trainer.settings.store import composing, register
from siftclip.trainer.settings.unused import unused_options

log = logging.getLogger(__name__)
T = TypeVar("T")

CONFIGS = "pkg://siftclip.configs"
_NESTED_MAPPING = "pool.storage_options"  # whose mappings hold others: dots are no part of names
# Mappings whose names are the user's own, and what no configuration lists: no `+` is needed
OPEN_MAPPINGS = (
    *("eval.classnames", "eval.templates", "eval.groups", "compare.arms", _NESTED_MAPPING),
    *(f"{place}.{PARAMETERS}" for place in PLUGIN_PLACES),
    *("trainer.callbacks", "trainer.loggers", "trainer.plugins"),
    *("trainer.profiler", "trainer.options", "optim.timm"),
)
# Files of selectors that are null unless they are named: the node of one is made where it is
_NULL_FILE = re.compile(
    r"(?P<node>(online\.(first_stage\.)?)?selector(\.\w+)*\.(covariance|text_target))"
    r"\.(?P<name>path|key)"
)

# What Hydra says, in words alone, as a plain ValueError of `eval=3`, or of options of its own
_VALUE_ERRORS = (NO_NAME_OF_CHOICE, "Only one of --run", "The --resolve flag")


def application(
    command: str,
    kind: type[T],
    *,
    positional: Sequence[str] = (),
    rest: str | None = None,
    prepare: Callable[[Sequence[str]], Sequence[str]] | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Turn `stage(settings)` into the main function of a command, configured by `<command>.yaml`.

    A blank in the command, such as `data compact`, is `_` in the name of the file.

    Args:
        command: as it is typed.
        kind: what the stage takes.
        positional: the options that words without `=` stand for, in order.
        rest: the option that all words without `=` stand for, as a list.
        prepare: is given the words as Hydra reads them, before it does, and returns more, which
            come in front of what was typed. It may raise InputError.
        flags: words with dashes and what they stand for, see `spelled_out`.
    """

    def decorate(stage: Callable[[T], None]) -> Callable[[], None]:
        def main() -> None:
            # Loader processes are forked after a tokenizer was used, which Hugging Face warns of.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            # A log that a library cannot write, such as wandb's, is no reason for a traceback.
            logging.raiseExceptions = False
            of_launch = fault_of_launch(os.environ)
            if of_launch is not None:
                end_faulty(command, of_launch)
            arguments = list(sys.argv)
            full_error = os.environ.get(FULL_ERROR)
            register()
            register_resolvers()
            # Hydra reads sys.argv itself; it must not take the command for an override.
            raw = _overrides(arguments, command)
            given = spelled_out(raw, flags)
            _refuse(given, command, flags)
            typed = flags_first(given)
            if rest is not None:
                typed = _gathered(command, typed, rest)
            words, typed = _without_credentials(_named(command, typed, positional), typed)
            arguments[len(arguments) - len(raw) :] = typed
            words, typed = _prepared(command, prepare, words, typed)
            sys.argv = [f"siftclip {command}", *words]
            run = _hydra_main(command, words, _job(command, kind, stage, arguments, full_error))
            if full_error == "1":
                run()
            else:
                _run_hydra(run, command, dict(zip(words, typed, strict=True)), full_error)

        return main

    return decorate


def _prepared(
    command: str,
    prepare: Callable[[Sequence[str]], Sequence[str]] | None,
    words: list[str],
    typed: list[str],
) -> tuple[list[str], list[str]]:
    """Add what a command itself puts in front of the overrides, see `application`."""
    if prepare is None or "--help" in words:
        return words, typed
    try:
        more = [*prepare(words)]
    except InputError as error:
        end_faulty(command, str(error), quiet=True)
    first = sum(is_hydras for _, is_hydras in marked(words))  # Hydra's own options come first
    return [*words[:first], *more, *words[first:]], [*typed[:first], *more, *typed[first:]]


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
            message = message_of(error, plain) if known else hydras_words(error)
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
    fault = fault_of_plugin(error, plain) or fault_of_path(error, plain)
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
    """Run, and tell faults of the options in one message; `typed` as for `explain`."""
    _set_full_error("1")  # until the job begins: faults of the options come to here
    shows_config = any(re.match(r"(--cfg|-c)(=|$)", word) for word in typed)
    try:
        with safe_config([*typed]) if shows_config else nullcontext():
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
        end_faulty(command, explain(error, command, typed), quiet=True)
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


def _refuse(typed: list[str], command: str, flags: Iterable[str]) -> None:
    """End the command for options of Hydra that are none, or several configurations of a group."""
    for fault in (fault_of_flags(typed, flags), *map(list_of_choices, typed)):
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
    overrides = []
    for argument, is_hydras in marked(arguments):
        if is_hydras:
            overrides.append(argument)
            continue
        if not positional or _is_override(argument, command):
            overrides.append(opened(_with_quoted_path(argument)))
            continue
        name = next(names, None)
        if name is None:
            end(
                f"siftclip {command}: error: too many words without '='. Got {argument!r}; words "
                f"stand for {', '.join(positional)}.",
                FAILURE,
            )
        model = positional_model(argument) if name == "model.name" else None
        is_model = model is not None and not _exists(argument)
        overrides.append(str(model) if is_model else f"{name}={quoted(argument)}")
    return overrides


def _gathered(command: str, arguments: list[str], option: str) -> list[str]:
    """Put all bare words into one override, a list."""
    bare: list[str] = []
    others: list[str] = []
    for argument, is_hydras in marked(arguments):
        is_option = is_hydras or _is_override(argument, command)
        (others if is_option else bare).append(argument)
    return [*others, f"{option}=[{','.join(map(quoted, bare))}]"] if bare else others


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
    return not _exists(word) or key.lstrip("~+") in command_options(command, [])


def _exists(word: str) -> bool:
    try:
        return Path(word).exists()
    except (OSError, ValueError):  # too long for a path
        return False


def _with_quoted_path(override: str) -> str:
    """Quote the path of an override if it exists; without quotes Hydra misreads it."""
    key, _, value = override.partition("=")
    if not value or not _exists(value):
        return override
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return f"{key}={quoted(value)}"
    return f"{key}={quoted(value)}" if parsed.is_sweep_override() else override


def opened(override: str) -> str:
    """Add `++` to an override that adds to one of `OPEN_MAPPINGS`, or makes a file of a null.

    Hydra's keys take no slash and nest at dots, so that such names are written as a mapping, which
    it merges: `++eval.groups={vtab/dtd:FILE}`.
    """
    key, equals, value = override.partition("=")
    plain = key.lstrip("+")
    file = _NULL_FILE.fullmatch(plain)
    if equals and file is not None:
        text = value if value[:1] in ("'", '"', "") or value == "null" else quoted(value)
        target = "_target_:siftclip.selectors.FeatureFile"
        return f"++{file['node']}={{{target},{file['name']}:{text or quoted('')}}}"
    plus = key[: len(key) - len(plain)] or "++"
    mapping = next((name for name in OPEN_MAPPINGS if f"{plain}.".startswith(f"{name}.")), None)
    if not equals or mapping is None:
        return override
    name = plain[len(mapping) + 1 :]
    is_nested = mapping == _NESTED_MAPPING
    if not name or is_nested or re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII):
        return f"{plus}{plain}={value}"
    name = re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", name)
    return f"{plus}{mapping}={{{name}:{value or quoted('')}}}"
