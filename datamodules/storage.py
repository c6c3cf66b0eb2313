"""Where a pool's tars are: a local folder, or any fsspec URL read by ranges.

Both kinds give the same four things: the list of tars, one tar as a sequence for the index, ranges
of bytes for the stream, and the pool's metadata files. They pickle without their connections, which
every process opens for itself.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from siftclip.datamodules.tar_walk import LocalTar, TarSource
from siftclip.selectors.errors import InputError

METADATA_SUFFIXES = (".parquet", ".npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One tar of a pool."""

    name: str  # without folders
    path: str  # as its storage reads it
    size_bytes: int
    stamp: str  # another one when the file has changed: its time of change, or its ETag

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.removesuffix(".tar")


class Span(NamedTuple):
    """A range of bytes of a tar."""

    shard: ShardFile
    start_bytes: int
    end_bytes: int


class StorageError(Exception):
    """A range could not be read; the message is the cause, worded to follow a count."""


class Storage(Protocol):
    """What a pool needs of the place where it is."""

    @property
    def root(self) -> str:
        """The folder or URL, as the user gave it."""

    @property
    def max_gap_bytes(self) -> int:
        """Up to this gap, reading two ranges as one is cheaper than reading them apart."""

    @property
    def retries(self) -> int:
        """How many reads this process has repeated."""

    @property
    def cache_limit_bytes(self) -> int | None:
        """Up to how much is kept as whole tars, which are all that is read; None for ranges."""

    def shards(self) -> tuple[ShardFile, ...]:
        """The tars, in the order of their names."""

    def open_tar(self, shard: ShardFile) -> AbstractContextManager[TarSource]:
        """One tar, to be read from its beginning to its end."""

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | StorageError]:
        """The bytes of ranges, in order: fewer where a tar ends, a StorageError where they fail."""

    def metadata(self, suffixes: tuple[str, ...] = METADATA_SUFFIXES) -> Path:
        """A local folder with the pool's parquet and npz files, at least those with a suffix."""

    def close(self) -> None:
        """Close what this process has open. Reading again opens it anew."""


def default_cache(root: str) -> Path:
    """Where what is derived from a pool is kept: inside it if it can be written, else at home."""
    if not is_url(root) and os.access(root, os.W_OK):
        return Path(root) / ".siftclip"
    place = root if is_url(root) else str(Path(root).resolve())
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "siftclip" / name


def is_url(root: str) -> bool:
    """Whether `root` names a place that fsspec reads, such as `s3://bucket/pool`."""
    scheme, separator, _ = root.partition("://")
    return bool(separator) and scheme.replace("+", "").isalnum() and len(scheme) > 1


class LocalStorage:
    """Tars in a local folder: `root/shards` (DataComp), else `root` itself."""

    # Below this, one larger read of the page cache costs less than a second call.
    max_gap_bytes = 16 << 10
    retries = 0  # a local disk is not asked twice
    cache_limit_bytes = None

    def __init__(self, root: str) -> None:
        """Look at nothing yet: `shards` does."""
        self.root = root
        self._files = OpenFiles()

    def __getstate__(self) -> str:
        return self.root

    def __setstate__(self, root: str) -> None:
        self.__init__(root)  # type: ignore[misc]  # as unpickling a class of one argument does

    def shards(self) -> tuple[ShardFile, ...]:
        """See `Storage`.

        Raises:
            InputError: there is no such folder, or no tar in it.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise InputError(f"pool.root must be an existing folder or a URL. Got {self.root!r}.")
        paths = sorted(root.glob("shards/*.tar")) or sorted(root.glob("*.tar"))
        if not paths:
            raise InputError(
                f"pool.root={self.root!r} must hold webdataset tars (*.tar), there or in shards/. "
                "It holds none."
            )
        return tuple(_local_shard(path) for path in paths)

    def open_tar(self, shard: ShardFile) -> LocalTar:
        return LocalTar(shard.path)

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | StorageError]:
        yield from self._files.read([(span.shard.path, *span[1:]) for span in spans])

    def metadata(self, suffixes: tuple[str, ...] = METADATA_SUFFIXES) -> Path:
        """See `Storage`: `root/metadata` (DataComp), else the folder of the tars."""
        folder = Path(self.root) / "metadata"
        return folder if folder.is_dir() else Path(self.shards()[0].path).parent

    def close(self) -> None:
        self._files.close()


def _local_shard(path: Path) -> ShardFile:
    try:
        status = path.stat()
    except OSError as error:  # a dangling link, for one
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    return ShardFile(
        name=path.name,
        path=str(path),
        size_bytes=status.st_size,
        stamp=f"{status.st_size} {status.st_mtime_ns}",
    )


def _max_open_files() -> int:
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except ImportError:  # not on Windows
        return 256
    return 4096 if soft < 0 else max(64, min(4096, soft // 2))


class OpenFiles:
    """Reads ranges of local files and keeps the files open, those used last."""

    def __init__(self, most: int | None = None) -> None:
        """Open nothing yet; never more than `most` files, by default half of what is allowed."""
        self._files: OrderedDict[str, int] = OrderedDict()
        self._process = -1
        self._most = _max_open_files() if most is None else most

    def read(self, spans: Sequence[tuple[str, int, int]]) -> Iterator[bytes | StorageError]:
        """The bytes of (path, start, end), read one after the other as they are asked for.

        The system is told of all of them first, so that a cold disk works on many at once and
        while the first ones are decoded.
        """
        if self._process != os.getpid():  # a forked worker must not share file positions
            self._files, self._process = OrderedDict(), os.getpid()
        if len(spans) > 1 and hasattr(os, "posix_fadvise"):
            for path, start, end in spans:
                file = self._open(path)
                if isinstance(file, int):
                    os.posix_fadvise(file, start, end - start, os.POSIX_FADV_WILLNEED)
        for path, start, end in spans:
            file = self._open(path)
            yield file if isinstance(file, StorageError) else _pread(file, start, end)

    def _open(self, path: str) -> int | StorageError:
        file = self._files.get(path)
        if file is not None:
            self._files.move_to_end(path)
            return file
        if len(self._files) >= self._most:
            os.close(self._files.popitem(last=False)[1])
        try:
            file = self._files[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            return StorageError(f"in a tar that cannot be opened ({error.strerror})")
        return file

    def close(self) -> None:
        """Close the files of this process."""
        if self._process == os.getpid():
            for file in self._files.values():
                os.close(file)
        self._files = OrderedDict()


def _pread(file: int, start: int, end: int) -> bytes | StorageError:
    try:
        return os.pread(file, end - start, start)
    except OSError as error:
        return StorageError(f"in a tar that cannot be read ({error.strerror})")
