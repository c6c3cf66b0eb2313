"""Whole tars of a remote pool on the local disk, up to a limit; those used least recently go."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock

from siftclip.datamodules.storage.local import ShardFile
from siftclip.errors import ParameterError
from siftclip.locks import WITHOUT_LOCKS
from siftclip.writing import WriteError, atomic_path, delete_file, make_folder

_COPIES = f"*-{'[0-9a-f]' * 12}.tar"  # other tars in the folder are not ours to delete


class ShardCache:
    """Copies of tars in a folder. Several processes may share it.

    What is being fetched or read at the moment, one tar a process, comes on top of the limit.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        """Take a folder.

        Args:
            folder: of the copies; what was there before counts and is reused.
            limit_bytes: of all copies together.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes

    def fetch(self, shard: ShardFile, download: Callable[[Path], None]) -> Path:
        """Return the copy of a tar, made by `download(path)` if there is none.

        Raises:
            ParameterError: the tar alone is larger than the limit.
            WriteError: no copy can be kept.
        """
        path = self._path(shard)
        if self._is_whole(path, shard):
            return path
        if shard.size_bytes > self.limit_bytes:
            raise ParameterError(
                f"must hold at least one tar. {shard.name} has {shard.size_bytes / 1e9:.3f} GB, "
                f"the cache {self.limit_bytes / 1e9:.3f} GB",
                parameter="shard_cache_gb",
            )
        # of this tar: others are fetched at the same time
        with _lock(path.with_name(f"{path.name}.lock")) as is_ours:
            if self._is_whole(path, shard):
                return path
            if is_ours:
                for left in self.folder.glob(f".{escape(path.name)}.*.tmp"):
                    delete_file(left)  # by a process that was killed
            with ExitStack() as room, atomic_path(path) as temporary:
                download(temporary)
                # kept until the copy has its name, so that the limit holds at any time
                room.enter_context(_lock(self.folder / "room.lock"))
                self._make_room(shard.size_bytes)
                self._touch(temporary)
        return path

    def holds(self, shard: ShardFile) -> bool:
        """Return whether there is a copy of a tar."""
        return self._path(shard).exists()

    def _path(self, shard: ShardFile) -> Path:
        digest = hashlib.sha256(f"{shard.path} {shard.stamp}".encode()).hexdigest()[:12]
        return self.folder / f"{shard.stem}-{digest}.tar"

    def _is_whole(self, path: Path, shard: ShardFile) -> bool:
        """Check whether there is a copy that nobody has cut; it then counts as used now."""
        return self._touch(path) and path.stat().st_size == shard.size_bytes

    @staticmethod
    def _touch(path: Path) -> bool:
        try:
            now = time.time_ns()  # the system's own stamps are milliseconds apart
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            return False
        except OSError:  # it belongs to somebody else, or all of the disk is read-only
            return path.is_file()
        return True

    def _make_room(self, size_bytes: int) -> None:
        copies = sorted((s.st_mtime_ns, s.st_size, p) for p, s in _copies(self.folder))
        total = sum(size for _, size, _ in copies)
        for _, size, path in copies:
            if total + size_bytes <= self.limit_bytes:
                break
            delete_file(path)
            total -= size


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Keep other processes and threads out; False where the file system has no locks.

    Then two may copy the same tar, each to a name of its own, and pass the limit by some tars.

    Raises:
        WriteError: no file can be written there.
    """
    make_folder(path.parent)
    lock = FileLock(path)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise WriteError(path, error.errno or errno.EIO, "A copy of a tar") from error
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _copies(folder: Path) -> list[tuple[Path, os.stat_result]]:
    copies = []
    for path in folder.glob(_COPIES):
        try:
            copies.append((path, path.stat()))
        except FileNotFoundError:  # another process made room
            continue
    return copies
