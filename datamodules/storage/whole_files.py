"""Whole files and descriptions of files from a server, which may send anything and never end.

aiohttp waits for ever for the rest of a body whose coding is wrong (3.14: a chunk of negative
size), whatever time is set for silence; and fsspec writes what comes, however much it is.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.http import HTTPFileSystem

from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage.local import ChangedError, ShardFile
from siftclip.writing import writing_to

_PART_BYTES = 1 << 20


def ask(filesystem: Any, method: str, *args: Any, **options: Any) -> Any:
    """Call a method of a file system that describes files; it must answer in some time.

    Raises:
        TimeoutError: it does not.
        Exception: what the file system raises.
    """
    if not isinstance(filesystem, AsyncFileSystem):
        return getattr(filesystem, method)(*args, **options)

    async def answer() -> Any:
        asked = getattr(filesystem, f"_{method}")(*args, **options)
        return await asyncio.wait_for(asked, connections.READ_TIMEOUT_SECONDS)

    return sync(filesystem.loop, answer)


def copy_file(filesystem: Any, file: ShardFile, path: Path) -> None:
    """Copy a file to a local path.

    Raises:
        ChangedError: more comes than the file has.
        TimeoutError: nothing comes for a while.
        Exception: what the file system raises.
    """
    if isinstance(filesystem, HTTPFileSystem):
        sync(filesystem.loop, _copy_http, filesystem, file, path)
    else:
        filesystem.get_file(file.path, str(path), callback=connections.CopyPace())


async def _copy_http(filesystem: HTTPFileSystem, file: ShardFile, path: Path) -> None:
    session = await filesystem.set_session()
    url = filesystem.encode_url(file.path)
    async with session.get(url, **filesystem.kwargs) as answer:
        filesystem._raise_not_found_for_status(answer, file.path)
        left, pace = file.size_bytes, connections.CopyPace()
        with writing_to(path), path.open("wb") as copy:
            while part := await asyncio.wait_for(
                answer.content.read(_PART_BYTES), connections.READ_TIMEOUT_SECONDS
            ):
                left -= len(part)
                pace.relative_update(len(part))
                if left < 0:
                    raise ChangedError
                copy.write(part)
