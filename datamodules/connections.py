"""Connections to file systems behind a URL: one a process, ranges, and what their errors mean."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import aiohttp
import fsspec
from braceexpand import braceexpand
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.http import HTTPFileSystem

from siftclip.datamodules.storage import Span
from siftclip.selectors.errors import InputError

READ_TIMEOUT_SECONDS = 120.0  # of one attempt at a range; of silence while a file is copied
CONCURRENT_READS = 64
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)

# A forked child keeps what its parent had open, for good. Closing it there, which is what happens
# to a connection that nobody holds, would take the sockets from the event loop that both share.
_connections: WeakValueDictionary[int, Any] = WeakValueDictionary()
_of_parents: list[Any] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _of_parents.extend(_connections.values()))


class WholeFileError(OSError):
    """A server sends all of a file where a range was asked for."""


def connect(root: str, storage_options: Mapping[str, Any]) -> Any:
    """The file system of a URL, for this process alone.

    Raises:
        InputError: a package is missing, or an option is wrong.
    """
    options = dict(storage_options)
    scheme = urlsplit(root).scheme
    if scheme in ("http", "https"):
        # aiohttp's own limit is five minutes for a file, however large it is
        silence = aiohttp.ClientTimeout(
            sock_connect=READ_TIMEOUT_SECONDS, sock_read=READ_TIMEOUT_SECONDS
        )
        options["client_kwargs"] = {"timeout": silence, **(options.get("client_kwargs") or {})}
    if scheme in ("s3", "s3a"):
        # botocore and s3fs would each repeat what is repeated here: a minute for a wrong host
        own = {
            "retries": {"max_attempts": 0},
            "max_pool_connections": CONCURRENT_READS,
            "read_timeout": READ_TIMEOUT_SECONDS,
        }
        options["config_kwargs"] = {**own, **(options.get("config_kwargs") or {})}
    try:
        filesystem, _ = fsspec.core.url_to_fs(
            next(iter(braceexpand(root))), skip_instance_cache=True, **options
        )
    except (ImportError, ValueError, TypeError) as error:
        raise InputError(
            f"pool.root={root!r} with the pool.storage_options {sorted(storage_options)} "
            f"cannot be read by fsspec: {error}."
        ) from None
    if scheme in ("s3", "s3a"):
        filesystem.retries = 1
    _connections[id(filesystem)] = filesystem
    return filesystem


async def read_ranges(
    filesystem: AsyncFileSystem, spans: Sequence[Span]
) -> list[bytes | BaseException]:
    """The bytes of ranges, read at the same time; the error in the place of one that failed."""
    gate = asyncio.Semaphore(CONCURRENT_READS)

    async def read(span: Span) -> bytes:
        shard, start, end = span
        if start == end:
            return b""
        async with gate:
            if isinstance(filesystem, HTTPFileSystem):
                reading = _read_http_range(filesystem, shard.path, start, end)
            else:
                reading = filesystem._cat_file(shard.path, start=start, end=end)
            return await asyncio.wait_for(reading, READ_TIMEOUT_SECONDS)

    return await asyncio.gather(*map(read, spans), return_exceptions=True)


async def _read_http_range(filesystem: HTTPFileSystem, path: str, start: int, end: int) -> bytes:
    """As the file system does it, but without a body that is not the range."""
    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    options["headers"] = {
        **options.get("headers", {}),
        "Accept-Encoding": "identity",
        "Range": f"bytes={start}-{end - 1}",
    }
    async with session.get(filesystem.encode_url(path), **options) as answer:
        filesystem._raise_not_found_for_status(answer, path)
        if answer.status != 206:
            raise WholeFileError(f"the answer to a range request has status {answer.status}")
        return bytes(await answer.read())


def real_error(error: Exception) -> Exception:
    """The reason of an error: fsspec's `info` over HTTP calls them all FileNotFoundError."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, aiohttp.ClientError):
        return error.__cause__
    return error


def is_permanent(error: BaseException) -> bool:
    """Whether asking again is of no use."""
    if isinstance(error, aiohttp.ClientResponseError):
        return 400 <= error.status < 500 and error.status not in (408, 429)
    return isinstance(error, _PERMANENT) or getattr(error, "errno", None) in DISK_FULL


def describe_error(error: BaseException) -> str:
    """Why a sample is bad, worded to follow a count."""
    status = error.status if isinstance(error, aiohttp.ClientResponseError) else None
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "in a tar that is not there any more"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "in a tar that may not be read"
    what = f"HTTP status {status}" if status else type(error).__name__
    return f"in a tar that could not be read ({what})"
