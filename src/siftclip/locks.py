"""One process at a time writes a place. The lock goes with its holder, however that one ends.

Locks are POSIX record locks (`fcntl.lockf`), which work over NFS too. `filelock` takes flock, which
loader processes inherit: after a SIGKILL of the holder they would keep it until they notice.

The lock's file says who holds it and can be read meanwhile. It is deleted at the end; one that a
killed process has left behind holds nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path

import torch
from typing_extensions import TypedDict

from siftclip.errors import InputError
from siftclip.ranks import OneRank, Ranks
from siftclip.reading import open_handle
from siftclip.records import Count, Text, read_record
from siftclip.writing import WriteError, writing_to

LOCK_NAME = ".lock"  # of a folder
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 3.0  # before a word is said about waiting
_FREE, _HELD, _FAULT = 0, 1, 2
_FLOCK = "hhqqi"  # the structure flock of fcntl, on 64-bit Linux
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that has none

log = logging.getLogger(__name__)


class HeldError(InputError):
    """Another process writes there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    since: str
    command: str

    @classmethod
    def of_this_process(cls) -> Holder:
        # Options may hold secrets, such as a storage's key: only the words before them.
        """Describe this process."""
        words = takewhile(lambda word: "=" not in word and "://" not in word, sys.argv[1:])
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            command=shlex.join(["siftclip", *words]),
        )

    def __str__(self) -> str:
        return f"by process {self.pid} on {self.host} since {self.since} ({self.command})"


class _HolderRecord(TypedDict):
    """A holder in JSON."""

    pid: Count
    host: Text
    since: Text
    command: Text


# Record locks do not keep a process from itself, and a process that closes any handle of the file
# gives its lock up: it must not even read it. A fork inherits the table, but not the locks.
_own: dict[str, Holder] = {}  # by the path of the lock's file


@contextmanager
def locked(
    path: Path, *, owner: str, ranks: Ranks | None = None, wait: bool = False
) -> Iterator[None]:
    """Keep other processes from what a lock stands for, inside the block.

    Args:
        path: the lock's file: `LOCK_NAME` in a folder, or `lock_beside` a file.
        owner: what is written, as the message calls it.
        ranks: that write together. The first holds the lock; all of them make this call.
        wait: until the other is done, instead of raising. What it waits for is logged.

    Raises:
        HeldError: another process holds it; the message says who, and since when.
        InputError: no file can be written there.
    """
    ranks, path = ranks or OneRank(), path.parent.resolve() / path.name
    start, warned = time.monotonic(), False
    while True:
        handle, state, words, fault = None, _FREE, "", None
        try:
            if ranks.rank == 0:
                handle, state, words = _take(path, owner)
        except WriteError as error:
            state, fault = _FAULT, error
        # the first rank decides for all, so that none waits where the others have ended
        state = int(ranks.sum(torch.tensor(state)))
        if state == _FREE:
            break
        if state == _FAULT:
            raise fault or InputError(f"{owner} cannot be written: see the first rank.")
        if not wait:
            raise HeldError(
                f"{owner} is being written {words or 'by another command'}. Wait for it or end it, "
                f"or write elsewhere. If its machine has crashed, delete {path}."
            )
        if not warned and ranks.rank == 0 and time.monotonic() - start > PATIENCE_SECONDS:
            log.warning("%s is being written %s: waiting for it", owner, words)
            warned = True
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        if handle is not None:
            _give_back(path, handle)


def lock_beside(path: Path) -> Path:
    """Return the path of the lock of a file."""
    return path.with_name(f".{path.name}.lock")


def describe_holder(path: Path) -> str:
    """Say who holds a lock, as its file tells: "by process PID on HOST since TIME (COMMAND)"."""
    try:
        return str(Holder(**read_record(path, _HolderRecord)))
    except (InputError, TypeError):  # it is just writing it, or just gone
        return "by another process"


def lock_holder(path: Path) -> str | None:
    """Say which process holds a lock, without touching it: see `describe_holder`; None: nobody.

    A lock that cannot be asked for, as where its file cannot be read, counts as held.
    """
    path = path.parent.resolve() / path.name
    name = str(path)
    if name in _own and _own[name].pid == os.getpid():
        return str(_own[name])
    try:
        handle = open_handle(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return "by another process"
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(handle, fcntl.F_GETLK, asked)
        is_free = struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK
    except OSError as error:
        is_free = error.errno in WITHOUT_LOCKS
    finally:
        os.close(handle)
    return None if is_free else describe_holder(path)


def _take(path: Path, owner: str) -> tuple[int | None, int, str]:
    """Take a lock: the open file with it, the state, and words about what is in the way.

    Raises:
        WriteError: its file cannot be written.
        InputError: it is something else than a file.
    """
    name = str(path)
    if name in _own and _own[name].pid == os.getpid():
        return None, _HELD, str(_own[name])
    while True:
        with writing_to(path, owner):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise InputError(f"{path} is no file, which a lock must be. Delete it, and go on.")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:  # EAGAIN or EACCES: POSIX allows both
                os.close(handle)
                return None, _HELD, describe_holder(path)
            log.warning(
                "%s: this file system has no locks (%s), so nothing keeps two commands apart there",
                path.parent,
                error.strerror,
            )
        if _is_at(path, handle):
            break
        os.close(handle)  # its holder has deleted the file meanwhile
    holder = Holder.of_this_process()
    try:
        with writing_to(path, owner):
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps(asdict(holder)) + "\n").encode(), 0)
    except WriteError:
        _give_back(path, handle)
        raise
    _own[name] = holder
    return handle, _FREE, ""


def _give_back(path: Path, handle: int) -> None:
    _own.pop(str(path), None)
    try:
        if _is_at(path, handle):
            path.unlink(missing_ok=True)  # before the lock is free: see `_take`
    except OSError:  # the folder may be read-only by now; a file that nobody locks holds nothing
        log.debug("%s cannot be deleted", path)
    finally:
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
