"""Tars behind an fsspec URL (s3, gs, hf, http, ...): range reads, repeated when they fail.

A server that does not answer range requests cannot give single samples. Its tars are then copied
whole, each in one sequential read, into a `ShardCache`, and read from there.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
from braceexpand import braceexpand
from fsspec.asyn import AsyncFileSystem, sync
from tqdm import tqdm

from siftclip.datamodules.files import atomic_path, read_json, write_json
from siftclip.datamodules.shard_cache import ShardCache
from siftclip.datamodules.storage import (
    METADATA_SUFFIXES,
    OpenFiles,
    ShardFile,
    Span,
    StorageError,
)
from siftclip.datamodules.tar_walk import LocalTar, TarSource
from siftclip.selectors.errors import InputError

log = logging.getLogger(__name__)

ATTEMPTS = 6  # with the pauses below, a server may be away for 8 seconds
FIRST_PAUSE_SECONDS = 0.25  # doubled after every attempt
READ_TIMEOUT_SECONDS = 120.0  # of one attempt at a group of ranges
CONCURRENT_READS = 64
GROUP_BYTES = 64 << 20  # fetched together and held in memory
BLOCK_BYTES = 8 << 20  # of a tar that is read from its beginning to its end
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)
# Where file systems tell that a file is another one: S3, HTTP, GCS, SFTP and local, Hugging Face.
_STAMP_FIELDS = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime", "blob_id")


class RemoteStorage:
    """Tars behind a URL; see `siftclip.datamodules.storage.Storage`.

    The URL names a folder with the tars, there or in `shards/`, or with braces the tars themselves
    (`http://host/pool/{00000..00127}.tar`), which servers without listings need.
    """

    # A request takes as long as the transfer of some hundred kilobytes.
    max_gap_bytes = 256 << 10

    def __init__(
        self, root: str, *, options: Mapping[str, Any], cache: ShardCache | None, folder: Path
    ) -> None:
        """Connect to nothing yet.

        Args:
            root: the URL.
            options: of the file system, such as `anon` or `endpoint_url` for s3fs.
            cache: keeps whole tars on the local disk; None reads ranges from the server each time.
            folder: local, for copies of metadata files, and of tars if nothing else is possible.
        """
        self.root = root
        self.retries = 0
        self._options = dict(options)
        self._cache = cache
        self._folder = folder
        self._files = OpenFiles(most=16)  # a file that is open keeps its space when it is deleted
        self._connection: Any = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        unshared = {"_connection": None, "_process": -1, "retries": 0}
        return {**self.__dict__, **unshared, "_files": OpenFiles(most=16)}

    @property
    def _filesystem(self) -> Any:
        if self._process != os.getpid():  # connections do not survive a fork
            self._connection, self._process = self._connect(), os.getpid()
        return self._connection

    def _connect(self) -> Any:
        try:
            filesystem, _ = fsspec.core.url_to_fs(
                next(iter(braceexpand(self.root))), skip_instance_cache=True, **self._options
            )
        except (ImportError, ValueError, TypeError) as error:
            raise InputError(
                f"pool.root={self.root!r} with pool.storage_options={self._options} cannot be "
                f"read by fsspec: {error}."
            ) from None
        return filesystem

    def shards(self) -> tuple[ShardFile, ...]:
        """See `Storage`. A server without range requests is found out here.

        Raises:
            InputError: the server does not answer, or has no tars.
        """
        try:
            if "{" in self.root:
                strip = self._filesystem._strip_protocol
                found = self._describe([{"name": strip(url)} for url in braceexpand(self.root)])
            else:
                found = self._list(["shards/"], (".tar",)) or self._list([""], (".tar",))
        except Exception as error:  # every file system raises its own
            raise InputError(
                f"pool.root={self.root!r} cannot be listed: {type(error).__name__}: {error}. A "
                "server without listings needs the names: URL/{00000..00127}.tar"
            ) from None
        if not found:
            raise InputError(
                f"pool.root={self.root!r} must hold webdataset tars (*.tar), there or in shards/. "
                "It holds none. A server without listings needs the names: URL/{00000..00127}.tar"
            )
        if self._cache is None and not self._answers_ranges(found[0]):
            self._cache = self._cache_for_all(found)
        return tuple(found)

    def _list(self, folders: Sequence[str], suffixes: tuple[str, ...]) -> list[ShardFile]:
        """The files with these suffixes in folders below the root; "" is the root itself."""
        filesystem = self._filesystem
        base = filesystem._strip_protocol(self.root).rstrip("/")
        infos: list[dict[str, Any]] = []
        for folder in folders:
            try:
                listed = filesystem.ls(f"{base}/{folder}", detail=True)
            except FileNotFoundError:
                continue
            infos += [info for info in listed if str(info["name"]).endswith(suffixes)]
        return self._describe(infos)

    def _describe(self, infos: Sequence[dict[str, Any]]) -> list[ShardFile]:
        """Files with size and stamp. Listings over HTTP lack them, and each file is asked for."""
        filesystem = self._filesystem

        def describe(info: dict[str, Any]) -> ShardFile:
            path = str(info["name"])
            if info.get("size") is None:
                info = self._patiently(lambda: filesystem.info(path))
            stamp = next((str(info[f]) for f in _STAMP_FIELDS if info.get(f) is not None), "")
            return ShardFile(
                name=unquote(path.rsplit("/", 1)[-1]),
                path=path,
                size_bytes=int(info["size"]),
                stamp=f"{info['size']} {stamp}",
            )

        with ThreadPoolExecutor(16) as threads:
            return sorted(threads.map(describe, infos), key=lambda file: file.name)

    def _patiently(self, read: Callable[[], Any]) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return read()
            except _PERMANENT:
                raise
            except Exception:  # every file system raises its own
                if attempt == ATTEMPTS - 1:
                    raise
                self._pause(attempt)

    def _pause(self, attempt: int) -> None:
        self.retries += 1
        time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)

    def _answers_ranges(self, shard: ShardFile) -> bool:
        """Whether two bytes can be had without the rest; HTTP servers may send all of the file."""
        filesystem = self._filesystem
        if not hasattr(filesystem, "set_session"):  # every other kind seeks, or says that it cannot
            try:
                return len(filesystem.cat_file(shard.path, start=0, end=2)) == 2
            except (NotImplementedError, ValueError, OSError):
                return False

        async def ask() -> bool:
            session = await filesystem.set_session()
            options = {**filesystem.kwargs}
            options["headers"] = {**options.get("headers", {}), "Range": "bytes=0-1"}
            async with session.get(filesystem.encode_url(shard.path), **options) as answer:
                answer.raise_for_status()
                return answer.status == 206

        return bool(self._patiently(lambda: sync(filesystem.loop, ask)))

    def _cache_for_all(self, shards: Sequence[ShardFile]) -> ShardCache:
        total = sum(shard.size_bytes for shard in shards)
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        cost = (
            f"{self.root} does not answer range requests: to reach a sample, its whole tar is read "
            f"in sequence, {total / 1e9:.2f} GB for the whole pool whatever is selected"
        )
        if total > 0.9 * free:
            raise InputError(
                f"{cost}, which do not fit on the disk of {self._folder} ({free / 1e9:.2f} GB "
                "free). Limit what is kept with pool.shard_cache_gb=..., and read neighbours "
                "together with data.shuffle_window_shards=..."
            )
        log.warning("%s. The tars are kept in %s.", cost, self._folder / "shards")
        return ShardCache(self._folder / "shards", limit_bytes=total)

    @contextmanager
    def open_tar(self, shard: ShardFile) -> Iterator[TarSource]:
        """See `Storage`."""
        if self._cache is not None:
            with LocalTar(self._local(shard)) as tar:
                yield tar
        else:
            yield _SequentialTar(self, shard)

    def _local(self, shard: ShardFile) -> str:
        """The copy of a tar in the cache.

        Raises:
            StorageError: it cannot be fetched.
        """
        if self._cache is None:
            raise RuntimeError("only called with a cache")

        def download(path: Path) -> None:
            try:
                self._download(shard, path)
            except InputError:
                raise StorageError("in a tar that could not be copied") from None

        return str(self._cache.fetch(shard, download))

    def _download(self, file: ShardFile, path: Path) -> None:
        try:
            self._patiently(lambda: self._filesystem.get_file(file.path, str(path)))
        except Exception as error:  # every file system raises its own
            raise InputError(f"{file.path} cannot be copied: {_cause(error)}.") from None
        if path.stat().st_size != file.size_bytes:
            raise InputError(
                f"{file.path} has changed: {path.stat().st_size} bytes, not {file.size_bytes}."
            )

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | StorageError]:
        """See `Storage`."""
        if self._cache is not None:
            for span in spans:
                try:
                    path = self._local(span.shard)
                except StorageError as error:
                    yield error
                else:
                    yield from self._files.read([(path, span.start_bytes, span.end_bytes)])
            return
        group: list[Span] = []
        size = 0
        for span in spans:
            length = span.end_bytes - span.start_bytes
            if group and size + length > GROUP_BYTES:
                yield from self.fetch(group)
                group, size = [], 0
            group.append(span)
            size += length
        yield from self.fetch(group)

    def fetch(self, spans: Sequence[Span]) -> list[bytes | StorageError]:
        """Read some ranges at once; those that fail again, after a pause that grows."""
        answers: list[bytes | StorageError] = [StorageError("never read")] * len(spans)
        todo = list(range(len(spans)))
        for attempt in range(ATTEMPTS):
            failed = []
            for index, answer in zip(todo, self._try([spans[i] for i in todo]), strict=True):
                span = spans[index]
                if isinstance(answer, bytes):
                    if len(answer) == span.end_bytes - span.start_bytes:
                        answers[index] = answer
                        continue
                    answer = OSError(f"{len(answer)} bytes came")
                answers[index] = StorageError(_cause(answer))
                if not isinstance(answer, _PERMANENT):
                    failed.append(index)
            todo = failed
            if not todo:
                break
            if attempt < ATTEMPTS - 1:
                self._pause(attempt)
        return answers

    def _try(self, spans: Sequence[Span]) -> Sequence[bytes | Exception]:
        filesystem = self._filesystem
        columns = (
            [span.shard.path for span in spans],
            [span.start_bytes for span in spans],
            [span.end_bytes for span in spans],
        )
        try:
            if not isinstance(filesystem, AsyncFileSystem):
                return list(filesystem.cat_ranges(*columns, on_error="return"))
            return list(
                sync(
                    filesystem.loop,
                    filesystem._cat_ranges,
                    *columns,
                    batch_size=CONCURRENT_READS,
                    on_error="return",
                    timeout=READ_TIMEOUT_SECONDS,
                )
            )
        except Exception as error:  # the time-out, or what a file system does not return
            return [error] * len(spans)

    def metadata(self, suffixes: tuple[str, ...] = METADATA_SUFFIXES) -> Path:
        """See `Storage`. Files are copied when they are new or have changed."""
        folder = self._folder / "metadata"
        known = folder / "copies.json"
        stamps = read_json(known) if known.exists() else {}
        files = [] if "{" in self.root else self._list(["metadata/"], suffixes)
        files = files or ([] if "{" in self.root else self._list(["", "shards/"], suffixes))
        todo = [file for file in files if stamps.get(file.name) != file.stamp]
        for file in tqdm(todo, desc="copy metadata", unit="file", leave=False):
            with atomic_path(folder / file.name) as temporary:
                self._download(file, temporary)
            stamps[file.name] = file.stamp
            write_json(known, stamps)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def close(self) -> None:
        """See `Storage`."""
        self._files.close()


class _SequentialTar:
    """A remote tar, read in blocks."""

    def __init__(self, storage: RemoteStorage, shard: ShardFile) -> None:
        self.name = shard.path
        self.size_bytes = shard.size_bytes
        self._storage, self._shard = storage, shard

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        end = min(offset_bytes + max(size_bytes, BLOCK_BYTES), self.size_bytes)
        if end <= offset_bytes:
            return b""
        (answer,) = self._storage.fetch([Span(self._shard, offset_bytes, end)])
        if isinstance(answer, StorageError):
            raise InputError(f"{self.name} is {answer}.")
        return answer


def _cause(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "in a tar that is not there any more"
    if isinstance(error, PermissionError):
        return "in a tar that may not be read"
    return f"in a tar that could not be read in {ATTEMPTS} attempts ({type(error).__name__})"
