"""Whole files from servers whose answers never end, or are coded so that nobody sees their end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import fsspec
import pytest

from siftclip.confidential import ConfidentialOptions, ConfidentialUrl
from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage.local import ChangedError, ShardFile
from siftclip.datamodules.storage.whole_files import ask, copy_file

SIZE = 1000


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._start({"Content-Length": str(SIZE)})

    def do_GET(self) -> None:
        if self.path == "/right":
            self._start({"Content-Length": str(SIZE)})
            self.wfile.write(b"x" * SIZE)
        elif self.path == "/coded":  # the end of the body cannot be known
            self._start({"Transfer-Encoding": "chunked"})
            self.wfile.write(b"-1\r\n\r\n")
            self.close_connection = True
        else:
            self._start({"Connection": "close"})
            with suppress(OSError):  # the client has heard enough
                while True:
                    self.wfile.write(bytes(1 << 16))

    def _start(self, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def shard(url: str, name: str) -> ShardFile:
    return ShardFile(name=name, path=f"{url}/{name}", size_bytes=SIZE, stamp="")


def test_copies(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", 0.5)
    filesystem = connections.connect(ConfidentialUrl(url), ConfidentialOptions({}))
    copy_file(filesystem, shard(url, "right"), tmp_path / "right")
    assert (tmp_path / "right").read_bytes() == b"x" * SIZE
    assert ask(filesystem, "info", f"{url}/right")["size"] == SIZE
    with pytest.raises(ChangedError):
        copy_file(filesystem, shard(url, "endless"), tmp_path / "endless")
    assert (tmp_path / "endless").stat().st_size <= SIZE
    with pytest.raises((TimeoutError, asyncio.TimeoutError, aiohttp.ClientError)):
        copy_file(filesystem, shard(url, "coded"), tmp_path / "coded")
    with pytest.raises((TimeoutError, asyncio.TimeoutError, aiohttp.ClientError)):
        ask(filesystem, "ls", f"{url}/coded")


def test_other_file_systems_are_asked_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    filesystem = fsspec.filesystem("file")
    assert ask(filesystem, "ls", str(tmp_path), detail=False) == [str(tmp_path / "a")]
    file = ShardFile(name="a", path=str(tmp_path / "a"), size_bytes=1, stamp="")
    copy_file(filesystem, file, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"1"


def test_a_version_that_no_file_can_hold_is_written_out() -> None:
    tag = b'"\xe9"'.decode(errors="surrogateescape")  # as aiohttp gives what is not UTF-8
    field, value = connections.version_of({"ETag": tag})
    assert value.encode() == b'"\\udce9"'
    file = ShardFile(name="a", path="a", size_bytes=1, stamp="", version=(field, value))
    assert connections.require_version(file, {"ETag": tag})
    with pytest.raises(ChangedError):
        connections.require_version(file, {"ETag": '"b"'})
