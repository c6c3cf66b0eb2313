"""Where a pool's tars are: a local folder, or any fsspec URL read by ranges.

Both kinds give the same four things: the list of tars, one tar as a sequence for the index, ranges
of bytes for the stream, and the pool's metadata files. They pickle without their connections, which
every process opens for itself.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from siftclip.confidential import ConfidentialUrl
from siftclip.datamodules.index.tar_walk import LocalTar, TarSource
from siftclip.datamodules.storage.folders import explain_no_folder, explain_no_tars
from siftclip.errors import InputError, ParameterError
from siftclip.file_identity import FileIdentity
from siftclip.files import write_json
from siftclip.reading import open_handle
from siftclip.records import read_record
from siftclip.writing import WriteError

METADATA_SUFFIXES = (".parquet", ".npz")
_PROBES_NAME = "probes.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One tar of a pool."""

    name: str  # without folders
    path: str  # as its storage reads it
    size_bytes: int
    stamp: str  # another one when the file has changed: its time of change, or its ETag
    identity: FileIdentity | None = None  # of a local file, see `identify_shards`
    version: tuple[str, str] = ("", "")  # of a remote file: a field such as ETag, and its value

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


class ChangedError(StorageError):
    """A file is another one than when the pool was opened, so places in it mean nothing."""

    def __init__(self) -> None:
        super().__init__("in a tar that has changed since the pool was opened")


def changed_file_error(path: str) -> InputError:
    """Return the error that tells the user of a file that has changed."""
    return InputError(
        f"{path} has changed since the pool was opened, so the places of its samples are not "
        "known. Start again when nothing writes to it: what has changed is indexed again, by this "
        "command or by siftclip index."
    )


class Storage(Protocol):
    """What a pool needs of the place where it is."""

    @property
    def root(self) -> str:
        """The folder or URL, as a `ConfidentialUrl` where it may have credentials."""

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
        """List the tars, in the order of their names."""

    def open_tar(self, shard: ShardFile) -> AbstractContextManager[TarSource]:
        """Open one tar, to be read from its beginning to its end."""

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | StorageError]:
        """Yield the bytes of ranges, in order: fewer where a tar ends, StorageErrors for failures.

        A ChangedError stands for those of a file that is not the one of its `ShardFile`.
        """

    def metadata(self, suffixes: tuple[str, ...] = METADATA_SUFFIXES) -> Path:
        """Return a local folder with the pool's parquet and npz files, at least of the suffixes."""

    def close(self) -> None:
        """Close what this process has open. Reading again opens it anew."""


def default_cache(root: str) -> Path:
    """Return where to keep what is derived from a pool: inside it if writable, else at home."""
    if not is_url(root) and os.access(root, os.W_OK):
        return Path(root) / ".siftclip"
    place = ConfidentialUrl(root).place if is_url(root) else str(Path(root).resolve())
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "siftclip" / name


