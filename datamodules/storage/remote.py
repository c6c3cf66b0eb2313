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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.http import HTTPFileSystem

from siftclip.confidential import ConfidentialOptions, ConfidentialUrl
from siftclip.datamodules.index.tar_walk import LocalTar, TarSource
from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage.connections import (
    CONTENT_FIELDS,
    Answer,
    ConditionError,
    WholeFileError,
    connect,
    describe_error,
    fault_of_listing,
    is_permanent,
    read_ranges,
    real_error,
    require_version,
    version_of,
)
from siftclip.datamodules.storage.folders import describe_names
from siftclip.datamodules.storage.local import (
    METADATA_SUFFIXES,
    ChangedError,
    OpenFiles,
    ShardFile,
    Span,
    StorageError,
    changed_file_error,
)
from siftclip.datamodules.storage.shard_cache import ShardCache
from siftclip.datamodules.storage.whole_files import ask, copy_file
from siftclip.errors import InputError, ParameterError
from siftclip.files import has_content, write_json
from siftclip.progress import track
from siftclip.reading import in_one_line
from siftclip.records import read_record
from siftclip.writing import DISK_FULL, WriteError, atomic_path, delete_file, make_folder

log = logging.getLogger(__name__)

ATTEMPTS = 6  # with the pauses below, a server may be away for 8 seconds
FIRST_PAUSE_SECONDS = 0.25  # doubled after every attempt
GROUP_BYTES = 64 << 20  # fetched together and held in memory
BLOCK_BYTES = 8 << 20  # of a tar that is read from its beginning to its end
CHECK_SECONDS = 60.0  # a tar's version is asked for so often, where answers do not say it


