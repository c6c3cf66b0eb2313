"""Items that run one after the other, each in a process of its own, within a budget of seconds.

A process is forked from one that has imported everything and has not touched the GPU, so that it
starts at once, and a kernel that fails or never ends costs its own item alone. What an item finds
is sent as soon as it is known: the facts of an item that is cut off are kept.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

T = TypeVar("T")
_CONTEXT = multiprocessing.get_context("fork")
Status = Literal["passed", "failed", "cut off", "not run"]
GOOD: tuple[Status, ...] = ("passed",)
LEAST_SECONDS = 5.0  # with less an item is not begun
GRACE_SECONDS = 5.0  # between asking a process to end and ending it


class CheckError(Exception):
    """What an item has found is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where an item runs, and how large."""

    device: torch.device
    tiny: bool
    work: Path  # a folder for what items write, and share
    deadline: float = 0.0  # of the item, by time.monotonic

    def size(self, whole: T, tiny: T) -> T:
        """Choose between a size for a GPU and one that a CPU does in seconds."""
        return tiny if self.tiny else whole

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_gb(self) -> float | None:
        """The peak of the device's memory since the last call, in 1e9 bytes; None without one."""
        if not self.on_gpu or not torch.cuda.is_initialized():
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


class Facts:
    """Takes what an item finds, and sends it at once."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send

    def __setitem__(self, name: str, value: object) -> None:
        self._send({name: value})

    def note_peak(self, setup: Setup, name: str = "peak GB") -> None:
        """Send the peak of the device's memory since the last one, if there is a device."""
        peak = setup.peak_gb()
        if peak is not None:
            self[name] = peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One part of the check."""

    name: str
    seconds: float  # at most
    run: Callable[[Setup, Facts], None]  # raises if something is wrong


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What an item has found."""

    name: str
    status: Status
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    trace: str = ""


def in_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, whose memory is its own; it has not used the GPU.

    Raises:
        CheckError: it raised, or died.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    child = _CONTEXT.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    sender.close()
    try:
        answer: T = receiver.recv()
    except EOFError:
        raise CheckError(f"{function.__name__} of {arguments[:1]} failed; see the log") from None
    finally:
        child.join()
    return answer


def require(condition: bool, message: str) -> None:
    """Refuse what an item has found.

    Raises:
        CheckError: the condition does not hold.
    """
    if not condition:
        raise CheckError(message)


def run_item(item: Item, setup: Setup, *, seconds_left: float, log: Path) -> Outcome:
    """Run an item in a process that ends with it, and with all that it has started.

    Args:
        item: to run.
        setup: without a deadline.
        seconds_left: of the whole check.
        log: gets what the process prints.
    """
    seconds = min(item.seconds, seconds_left)
    if seconds < LEAST_SECONDS:
        return Outcome(name=item.name, status="not run", error="no time was left")
    start = time.monotonic()
    given = Setup(device=setup.device, tiny=setup.tiny, work=setup.work, deadline=start + seconds)
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    child = _CONTEXT.Process(target=_run, args=(item, given, sender, log))
    child.start()
    sender.close()
    outcome = Outcome(name=item.name, status="cut off", error=f"not done within {seconds:.0f} s")
    try:
        while (left := given.seconds_left) > 0:
            if receiver.poll(left) and not _take(receiver, outcome):
                break
    finally:
        _end(child, patient=outcome.status != "cut off")
        outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def _take(receiver: Connection, outcome: Outcome) -> bool:
    """Take what the process sends; whether there is more to come."""
    try:
        message: Mapping[str, Any] = receiver.recv()
    except EOFError:
        if outcome.status == "cut off":  # it has not said how it ended
            outcome.status, outcome.error = "failed", "its process died; see its log"
        return False
    if "status" in message:
        outcome.status, outcome.error = message["status"], message["error"]
        outcome.trace = message["trace"]
    else:
        outcome.facts.update(message["facts"])
    return True


def _run(item: Item, setup: Setup, sender: Connection, log: Path) -> None:
    """Be the process of an item."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("w", encoding="utf-8") as file:
        send_output_to(file.fileno())
    if setup.tiny:  # cores that others use as well make several threads wait for each other
        torch.set_num_threads(1)
    end: dict[str, Any] = {"status": "passed", "error": "", "trace": ""}
    try:
        item.run(setup, Facts(lambda facts: sender.send({"facts": facts})))
    except BaseException as error:
        end = {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}"[:500],
            "trace": traceback.format_exc()[-3000:],
        }
    sender.send(end)
    sender.close()


def send_output_to(descriptor: int) -> None:
    """Let what this process prints, and what it starts, go to an open file."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)


def _end(child: BaseProcess, *, patient: bool) -> None:
    """End a process, and what runs in its session; a patient one waits for it a while."""
    if patient:
        child.join(GRACE_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid or 0, number)
        child.join(GRACE_SECONDS)
    child.kill()
    child.join()
