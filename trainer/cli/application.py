"""What the commands share: Hydra reads the overrides, errors of the user become one message."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import hydra
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from siftclip.selectors.errors import InputError

CONFIGS = "pkg://siftclip.configs"
FAILURE = 2  # exit status for faults of the user's input
INTERRUPTED = 130  # as a shell reports Ctrl-C


def application(command: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Turn `stage(config)` into the main function of a command, configured by `<command>.yaml`.

    A blank in the command, such as `data compact`, is `_` in the name of the file.
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
                    print(f"siftclip {command}: error: {error}", file=sys.stderr)
                    raise SystemExit(FAILURE) from None
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
            sys.argv = [f"siftclip {command}", *_overrides(full_arguments, command)]
            config_name = command.replace(" ", "_")
            hydra.main(config_path=CONFIGS, config_name=config_name, version_base="1.3")(job)()

        return main

    return decorate


def _overrides(arguments: list[str], command: str) -> list[str]:
    """What follows the command. `--help` alone is Hydra's; a bare `-h` means the same."""
    words = command.split()
    at = arguments.index(words[0]) + len(words)
    return ["--help" if argument == "-h" else argument for argument in arguments[at:]]
