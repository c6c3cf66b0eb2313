"""Standard streams that fail without taking the command along.

A run shall not end because nobody can read what it says: the disk of its log is full, or the
terminal is gone. What was to be the result of a command must not be lost in silence, either.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _LastingFile(io.FileIO):
    """A stream that counts as written what it cannot write, and keeps why in `fault`."""

    fault: OSError | None = None

    def __init__(self, descriptor: int, *, keeps_pipe_errors: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._keeps_pipe_errors = keeps_pipe_errors

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # any bytes-like, as FileIO
        try:
            return super().write(data)
        except BrokenPipeError as error:
            if not self._keeps_pipe_errors:
                raise
            self.fault = error
        except OSError as error:
            self.fault = error
        return memoryview(data).nbytes


def make_streams_last() -> None:
    """Replace the standard streams of this process, where they are its own.

    A closed one becomes the null device: the next file that is opened would take its number, and
    get what a library prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(sys.stdout, 1, keeps_pipe_errors=False)  # `| head` ends the command
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(sys.stderr, 2, keeps_pipe_errors=True)


def fault_of_output() -> OSError | None:
    """Return why not all of the standard output could be written; None if it could."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.fault if isinstance(raw, _LastingFile) else None


def _lasting(stream: TextIO | None, descriptor: int, *, keeps_pipe_errors: bool) -> TextIO:
    raw = _LastingFile(descriptor, keeps_pipe_errors=keeps_pipe_errors)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors=getattr(stream, "errors", None) or "backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
        write_through=bool(getattr(stream, "write_through", False)),
    )
