"""Which file it was that places were found in, to notice when they are used on another one.

A file is known by its size, the time of its last change and its inode. Copies of a pool, and some
network file systems, give the same file another inode; then a few blocks of its bytes decide.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from siftclip.errors import InputError
from siftclip.reading import open_handle

START_AGAIN = "Start again when nothing writes to it."  # a way out
_PROBES = 8
_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """A local file at one time."""

    size_bytes: int
    modified_ns: int
    inode: int = field(compare=False)  # the same file has another one on another mount
    probe: str  # a hash of blocks that are spread over the file

    @classmethod
    def of(cls, path: Path | str) -> FileIdentity:
        """Identify a file as it is now.

        Raises:
            InputError: it cannot be read.
        """
        try:
            file = open_handle(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        try:
            status = os.fstat(file)
            return cls(
                size_bytes=status.st_size,
                modified_ns=status.st_mtime_ns,
                inode=status.st_ino,
                probe=probe(file, status.st_size),
            )
        except OSError as error:  # of a disk
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        finally:
            os.close(file)

    def is_of(self, file: int) -> bool:
        """Return whether an open file is this one, and has not changed. Costs one fstat."""
        status = os.fstat(file)
        if status.st_mtime_ns != self.modified_ns or status.st_size != self.size_bytes:
            return False
        return status.st_ino == self.inode or probe(file, status.st_size) == self.probe

    def stamp(self, name: str) -> list[str | int]:
        """Return what stands for a file, with its name, in JSON: see `files.file_stamp`."""
        return [name, self.size_bytes, self.modified_ns, self.probe]

    def require(self, path: Path | str, way_out: str) -> None:
        """Check that what lies at a path is this file still. Costs one stat.

        Call it behind a read: then the bytes that came are of this file.

        Args:
            path: of the file.
            way_out: what to do, a sentence.

        Raises:
            InputError: it is another one, or has changed.
        """
        try:
            status = os.stat(path)
        except FileNotFoundError:  # whoever has it open or mapped still reads this file
            return
        is_same = (status.st_size, status.st_mtime_ns) == (self.size_bytes, self.modified_ns)
        if not is_same or (status.st_ino != self.inode and FileIdentity.of(path) != self):
            raise has_changed(path, way_out)


def has_changed(path: Path | str, way_out: str) -> InputError:
    """Return the error for a file that has changed since it was read; `way_out` is a sentence."""
    return InputError(f"{path} has changed since it was first read. {way_out}")


def probe(file: int, size_bytes: int) -> str:
    """Hash up to eight blocks of 4 KiB of an open file, the first and the last among them."""
    last = max(0, size_bytes - _PROBE_BYTES)
    digest = hashlib.blake2b(digest_size=8)
    for number in range(_PROBES):
        digest.update(os.pread(file, _PROBE_BYTES, last * number // (_PROBES - 1)))
    return digest.hexdigest()
