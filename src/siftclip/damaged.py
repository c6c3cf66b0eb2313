"""Kept results that are damaged: renamed, with a warning, so that the command makes them again.

A disk that was full, a power cut, a copy or a person may leave anything under a name: a part of a
file, a folder, a pipe. What can be made again never stops a command. What cannot, such as how far a
run is, is refused where it is read.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from siftclip.errors import InputError
from siftclip.writing import move

# A file that cannot be opened for one of these may be whole
_PASSING = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)

log = logging.getLogger(__name__)


@contextmanager
def set_aside_if_damaged(*paths: Path) -> Iterator[None]:
    """Suppress an InputError of the block, which reads some files, and set them aside.

    Args:
        paths: of files that are one result; those that are there are renamed.

    Raises:
        InputError: of the block, where one of the files cannot be opened now, which says nothing of
            its content.
        WriteError: one of them cannot be renamed.
    """
    try:
        yield
    except InputError as error:
        if any(map(_is_withheld, paths)):
            raise
        names = [aside.name for aside in map(set_aside, paths) if aside is not None]
        log.warning("%s It is made again; what was there is now %s", error.fault, ", ".join(names))


def set_aside(path: Path) -> Path | None:
    """Rename a file, or whatever lies under its name, to `NAME.damaged`; None if nothing does.

    Where that name is taken, `NAME.damaged-2`, and so on.
    """
    if not os.path.lexists(path):
        return None
    names = (f"{path.name}.damaged{'' if number == 1 else f'-{number}'}" for number in count(1))
    aside = next(other for other in map(path.with_name, names) if not os.path.lexists(other))
    move(path, aside)
    return aside


def _is_withheld(path: Path) -> bool:
    """Return whether a file cannot be opened for a reason that may pass."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in _PASSING
    return False
