"""What the commands share: Hydra reads the overrides, errors of the user become one message."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import hydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from siftclip.selectors.errors import InputError
from siftclip.trainer.launch import TrainingStopped, find_launch

CONFIGS = "pkg://siftclip.configs"
# Hydra's options whose value is the next word
_TAKE_A_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c"),
    *("--package", "-p", "--experimental-rerun"),
)
FAILURE = 2  # exit status for faults of the user's input
INTERRUPTED = 130  # as a shell reports Ctrl-C


def application(
    command: str, *, positional: Sequence[str] = ()
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Turn `stage(config)` into the main function of a command, configured by `<command>.yaml`.

    A blank in the command, such as `data compact`, is `_` in the name of the file.

    Args:
        command: as it is typed.
        positional: the options that words without `=` stand for, in order.
    """

    def decorate(stage: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            # Loader processes are forked after a tokenizer was used, which Hugging Face warns of.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            full_arguments = list(sys.argv)

            @functools.wraps(stage)
            def job(config: DictConfig) -> None:
                sys.argv = full_arguments  # Lightning starts the other ranks with these
                try:
                    stage(config)
                except (InputError, OmegaConfBaseException) as error:
                    if os.environ.get("HYDRA_FULL_ERROR") == "1":
                        raise
                    _end(f"siftclip {command}: error: {error}", FAILURE)
                except TrainingStopped as stop:
                    _leave(command, stop)
                except (KeyboardInterrupt, SystemExit) as error:
                    # Lightning turns an interrupt during training into sys.exit(1)
                    causes = (error, error.__context__)
                    if not any(isinstance(cause, KeyboardInterrupt) for cause in causes):
                        raise
                    print(
                        f"\nsiftclip {command}: interrupted; the same command continues.",
                        file=sys.stderr,
                    )
                    raise SystemExit(INTERRUPTED) from None

            # Hydra reads sys.argv itself; it must not take the command for an override.
            overrides = _overrides(full_arguments, command)
            sys.argv = [f"siftclip {command}", *_named(command, overrides, positional)]
            config_name = command.replace(" ", "_")
            hydra.main(config_path=CONFIGS, config_name=config_name, version_base="1.3")(job)()

        return main

    return decorate


def _leave(command: str, stop: TrainingStopped) -> NoReturn:
    """End the process as the signal would have done, which also ends a comparison or a sweep."""
    from siftclip.trainer.run_dir import is_rank_zero  # imports Lightning, as all that trains

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


def _end(message: str, status: int) -> NoReturn:
    """Print why the command ends, and end it."""
    print(message, file=sys.stderr, flush=True)
    if "SUBMITIT_EXECUTOR" in os.environ:
        # Its jobs tell the command that waits for them of exceptions only, and Hydra prints this
        # kind without a traceback.
        raise CompactHydraException(message) from None
    raise SystemExit(status) from None


def _overrides(arguments: list[str], command: str) -> list[str]:
    """What follows the command. `--help` alone is Hydra's; a bare `-h` means the same."""
    words = command.split()
    at = arguments.index(words[0]) + len(words)
    return ["--help" if argument == "-h" else argument for argument in arguments[at:]]


def _named(command: str, arguments: list[str], positional: Sequence[str]) -> list[str]:
    """The arguments with the names of the options that bare words stand for.

    What Hydra's own options take, such as the folder behind `--config-dir`, stays as it is.
    """
    names = iter(positional)
    found, value_follows = [], False
    for argument in arguments:
        bare = not value_follows and "=" not in argument and argument[:1] not in ("-", "~", "+")
        value_follows = argument in _TAKE_A_VALUE
        if not bare or not positional:
            found.append(argument)
            continue
        name = next(names, None)
        if name is None:
            _end(
                f"siftclip {command}: error: too many words without '='. Got {argument!r}; words "
                f"stand for {', '.join(positional)}.",
                FAILURE,
            )
        quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
        found.append(f"{name}='{quoted}'")
    return found
