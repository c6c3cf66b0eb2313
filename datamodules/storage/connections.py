"""Connections to file systems behind a URL: one a process, ranges, and what their errors mean."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import aiohttp
import fsspec
from braceexpand import braceexpand
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback
from fsspec.implementations.http import HTTPFileSystem

from siftclip.confidential import ConfidentialOptions, ConfidentialUrl
from siftclip.datamodules.storage.hedging import Progress, answers_within
from siftclip.datamodules.storage.local import ChangedError, ShardFile, Span, StorageError
from siftclip.errors import ParameterError
from siftclip.reading import in_one_line
from siftclip.redaction import HIDDEN, remember_all, split_url
from siftclip.writing import DISK_FULL

READ_TIMEOUT_SECONDS = 60.0  # for the reads of a batch, all attempts together; for a listing
SLOWEST_BYTES_PER_SECOND = 256 << 10  # a batch has as much longer as it takes at this rate
SLOWEST_COPY_BYTES_PER_SECOND = 1 << 10  # a copy that is slower for a minute has stalled
CONCURRENT_READS = 64
_CHUNK_BYTES = 1 << 18
# What file systems call the version of a file: by its content (S3 and HTTP, GCS and Azure, GCS,
# Hugging Face), else by a time, which listings and descriptions of single files may write apart.
CONTENT_FIELDS = ("ETag", "etag", "md5Hash", "blob_id")
_TIME_FIELDS = ("LastModified", "Last-Modified", "mtime", "modified", "updated", "created")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)

# A forked child keeps what its parent had open, for good. Closing it there, which is what happens
# to a connection that nobody holds, would take the sockets from the event loop that both share.
_connections: WeakValueDictionary[int, Any] = WeakValueDictionary()
_of_parents: list[Any] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _of_parents.extend(_connections.values()))


class Answer(NamedTuple):
    """The bytes of a range."""

    data: bytes
    is_checked: bool  # the answer says that they are of the version that was indexed


class WholeFileError(OSError):
    """A server sends all of a file where a range was asked for, or does not say what it sends."""


class ConditionError(ChangedError):
    """A server says that it has no such version of a file."""


class CopyPace(Callback):  # type: ignore[misc]  # fsspec has no types
    """Ends the copying of a file that hardly comes, for which file systems have no limit."""

    def __init__(self) -> None:
        super().__init__()
        self._since, self._came_bytes = time.monotonic(), 0

    def relative_update(self, inc: int = 1) -> None:
        """Note that so many bytes have come.

        Raises:
            TimeoutError: for some time there were too few.
        """
        self._came_bytes += inc
        seconds = time.monotonic() - self._since
        if seconds >= READ_TIMEOUT_SECONDS:
            if self._came_bytes < seconds * SLOWEST_COPY_BYTES_PER_SECOND:
                raise TimeoutError(f"{self._came_bytes} bytes came in {seconds:.0f} s")
            self._since, self._came_bytes = time.monotonic(), 0


def connect(root: ConfidentialUrl, storage_options: ConfidentialOptions) -> Any:
    """Open the file system of a URL, for this process alone.

    Paths of an HTTP server are URLs; they need no credentials, which every request gets.

    Raises:
        InputError: a package is missing, an option is wrong, or credentials are missing or cannot
            stand in a URL of this kind.
    """
    options = storage_options.reveal()
    scheme = urlsplit(root).scheme
    _check_credentials(root, storage_options)
    remember_all(fsspec.config.conf)
    silence = READ_TIMEOUT_SECONDS / 3  # of one request: there is time for others
    if scheme in ("http", "https"):
        # aiohttp's own limit is five minutes for a file, however large it is
        timeout = aiohttp.ClientTimeout(sock_connect=silence, sock_read=silence)
        own = _given("client_kwargs", options, "http", "https")
        options["client_kwargs"] = {"timeout": timeout, **own}
    if scheme in ("s3", "s3a"):
        # botocore and s3fs would each repeat what is repeated here: a minute for a wrong host
        defaults = {
            "retries": {"max_attempts": 0},
            "max_pool_connections": CONCURRENT_READS,
            "connect_timeout": silence,
            "read_timeout": silence,
        }
        options["config_kwargs"] = {**defaults, **_given("config_kwargs", options, "s3", "s3a")}
    try:
        first = root.authorized(next(iter(braceexpand(root.place))))
        filesystem, _ = fsspec.core.url_to_fs(first, skip_instance_cache=True, **options)
    except (ImportError, ValueError, TypeError) as error:
        given = f" with the storage options {sorted(storage_options)}" if storage_options else ""
        raise ParameterError(
            f"cannot be read by fsspec{given}: {error}",
            parameter="root",
            value=root,
        ) from None
    if scheme in ("s3", "s3a"):
        filesystem.retries = 1
    if isinstance(filesystem, HTTPFileSystem) and root.place != root.reveal():
        encode = filesystem.encode_url
        filesystem.encode_url = lambda url: encode(root.authorized(url))
    _connections[id(filesystem)] = filesystem
    return filesystem


def fault_of_listing(error: Exception, root: ConfidentialUrl, way_out: str) -> ParameterError:
    """Return what to raise where the tars behind a URL cannot be listed.

    Args:
        error: of the file system.
        root: the URL.
        way_out: where a server has answered, and may have no listings.
    """
    unknown = re.search(r"unexpected keyword argument '([^']+)'", str(error))
    if unknown is not None:
        rule = f"has {unknown[1]!r}, which the file system of this URL does not take"
        return ParameterError(rule, parameter="storage_options")
    is_away = isinstance(error, ConnectionError | TimeoutError | aiohttp.ClientConnectionError)
    return ParameterError(
        f"cannot be listed: {type(error).__name__}: {in_one_line(error)}",
        parameter="root",
        value=root,
        way_out="" if is_away else way_out,
    )


def _given(name: str, options: Mapping[str, Any], *protocols: str) -> dict[str, Any]:
    """Return a mapping among the options, above the one in fsspec's own configuration.

    fsspec takes the one or the other, and ours has something of its own.
    """
    configured = [fsspec.config.conf.get(protocol, {}).get(name) for protocol in protocols]
    given: dict[str, Any] = {}
    for mapping in (*configured, options.get(name)):
        given |= mapping or {}
    return given


def _check_credentials(root: ConfidentialUrl, options: ConfidentialOptions) -> None:
    for name, shown, whole in (
        ("root", root, root.reveal()),
        ("storage_options", options, options.reveal()),
    ):
        if any(HIDDEN in text for text in _texts(whole)):
            rule = f"has {HIDDEN} in the place of credentials, which are not kept"
            way_out = "Give them again."
            raise ParameterError(rule, parameter=name, value=shown, way_out=way_out)
    if urlsplit(root).scheme in ("s3", "s3a") and split_url(root.reveal())[1]:
        raise ParameterError(
            "must have no keys: s3fs takes none in a URL",
            parameter="root",
            value=root,
            way_out="It reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )


def _texts(tree: Any) -> Iterator[str]:
    inner = tree.values() if isinstance(tree, Mapping) else tree
    for value in inner if isinstance(tree, Mapping | list | tuple) else ():
        yield from _texts(value)
    if isinstance(tree, str):
        yield tree


def version_of(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Find what tells versions of a file apart: a field of a description, and its value.

    Both are empty where there is nothing but the size.
    """
    for field in (*CONTENT_FIELDS, *_TIME_FIELDS):
        if fields.get(field) is not None:
            return field, _text(fields[field])
    return "", ""


