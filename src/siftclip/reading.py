"""Opening files that may be anything: each fault becomes one line that names the file.

What lies under a name may be a folder, a pipe that never ends, a chain of links, or larger than any
such file is. Libraries raise all sorts of errors for damaged bytes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from siftclip.errors import InputError

MAX_RECORD_BYTES = 1 << 26  # of a text or JSON; those of pools of billions are smaller
_ADDRESS = re.compile(r"<([\w.]+) object at 0x[0-9a-f]+>")
_MAX_REASON = 300  # characters of what a library says


def open_handle(path: Path | str) -> int:
    """Open a regular file to read it, and return its descriptor; never waits, as a pipe would.

    Raises:
        OSError: there is none, or it cannot be read, or it is something else.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a name with a zero byte
        raise OSError(errno.EINVAL, str(error)) from None
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, f"it is {_kind(mode)}, not a file")


def open_file(path: Path | str) -> BinaryIO:
    """Open a regular file to read its bytes, see `open_handle`.

    Raises:
        InputError: there is none, or it cannot be read, or it is something else.
    """
    try:
        return os.fdopen(open_handle(path), "rb")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}.") from None


def require_file(path: Path | str) -> None:
    """Raise InputError unless `path` is a regular file that can be read, see `open_file`."""
    open_file(path).close()


def read_bytes(path: Path | str, *, most: int = MAX_RECORD_BYTES) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        InputError: it is missing, too large, no file, or cannot be read.
    """
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > most else file.read(most + 1)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {reason_of(error)}.") from None
    if max(size, len(content)) > most:
        raise InputError(
            f"{path} has {max(size, len(content)):,} bytes. Such a file has at most {most:,}."
        )
    return content


def read_text(path: Path | str, *, most: int = MAX_RECORD_BYTES) -> str:
    """Read a file of UTF-8, without the mark that may stand at its start.

    Raises:
        InputError: it is missing, too large, no file, or not UTF-8.
    """
    try:
        return read_bytes(path, most=most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text: {error}.") from None


@contextmanager
def readable(path: Path | str, kind: str) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file into an InputError that names it.

    Wrap calls of the library alone: a fault of our own code would be taken for the file's.

    Args:
        path: of the file.
        kind: what it should be, such as "npz file".
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is not a readable {kind}: {reason_of(error)}.") from None


def in_one_line(error: BaseException) -> str:
    """Return the text of an exception without its line breaks."""
    return " ".join(str(error).split())


def reason_of(error: Exception) -> str:
    """Say in one line, without a stop at its end, what an error of a library is about."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = _ADDRESS.sub(r"<\1>", in_one_line(error).rstrip("."))
    if isinstance(error, MemoryError) and not words:
        words = "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        words = "it is nested too deeply"
    if len(words) > _MAX_REASON:
        words = f"{words[:_MAX_REASON]}..."
    return words if words and not isinstance(error, KeyError) else _named(error, words)


def _named(error: Exception, words: str) -> str:
    return f"{type(error).__name__} {words}".rstrip()


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"