class RemoteStorage:
    """Tars behind a URL; see `siftclip.datamodules.storage.local.Storage`.

    The URL names a folder with the tars, in it or its `shards/`, or with braces the tars themselves
    (`http://host/pool/{00000..00127}.tar`), which servers without listings need.
    """

    # A request takes as long as the transfer of some hundred kilobytes.
    max_gap_bytes = 256 << 10

    def __init__(
        self, root: str, *, options: Mapping[str, Any], cache: ShardCache | None, folder: Path
    ) -> None:
        """Connect to nothing yet.

        Args:
            root: the URL. The paths of its tars are without its credentials.
            options: of the file system, such as `anon` or `endpoint_url` for s3fs.
            cache: keeps whole tars on the local disk; None reads ranges from the server each time.
            folder: local, for copies of metadata files, and of tars if nothing else is possible.
        """
        self.root = ConfidentialUrl(root)
        self.retries = 0
        self._options = ConfidentialOptions(options)
        self._cache = cache
        self._folder = folder
        self._files = OpenFiles(most=1)  # a file that is open keeps its space when it is deleted
        self._failing: set[str] = set()  # paths of files whose last read has failed
        self._changed: set[ShardFile] = set()  # known to be no more, and not read to see it again
        self._checked: dict[ShardFile, float] = {}  # when their versions were asked for
        self._on_condition = True  # ask for a version; some servers cannot
        self._silent_seconds = 0.0  # in which next to nothing came
        self._connection: Any = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        unshared: dict[str, Any] = {
            "_connection": None,
            "_process": -1,
            "retries": 0,
            "_silent_seconds": 0.0,
            "_checked": {},
        }
        return {**self.__dict__, **unshared, "_files": OpenFiles(most=1)}

    @property
    def _filesystem(self) -> Any:
        if self._process != os.getpid():  # connections do not survive a fork
            self._connection, self._process = connect(self.root, self._options), os.getpid()
        return self._connection

    @property
    def cache_limit_bytes(self) -> int | None:
        """See `Storage`."""
        return None if self._cache is None else self._cache.limit_bytes

    def shards(self) -> tuple[ShardFile, ...]:
        """List the tars, see `Storage`. A server without range requests is found out here.

        Raises:
            InputError: the server does not answer, or has no tars, or two of the same name.
        """
        hint = "A server without listings needs the names: URL/{00000..00127}.tar"
        try:
            if "{" in self.root:
                strip, urls = self._filesystem._strip_protocol, braceexpand(self.root.place)
                shards = self._describe([{"name": strip(url)} for url in urls])
            else:
                shards = self._list("shards/", (".tar",)) or self._list("", (".tar",))
            answers_ranges = self._cache is not None or self._answers_ranges(shards)
        except InputError:
            raise
        except Exception as error:  # every file system raises its own
            raise fault_of_listing(error, self.root, hint) from None
        if not shards:
            raise ParameterError(
                "must hold webdataset tars (*.tar), in this folder or its shards/",
                parameter="root",
                value=self.root,
                way_out=f"{self._describe_root()} {hint}",
            )
        for shard, other in pairwise(shards):
            if shard.name == other.name:
                raise InputError(
                    f"The tars of a pool must have different names. {self.root} has {shard.path} "
                    f"and {other.path}."
                )
        if not all(shard.version[0] for shard in shards):
            log.warning(
                "%s tells neither an ETag nor a time of change: a tar that is replaced by another "
                "of the same size is not noticed.",
                self.root,
            )
        if not answers_ranges:
            self._cache = self._cache_for_all(shards)
        return tuple(shards)

    def _describe_root(self) -> str:
        """Say what is in the place of the tars, as far as the server lists it."""
        if "{" in self.root:
            return ""
        place = self._filesystem._strip_protocol(self.root.place)
        try:
            entries = self._patiently(lambda: ask(self._filesystem, "ls", place, detail=True))
        except Exception:  # every file system raises its own, most where nothing is there
            return "It holds none."
        names: dict[bool, list[str]] = {True: [], False: []}
        for entry in entries:
            name = unquote(str(entry["name"]).rstrip("/").rpartition("/")[2])
            names[entry.get("type") == "directory"].append(name)
        return f"It holds none. {describe_names(names[False], names[True])}"

    def _list(self, folder: str, suffixes: tuple[str, ...]) -> list[ShardFile]:
        """List the files with these suffixes in a folder below the root; "" is the root itself."""
        filesystem = self._filesystem
        filesystem.invalidate_cache()
        place = f"{filesystem._strip_protocol(self.root.place).rstrip('/')}/{folder}"
        try:
            listed = self._patiently(lambda: ask(filesystem, "ls", place, detail=True))
        except FileNotFoundError:
            return []
        return self._describe([info for info in listed if str(info["name"]).endswith(suffixes)])

    def _describe(self, infos: Sequence[dict[str, Any]]) -> list[ShardFile]:
        """Find size and version of files. Where a listing lacks them, each file is asked for."""
        filesystem = self._filesystem

        def describe(info: dict[str, Any]) -> ShardFile:
            path = str(info["name"])
            # as the file will be described when it is looked at again
            if info.get("size") is None or version_of(info)[0] not in CONTENT_FIELDS:
                info = self._patiently(lambda: ask(filesystem, "info", path))
            if info["size"] is None:
                raise OSError(f"the server does not tell the size of {path}")
            version = version_of(info)
            name = path
            if isinstance(filesystem, HTTPFileSystem):  # a slash may hide behind the quoting
                name = unquote(urlsplit(path).path)
            return ShardFile(
                name=name.rsplit("/", 1)[-1],
                path=path,
                size_bytes=int(info["size"]),
                stamp=f"{info['size']} {version[1]}",
                version=version,
            )

        with ThreadPoolExecutor(16) as threads:
            return sorted(threads.map(describe, infos), key=lambda file: file.name)

    def _patiently(self, read: Callable[[], Any], path: str = "") -> Any:
        """Try to read; again where it may help, and there is time for it."""
        attempts = self._attempts(path)
        until = time.monotonic() + 1.5 * connections.READ_TIMEOUT_SECONDS  # twice, if none answers
        for attempt in range(attempts):
            try:
                return read()
            except Exception as error:  # every file system raises its own
                real = real_error(error)
                is_last = attempt == attempts - 1 or time.monotonic() > until
                if is_last or is_permanent(real):
                    raise real from None
                self._pause(attempt, reads=1)

    def _attempts(self, path: str) -> int:
        """Return how often to ask for a file: once if it failed or a batch of it takes minutes."""
        return 1 if path in self._failing else ATTEMPTS

    def _note(self, path: str, *, failed: bool) -> None:
        (self._failing.add if failed else self._failing.discard)(path)

    def _pause(self, attempt: int, *, reads: int) -> None:
        self.retries += reads
        time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)

    def _answers_ranges(self, shards: Sequence[ShardFile]) -> bool:
        """Check whether two bytes can be had alone; HTTP servers may send the whole file."""
        shard = next((shard for shard in shards if shard.size_bytes >= 2), None)
        if shard is None:
            return True
        two_bytes = Span(shard, 0, 2)

        def try_two() -> bool:
            (answer,) = self._try([two_bytes], time.monotonic() + connections.READ_TIMEOUT_SECONDS)
            if isinstance(answer, (WholeFileError, NotImplementedError, ValueError)):
                return False
            if isinstance(answer, BaseException):
                raise answer
            return len(answer) == 2

        return bool(self._patiently(try_two))

    def _cache_for_all(self, shards: Sequence[ShardFile]) -> ShardCache:
        total = sum(shard.size_bytes for shard in shards)
        make_folder(self._folder)
        cache = ShardCache(self._folder / "shards", limit_bytes=total)
        missing = sum(shard.size_bytes for shard in shards if not cache.holds(shard))
        free = shutil.disk_usage(self._folder).free
        cost = (
            f"{self.root} does not answer range requests: to reach a sample, its whole tar is read "
            f"in sequence, {total / 1e9:.2f} GB for the whole pool whatever is selected"
        )
        if missing > 0.9 * free:
            raise InputError(
                f"{cost}, which do not fit on the disk of {self._folder} ({free / 1e9:.2f} GB "
                "free). Limit what is kept (shard_cache_gb of the pool), and read neighbours "
                "together (shuffle_window_shards of the data)."
            )
        log.warning("%s. The tars are kept in %s.", cost, cache.folder)
        return cache

    @contextmanager
    def open_tar(self, shard: ShardFile) -> Iterator[TarSource]:
        """Open one tar, see `Storage`."""
        if self._cache is None:
            yield _SequentialTar(self, shard)
            return
        with self._open_copy(shard) as tar:
            yield tar

    def _do_without_copies(self, shard: ShardFile, error: WriteError) -> None:
        """Read ranges from now on, where no more tars can be kept; else raise `error`."""
        if not self._answers_ranges([shard]):
            raise error
        log.warning("%s This process reads from %s itself from now on.", error, self.root)
        self._cache = None

    def _open_copy(self, shard: ShardFile) -> AbstractContextManager[TarSource]:
        while True:
            try:
                path = self._local(shard)
            except StorageError as error:
                raise _unreadable(shard, error) from None
            except WriteError as error:
                self._do_without_copies(shard, error)
                return nullcontext(_SequentialTar(self, shard))
            try:
                return LocalTar(path)
            except InputError:
                if os.path.exists(path):
                    raise
                # else another process has just made room

    def _local(self, shard: ShardFile) -> str:
        """Return the path of the copy of a tar in the cache.

        Raises:
            StorageError: it cannot be fetched.
        """
        if self._cache is None:
            raise RuntimeError("only called with a cache")
        return str(self._cache.fetch(shard, lambda path: self._copy(shard, path)))

    def _copy(self, file: ShardFile, path: Path) -> None:
        """Copy a file to a local path.

        Raises:
            StorageError: it cannot be read, or is another one by now.
            OSError: the disk is full.
        """
        if file in self._changed:
            raise ChangedError
        try:
            self._patiently(lambda: copy_file(self._filesystem, file, path), file.path)
        except ChangedError:
            self._changed.add(file)
            raise
        except Exception as error:  # every file system raises its own
            if getattr(error, "errno", None) in DISK_FULL:
                raise  # the disk's fault, which whoever writes to it tells
            self._note(file.path, failed=True)
            raise StorageError(describe_error(error)) from None
        self._note(file.path, failed=False)
        # behind the copy: what came is of the version that is there still
        if path.stat().st_size != file.size_bytes or not self._is_there(file):
            self._changed.add(file)
            raise ChangedError

    def _is_there(self, file: ShardFile) -> bool:
        """Check whether a file has the version that it had when the pool was opened. A request.

        Raises:
            StorageError: nobody can tell.
        """
        filesystem = self._filesystem

        def describe() -> dict[str, Any]:
            filesystem.invalidate_cache()  # of listings, which may be old
            return dict(ask(filesystem, "info", file.path))

        try:
            info = self._patiently(describe, file.path)
            require_version(file, info)
        except ChangedError:
            return False
        except Exception as error:  # every file system raises its own
            raise StorageError(describe_error(error)) from None
        return info.get("size") in (None, file.size_bytes)

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | StorageError]:
        """Yield the bytes of ranges, see `Storage`."""
        if self._cache is not None:
            for number, span in enumerate(spans):
                try:
                    answer = self._read_copy(span)
                except WriteError as error:
                    self._do_without_copies(span.shard, error)
                    yield from self.read(spans[number:])
                    return
                yield answer
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

    def _read_copy(self, span: Span) -> bytes | StorageError:
        answer: bytes | StorageError = StorageError("never read")
        for _ in range(ATTEMPTS):
            try:
                path = self._local(span.shard)
            except StorageError as error:
                return error
            (answer,) = self._files.read([(path, span.start_bytes, span.end_bytes, None)])
            if isinstance(answer, bytes):
                break  # else another process has just made room
        return answer

    def fetch(self, spans: Sequence[Span]) -> list[bytes | StorageError]:
        """Read some ranges at once; those that fail again, after a pause that grows.

        Raises:
            InputError: the server has given next to nothing for `stall_seconds`.
        """
        answers: list[bytes | StorageError] = [StorageError("never read")] * len(spans)
        attempts = [self._attempts(span.shard.path) for span in spans]
        todo = [index for index, span in enumerate(spans) if span.shard not in self._changed]
        for index in set(range(len(spans))).difference(todo):
            answers[index] = ChangedError()
        started, sizes = time.monotonic(), [span.end_bytes - span.start_bytes for span in spans]
        late: set[int] = set()  # have no answer
        until = started + connections.seconds_for(
            sum(sizes), is_failing=all(attempts[index] == 1 for index in todo)
        )
        for attempt in range(ATTEMPTS):
            if not todo:
                break
            if attempt:
                self._pause(attempt - 1, reads=len(todo))
            failed = []
            tried = self._try([spans[index] for index in todo], until)
            for index, answer in zip(todo, tried, strict=True):
                span = spans[index]
                if isinstance(answer, bytes) and len(answer) != sizes[index]:
                    answer = OSError(f"{len(answer)} bytes came")
                (late.add if isinstance(answer, TimeoutError) else late.discard)(index)
                self._note(span.shard.path, failed=not isinstance(answer, bytes))
                if isinstance(answer, bytes):
                    answers[index] = answer
                    continue
                answers[index] = StorageError(describe_error(answer))
                if isinstance(answer, ChangedError):
                    self._changed.add(span.shard)
                    answers[index] = answer
                may_try = attempt < attempts[index] - 1 and time.monotonic() < until
                if may_try and not is_permanent(answer):
                    failed.append(index)
            todo = failed
        is_silent = 2 * sum(sizes[index] for index in late) > sum(sizes)
        self._note_silence(time.monotonic() - started if is_silent else None)
        return answers

    def _note_silence(self, seconds: float | None) -> None:
        """Add to the time in which most of what was asked for did not come; None: it did.

        Raises:
            InputError: it is so long that the server counts as stalled.
        """
        self._silent_seconds = 0.0 if seconds is None else self._silent_seconds + seconds
        if self._silent_seconds >= connections.stall_seconds():
            silent, self._silent_seconds = self._silent_seconds, 0.0
            raise InputError(
                f"{self.root} has stalled: for {silent:.0f} s, most of what was asked for has not "
                "come. Start again when it answers: the same command continues."
            )

    def _try(self, spans: Sequence[Span], until: float) -> Sequence[bytes | BaseException]:
        """Try to read ranges once: answers, each of the version that its tar has, or errors."""
        answers = self._ask(self._filesystem, spans, until)
        refused = next(
            (s for s, a in zip(spans, answers, strict=True) if isinstance(a, ConditionError)), None
        )
        try:
            if refused is not None and self._is_there(refused.shard):
                self._on_condition = False  # the server has it, and does not understand conditions
                return self._try(spans, until)
            unchecked = {
                span.shard
                for span, answer in zip(spans, answers, strict=True)
                if isinstance(answer, Answer) and not answer.is_checked
            }
            gone = {shard for shard in unchecked if not self._is_known(shard)}
        except StorageError as error:
            return [error] * len(spans)
        return [
            ChangedError()
            if span.shard in gone
            else answer.data
            if isinstance(answer, Answer)
            else answer
            for span, answer in zip(spans, answers, strict=True)
        ]

    def _is_known(self, shard: ShardFile) -> bool:
        """Check as `_is_there`, but do not ask again for what was asked for a short while ago."""
        now = time.monotonic()
        if now - self._checked.get(shard, -CHECK_SECONDS) < CHECK_SECONDS:
            return True
        is_there = self._is_there(shard)
        self._checked[shard] = now
        return is_there

    def _ask(
        self, filesystem: Any, spans: Sequence[Span], until: float
    ) -> Sequence[Answer | BaseException]:
        try:
            if isinstance(filesystem, AsyncFileSystem):
                answers, repeated = sync(
                    filesystem.loop,
                    read_ranges,
                    filesystem,
                    spans,
                    on_condition=self._on_condition,
                    seconds=max(0.0, until - time.monotonic()),
                )
                self.retries += repeated
                return list(answers)
            shards, starts, ends = zip(*spans, strict=True)
            paths = [shard.path for shard in shards]
            answers = filesystem.cat_ranges(paths, list(starts), list(ends), on_error="return")
            return [
                Answer(answer, is_checked=False) if isinstance(answer, bytes) else answer
                for answer in answers
            ]
        except Exception as error:  # what a file system does not return
            return [error] * len(spans)

    def metadata(self, suffixes: tuple[str, ...] = METADATA_SUFFIXES) -> Path:
        """Return a local folder with the metadata, see `Storage`. New and changed files are copied.

        Raises:
            InputError: they cannot be listed or copied.
        """
        try:
            name, files = self._list_metadata()
        except Exception as error:  # every file system raises its own
            raise InputError(
                f"{self.root} cannot be listed: {type(error).__name__}: {in_one_line(error)}."
            ) from None
        folder = self._folder / name
        make_folder(folder)
        known = folder / "copies.json"
        stamps: dict[str, str] = {}
        with suppress(InputError):  # then they are copied again
            stamps = read_record(known, dict[str, str]) if has_content(known) else {}
        for old in stamps.keys() - {file.name for file in files}:
            if Path(old).name == old:  # never outside of the folder
                delete_file(folder / old)
            del stamps[old]
        todo = [
            file
            for file in files
            if file.name.endswith(suffixes)
            and (stamps.get(file.name) != file.stamp or not (folder / file.name).exists())
        ]
        for file in track(todo, total=len(todo), label="copy metadata", unit="file"):
            with atomic_path(folder / file.name) as temporary:
                try:
                    self._copy(file, temporary)
                except StorageError as error:
                    raise _unreadable(file, error) from None
            stamps[file.name] = file.stamp
            write_json(known, stamps)
        return folder

    def _list_metadata(self) -> tuple[str, list[ShardFile]]:
        """List metadata files, and name the folder for copies: what is beside tars has its own."""
        if "{" not in self.root:
            for place in ("metadata/", "shards/", ""):
                files = self._list(place, METADATA_SUFFIXES)
                if files:
                    return "metadata" if place == "metadata/" else "beside_tars", files
        return "metadata", []

    def close(self) -> None:
        """Close the open files, see `Storage`."""
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
            raise _unreadable(self._shard, answer)
        return answer


def _unreadable(file: ShardFile, error: StorageError) -> InputError:
    if isinstance(error, ChangedError):
        return changed_file_error(file.path)
    reason = str(error).removeprefix("in a tar that ")
    return InputError(f"{file.path} {reason}.")
