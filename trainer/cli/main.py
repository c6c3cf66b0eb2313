"""`siftclip COMMAND [OVERRIDES]`: finds the command's module and hands over to Hydra."""

from __future__ import annotations

import difflib
import importlib
import sys

import siftclip

COMMANDS = {
    "embed": "features of a pool with an open_clip model",
    "score": "scores of a pool's samples, from features",
    "select": "a selection, from scores",
    "train": "a CLIP on a selection, streamed from the original tars",
    "eval": "zero-shot tasks on a run, a checkpoint or a model",
    "compare": "selectors x seeds at one budget, with a report",
    "demo": "all of it on handwritten digits, in a few minutes on a CPU",
}

USAGE = """siftclip {version}: train CLIP on the part of a pool that is worth training on

usage: siftclip COMMAND [OPTION=VALUE ...]
       siftclip COMMAND --help

{commands}

Start with:  siftclip demo
"""


def usage() -> str:
    """What `siftclip --help` prints."""
    commands = "\n".join(f"  {name:<9}{what}" for name, what in COMMANDS.items())
    return USAGE.format(version=siftclip.__version__, commands=commands)


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(siftclip.__version__)
        return
    command = arguments[0]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        print(
            f"siftclip: {command!r} is not a command; there are {', '.join(COMMANDS)}.{hint}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    module = importlib.import_module(f"siftclip.trainer.cli.{command}_command")
    module.main()


if __name__ == "__main__":
    main()
