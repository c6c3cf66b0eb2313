"""`siftclip COMMAND [OVERRIDES]`: finds the command's module and hands over to Hydra.

A command is one word, or two where the first one names a group: `siftclip data compact`. A group
can be a command itself: `siftclip eval`.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import re
import select
import signal
import sys

import siftclip
from siftclip.progress import hide_foreign_bars
from siftclip.trainer.cli.safe_output import print_safely, safe_output
from siftclip.trainer.cli.streams import fault_of_output, make_streams_last

COMMANDS = {
    "index": "find the samples of a pool, once",
    "embed": "compute image and text embeddings of a pool",
    "target": "embed target tasks, for selectors that need a target",
    "score": "score the samples of a pool by their features",
    "select": "select samples by score",
    "train": "train a CLIP on a selection, streamed from the original tars",
    "eval": "evaluate a run, a checkpoint or a model on zero-shot tasks",
    "eval watch": "evaluate the checkpoints of a run when they appear",
    "eval diff": "compare two results by task: which model is better, and how sure that is",
    "eval download": "download DataComp's evaluation sets, or clip-benchmark's",
    "export": "export a trained model for open_clip, the Hugging Face hub or DataComp",
    "compare": "compare selectors x seeds at one budget, with a report",
    "report": "write the report of runs that are there, wherever they lie",
    "data compact": "copy a selection into tars of its own",
    "data bench": "measure how fast samples come, and whether a copy would pay",
    "subset import": "keep a file of uids, or a selection, under a name",
    "subset export": "write a subset as npy, parquet, text or a list of tars",
    "subset list": "list the subsets, with what made them",
    "subset show": "describe a subset, with what made it",
    "subset combine": "union, intersection or difference of subsets, or a sample of one",
    "subset verify": "check that a subset is whole, and of a pool as it is now",
    "show": "look at a selection, or at a pool: a page with samples, scores and what is kept",
    "diff": "look at what two selections differ in",
    "reproduce": "repeat a run from its directory, and say what came out the same",
    "runs list": "list runs, scores, selections and the like, with size and state",
    "runs show": "describe one of them, with what it uses and what uses it",
    "runs rm": "remove one of them",
    "runs gc": "free what no result needs",
    "demo": "run all of it on handwritten digits, in a few minutes on a CPU",
}
# Commands without a configuration
PLAIN_COMMANDS = {
    "explain": "print meaning, default and allowed values of an option: explain optim.lr",
    "from-open-clip": "print the command that does what a command line of open_clip does",
    "new": "write a package with a selector, a loss or a kind of task: new selector caption_length",
}

USAGE = """siftclip {version}: train CLIP on the part of a pool that is worth training on

usage: siftclip COMMAND [OPTION=VALUE ...]
       siftclip COMMAND --help

{commands}

Start with:  siftclip demo
"""


GROUPS = {name.split()[0] for name in COMMANDS if " " in name}
HELP = ("-h", "--help", "help")


def usage(group: str = "") -> str:
    """Return what `siftclip --help` prints, or `siftclip GROUP --help`."""
    commands = "\n".join(
        f"  {name:<16}{what}"
        for name, what in (COMMANDS | PLAIN_COMMANDS).items()
        if name.startswith(group)
    )
    return USAGE.format(version=siftclip.__version__, commands=commands)


def main() -> None:
    """Run the console script."""
    # Torch, Lightning and open_clip are millions of objects that stay: at Python's own thresholds a
    # tenth of the time of their import goes into looking for garbage among them.
    gc.set_threshold(50_000, 20, 100)
    hide_foreign_bars()
    make_streams_last()
    sys.excepthook = print_safely
    try:
        with safe_output():
            _run(sys.argv[1:])
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(1):
            raise
        # The reader has enough, such as `| head`. What is left goes nowhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        print(f"\n{_name()}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        # Here, since its import takes a moment, which a command that ends well need not cost.
        from siftclip.trainer.cli.endings import end_faulty, end_internal, fault_of_path

        command = _name().removeprefix("siftclip").strip()
        fault_of_name = fault_of_path(error, {})
        if fault_of_name is not None:
            end_faulty(command, fault_of_name)
        end_internal(command, error, None)
    fault = fault_of_output()
    if fault is not None:
        print(f"{_name()}: error: standard output: {fault.strerror}", file=sys.stderr)
        raise SystemExit(1)


def _name() -> str:
    words = [word for word in sys.argv[1:2] if word in {*COMMANDS, *PLAIN_COMMANDS, *GROUPS}]
    return " ".join(["siftclip", *words])


def _is_unread(descriptor: int) -> bool:
    """Tell whether this is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in HELP:
        print(usage())
        return
    try:
        os.getcwd()
    except FileNotFoundError:
        print(
            f"{_name()}: error: the folder in which this was typed is gone. Change to another one.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    if arguments[0] == "--version":
        print(siftclip.__version__)
        return
    group, known = "", [name.split()[0] for name in COMMANDS | PLAIN_COMMANDS]
    if arguments[0] in GROUPS:
        group = f"{arguments[0]} "
        if arguments[0] in COMMANDS and group + " ".join(arguments[1:2]) not in COMMANDS:
            group = ""
        elif len(arguments) == 1 or arguments[1] in HELP:
            print(usage(group))
            return
        else:
            known = [name.removeprefix(group) for name in COMMANDS if name.startswith(group)]
    word = arguments[1 if group else 0]
    command = group + word
    if command not in COMMANDS | PLAIN_COMMANDS:
        close = difflib.get_close_matches(word, known, n=1)
        hint = f" Did you mean {group}{close[0]}?" if close else ""
        there = [name for name in COMMANDS | PLAIN_COMMANDS if name.startswith(group)]
        print(
            f"siftclip: {command!r} is not a command; there are {', '.join(there)}.{hint}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    module = importlib.import_module(
        f"siftclip.trainer.cli.commands.{re.sub('[ -]', '_', command)}_command"
    )
    module.main()


if __name__ == "__main__":
    main()
