"""Counts the outcomes of many mutated files of each kind, as a table; see docs/results.md.

    python tests/fuzz/count_outcomes.py --inputs 10000

Each kind has a process of its own, so that one that dies is seen. The status is 1 if anything was
raised that is no InputError, or took longer than 20 s, or a process died.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from fuzz_kinds import KINDS, outcome_of, outcome_of_answers, write_base

from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage import remote as remote_storage

SECONDS = 20  # of one input
ANSWERS = "HTTP answers"
ANSWERS_SHARE = 0.5  # of the inputs of another kind: a server is started for each
OUTCOMES = ("value", "counted", "error")


class SlowError(BaseException):
    """An input took too long; not to be caught by what reads it."""


def run_kind(name: str, inputs: int, seed: int, results: Connection) -> None:
    """Send the outcomes of a kind, the longest time in s, and by how many MB memory has grown."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _stop)
    remote_storage.FIRST_PAUSE_SECONDS, connections.READ_TIMEOUT_SECONDS = 0.001, 1.0
    outcomes: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_base(root)
        before = _peak_mb()
        for number in range(inputs):
            start = time.monotonic()
            outcomes[_outcome(root, name, Random(f"{seed} {name} {number}"), number)] += 1
            longest = max(longest, time.monotonic() - start)
    results.send((outcomes, longest, _peak_mb() - before))


def _outcome(root: Path, name: str, random: Random, number: int) -> str:
    read: Callable[[], str] = lambda: outcome_of(root, KINDS[name], random)  # noqa: E731
    if name == ANSWERS:
        read = lambda: outcome_of_answers(root, random)  # noqa: E731
    signal.alarm(SECONDS)
    try:
        return read()
    except (Exception, SlowError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{name}, input {number}: {type(error).__name__} {error} in {last}", file=sys.stderr)
        return f"fault: {type(error).__name__}"
    finally:
        signal.alarm(0)


def _stop(_: int, __: FrameType | None) -> None:
    raise SlowError


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(words: Sequence[str] | None = None) -> int:
    """Print a table in Markdown; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    each = -(-given.inputs // len(KINDS))
    total: Counter[str] = Counter()
    print("| kind of file | inputs | value | counted | error | faults | longest s | memory MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (*KINDS, ANSWERS):
        inputs = int(each * ANSWERS_SHARE) if name == ANSWERS else each
        outcomes, longest, grown_mb = _in_process(name, inputs, given.seed)
        total += outcomes
        print(_row(name, outcomes, f"{longest:.2f}", str(grown_mb)), flush=True)
    print(_row("all", total, "", ""))
    return int(total.total() > sum(total[name] for name in OUTCOMES))


def _in_process(name: str, inputs: int, seed: int) -> tuple[Counter[str], float, int]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_kind, args=(name, inputs, seed, sender))
    process.start()
    sender.close()
    try:
        answer: tuple[Counter[str], float, int] = receiver.recv()
    except EOFError:
        answer = Counter({"fault: the process died": 1}), 0.0, 0
    process.join()
    return answer


def _row(name: str, outcomes: Counter[str], longest: str, grown_mb: str) -> str:
    faults = outcomes.total() - sum(outcomes[outcome] for outcome in OUTCOMES)
    counts = (outcomes.total(), *(outcomes[outcome] for outcome in OUTCOMES), faults)
    return f"| {name} | {' | '.join(map(str, counts))} | {longest} | {grown_mb} |"


if __name__ == "__main__":
    sys.exit(main())