def _text(version: object) -> str:
    # aiohttp makes halves of surrogate pairs of bytes that are not UTF-8, which no file can hold
    return str(version).encode(errors="backslashreplace").decode()


def require_version(shard: ShardFile, fields: Mapping[str, Any]) -> bool:
    """Check a description of a file, or the headers of an answer.

    Returns:
        Whether they say the version: False if it is not known from them.

    Raises:
        ChangedError: it is another file than when the pool was opened.
    """
    field, value = shard.version
    if fields.get(field) is None:
        return not field  # there is none that could be said
    if _text(fields[field]) != value:
        raise ChangedError
    return True


def seconds_for(size_bytes: int, *, is_failing: bool) -> float:
    """Return how long the reads of a batch may take together; a quarter where all failed before."""
    silence = READ_TIMEOUT_SECONDS / 4 if is_failing else READ_TIMEOUT_SECONDS
    return silence + size_bytes / SLOWEST_BYTES_PER_SECOND


def stall_seconds() -> float:
    """Return after how long with next to no answers a server counts as stalled."""
    return 2 * READ_TIMEOUT_SECONDS


async def read_ranges(
    filesystem: AsyncFileSystem, spans: Sequence[Span], *, on_condition: bool, seconds: float
) -> tuple[list[Answer | BaseException], int]:
    """Read ranges at the same time; the error in the place of one that failed.

    Args:
        filesystem: to read from. Over HTTP and S3, an answer is checked to be the range that was
            asked for, and of the version of the file that its `ShardFile` has.
        spans: the ranges.
        on_condition: ask for that version alone, where the file system can.
        seconds: for all of them.

    Returns:
        The answers, and how many requests were made again because nothing came.
    """
    shows_progress = isinstance(filesystem, HTTPFileSystem) or _is_s3(filesystem)

    def ask(span: Span) -> Callable[[Progress], Awaitable[Answer]]:
        async def read(progress: Progress) -> Answer:
            if span.start_bytes == span.end_bytes:
                return Answer(b"", is_checked=True)
            if isinstance(filesystem, HTTPFileSystem):
                return await _read_http_range(filesystem, span, on_condition, progress)
            if shows_progress:
                return await _read_s3_range(filesystem, span, on_condition, progress)
            return await _read_range(filesystem, span)

        return read

    return await answers_within(
        [ask(span) for span in spans],
        at_once=CONCURRENT_READS,
        seconds=seconds,
        # a slow answer must not be asked for twice where nobody sees it come
        patience_seconds=READ_TIMEOUT_SECONDS / (6 if shows_progress else 2),
        is_final=is_permanent,
    )