def is_url(root: str) -> bool:
    """Return whether `root` names a place that fsspec reads, such as `s3://bucket/pool`."""
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
        """List the tars, see `Storage`.

        Raises:
            InputError: there is no such folder, or no tar in it.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise ParameterError(
                "must be an existing folder or a URL",
                parameter="root",
                value=self.root,
                way_out=explain_no_folder(root),
            )
        paths = sorted(root.glob("shards/*.tar")) or sorted(root.glob("*.tar"))
        if not paths:
            raise ParameterError(
                "must hold webdataset tars (*.tar), in this folder or its shards/",
                parameter="root",
                value=self.root,
                way_out=explain_no_tars(root),
            )
        return tuple(_local_shard(path) for path in paths)

    @contextmanager
    def open_tar(self, shard: ShardFile) -> Iterator[LocalTar]:
        """Open one tar, see `Storage`.

        Raises:
            InputError: it cannot be opened, or has changed before it was closed.
        """
        with LocalTar(shard.path) as tar:
            yield tar
            if shard.identity is not None and not shard.identity.is_of(tar.fileno()):
                raise changed_file_error(shard.path)

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | StorageError]:
        yield from self._files.read([(s.shard.path, *s[1:], s.shard.identity) for s in spans])

    def metadata(self, suffixes: tuple[str, ...] = METADATA_SUFFIXES) -> Path:
        """Return `root/metadata` (DataComp), else the folder of the tars; see `Storage`.

        Also that beside a root which is the `shards` of a DataComp pool.
        """
        root = Path(self.root)
        places = [root, root.absolute().parent] if root.absolute().name == "shards" else [root]
        folders = (place / "metadata" for place in places)
        beside_tars = Path(self.shards()[0].path).parent
        return next((folder for folder in folders if folder.is_dir()), beside_tars)

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
        identity=FileIdentity(
            size_bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            inode=status.st_ino,
            probe="",
        ),
    )


def identify_shards(shards: Sequence[ShardFile], folder: Path) -> tuple[ShardFile, ...]:
    """Add the hashes of their probes to tars, which tell apart files of equal sizes and times.

    Args:
        shards: of a storage. Those that are not local are returned as they are.
        folder: keeps the hashes, by name and inode, so that only new files are read.

    Raises:
        InputError: a tar cannot be read.
    """
    path = folder / _PROBES_NAME
    known: dict[str, list[str | int]] = {}
    with suppress(InputError):  # a cache is only a cache
        known = read_record(path, dict[str, list[str | int]]) if path.is_file() else {}
    probes: dict[str, list[str | int]] = {}
    identified = []
    for shard in shards:
        if shard.identity is not None:
            place: list[str | int] = [shard.stamp, shard.identity.inode]
            *same, probe = known.get(shard.name) or [""]
            if same != place or not isinstance(probe, str):
                probe = FileIdentity.of(shard.path).probe
            probes[shard.name] = [*place, probe]
            identity = replace(shard.identity, probe=probe)
            shard = replace(shard, stamp=f"{shard.stamp} {probe}", identity=identity)
        identified.append(shard)
    if probes != known:
        with suppress(WriteError):  # an index that others have made may be there to read only
            write_json(path, probes)
    return tuple(identified)


def _max_open_files() -> int:
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except ImportError:  # not on Windows
        return 256
    return 4096 if soft < 0 else max(64, min(4096, soft // 2))


class OpenFiles:
    """Reads ranges of local files and keeps the files open, those used last.

    A file that is open stays the one it was when another takes its name. Written to in place, its
    size or time is another one, which is looked at behind each read.
    """

    def __init__(self, most: int | None = None) -> None:
        """Open nothing yet; never more than `most` files, by default half of what is allowed."""
        self._files: OrderedDict[str, int] = OrderedDict()
        self._process = -1
        self._most = _max_open_files() if most is None else most

    def read(
        self, spans: Sequence[tuple[str, int, int, FileIdentity | None]]
    ) -> Iterator[bytes | StorageError]:
        """Yield the bytes of (path, start, end, identity), read one by one as they are asked for.

        An identity that is not the file's gives a ChangedError; None is not checked.

        The system is told of all of them first, so that a cold disk works on many at once and
        while the first ones are decoded.
        """
        if self._process != os.getpid():  # a forked worker must not share file positions
            self._files, self._process = OrderedDict(), os.getpid()
        if len(spans) > 1 and hasattr(os, "posix_fadvise"):
            for path, start, end, _ in spans:
                file = self._open(path)
                if isinstance(file, int):
                    os.posix_fadvise(file, start, end - start, os.POSIX_FADV_WILLNEED)
        for path, start, end, identity in spans:
            file = self._open(path)
            yield file if isinstance(file, StorageError) else _pread(file, start, end, identity)

    def _open(self, path: str) -> int | StorageError:
        file = self._files.get(path)
        if file is not None:
            self._files.move_to_end(path)
            return file
        if len(self._files) >= self._most:
            os.close(self._files.popitem(last=False)[1])
        try:
            file = self._files[path] = open_handle(path)
        except OSError as error:
            return StorageError(f"in a tar that cannot be opened ({error.strerror})")
        return file

    def close(self) -> None:
        """Close the files of this process."""
        if self._process == os.getpid():
            for file in self._files.values():
                os.close(file)
        self._files = OrderedDict()


def _pread(file: int, start: int, end: int, identity: FileIdentity | None) -> bytes | StorageError:
    try:
        data = os.pread(file, end - start, start)
        return data if identity is None or identity.is_of(file) else ChangedError()
    except OSError as error:
        if error.errno == errno.ESTALE:  # what NFS says of a file that was replaced at its server
            return ChangedError()
        return StorageError(f"in a tar that cannot be read ({error.strerror})")