def _is_s3(filesystem: Any) -> bool:
    protocol = filesystem.protocol
    return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)


def _condition(shard: ShardFile, on_condition: bool) -> str | None:
    """Return the ETag to ask for; one that is weak, or not ASCII, cannot be asked for."""
    field, value = shard.version
    is_strong = field == "ETag" and value.isascii() and not value.startswith("W/")
    return value if on_condition and is_strong and "\\" not in value else None


async def _read_range(filesystem: AsyncFileSystem, span: Span) -> Answer:
    shard, start, end = span
    data = await filesystem._cat_file(shard.path, start=start, end=end)
    return Answer(data, is_checked=False)


async def _read_http_range(
    filesystem: HTTPFileSystem, span: Span, on_condition: bool, progress: Progress
) -> Answer:
    """Read as the file system does, but without a body that is not the range."""
    shard, start, end = span
    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    options["headers"] = {
        **options.get("headers", {}),
        "Accept-Encoding": "identity",
        "Range": f"bytes={start}-{end - 1}",
    }
    tag = _condition(shard, on_condition)
    if tag is not None:
        options["headers"]["If-Match"] = tag
    async with session.get(filesystem.encode_url(shard.path), **options) as answer:
        if answer.status == 412:
            raise ConditionError
        if answer.status == 416:  # inside of the file that was indexed
            raise ChangedError
        filesystem._raise_not_found_for_status(answer, shard.path)
        is_checked = require_version(shard, answer.headers)
        if answer.status != 206:
            raise WholeFileError(f"the answer to a range request has status {answer.status}")
        require_range(span, answer.headers.get("Content-Range", ""))
        body = answer.content.iter_any()
        return Answer(await _collected(body, end - start, progress), is_checked)


async def _collected(chunks: AsyncIterator[bytes], size_bytes: int, progress: Progress) -> bytes:
    """Join what comes of a size, and a part of what should not follow; note how much has come."""
    parts, left = [], size_bytes
    async for chunk in chunks:
        progress.size_bytes += len(chunk)
        parts.append(chunk)
        left -= len(chunk)
        if left < 0:
            break
    return b"".join(parts)


async def _read_s3_range(
    filesystem: Any, span: Span, on_condition: bool, progress: Progress
) -> Answer:
    shard, start, end = span
    bucket, key, version = filesystem.split_path(shard.path)
    options = {} if version is None else {"VersionId": version}
    tag = _condition(shard, on_condition)
    if tag is not None:
        options["IfMatch"] = tag
    try:
        answer = await filesystem._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **options
        )
    except OSError as error:
        answered = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
        if answered.get("HTTPStatusCode") == 412:
            raise ConditionError from None
        if answered.get("HTTPStatusCode") == 416:
            raise ChangedError from None
        raise
    try:
        is_checked = require_version(shard, answer)
        require_range(span, answer.get("ContentRange", ""))
        body = answer["Body"].iter_chunks(_CHUNK_BYTES)
        return Answer(await _collected(body, end - start, progress), is_checked)
    finally:
        answer["Body"].close()


def require_range(span: Span, stated: str) -> None:
    """Check what an answer says of its bytes: `bytes 0-511/10240`, the size being that of the file.

    Raises:
        WholeFileError: it does not say it.
        ChangedError: the file has another size.
        OSError: these are other bytes than those that were asked for.
    """
    match = _CONTENT_RANGE.fullmatch(stated.strip())
    if match is None:
        raise WholeFileError(f"the answer to a range request says {stated!r} of its range")
    first, last, size_bytes = match.groups()
    if size_bytes != "*" and int(size_bytes) != span.shard.size_bytes:
        raise ChangedError
    if (int(first), int(last) + 1) != (
        span.start_bytes,
        min(span.end_bytes, span.shard.size_bytes),
    ):
        raise OSError(f"bytes {first}-{last} came for {span.start_bytes}-{span.end_bytes - 1}")


def real_error(error: Exception) -> Exception:
    """Return the reason of an error: fsspec's `info` over HTTP calls them all FileNotFoundError."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, aiohttp.ClientError):
        error = error.__cause__
    if isinstance(error, asyncio.TimeoutError):  # one of fsspec, or of aiohttp
        return TimeoutError("the server does not answer")
    return error


def is_permanent(error: BaseException) -> bool:
    """Return whether asking again is of no use."""
    if isinstance(error, aiohttp.ClientResponseError):
        return 400 <= error.status < 500 and error.status not in (408, 429)
    return (
        isinstance(error, (*_PERMANENT, StorageError)) or getattr(error, "errno", None) in DISK_FULL
    )


def describe_error(error: BaseException) -> str:
    """Say why a sample is bad, worded to follow a count."""
    if isinstance(error, StorageError):
        return str(error)
    status = error.status if isinstance(error, aiohttp.ClientResponseError) else None
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "in a tar that is not there any more"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "in a tar that may not be read"
    what = f"HTTP status {status}" if status else type(error).__name__
    return f"in a tar that could not be read ({what})"
