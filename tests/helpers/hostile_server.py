"""An HTTP server over a folder whose answers are wrong: statuses, lengths, ranges, tags, coding."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

SHARE_RIGHT = 0.6  # of the answers, so that some come through


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, folder: Path, random: Random) -> None:
        self.folder, self.random = folder, random
        super().__init__(*args)

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # of clients that have gone
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.folder / self.path.strip("/").partition("?")[0]
        if not path.is_file():
            self._send(404, {"Content-Length": "0"}, b"")
            return
        data = path.read_bytes()
        status, headers = 200, {"ETag": '"a"', "Content-Length": str(len(data))}
        asked = self.headers.get("Range", "")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            status, data = 206, data[start:end]
            headers["Content-Length"] = str(len(data))
        if self.random.random() > SHARE_RIGHT:
            status, data = self._spoil(status, headers, data)
        self._send(status, headers, data if with_body else b"")

    def _spoil(self, status: int, headers: dict[str, str], data: bytes) -> tuple[int, bytes]:
        choose, total = self.random.choice, 10**6
        action = self.random.randrange(10)
        if action == 0:
            return choose(
                (200, 204, 301, 302, 400, 403, 404, 410, 412, 416, 429, 500, 503, 999)
            ), data
        if action == 1:
            wrong = ("0", "-1", "x", "99999999999999999999", str(len(data) + 9), "1", "9" * 5000)
            headers["Content-Length"] = choose(wrong)
        elif action == 2:
            ranges = (
                "",
                "bytes 0-1/2",
                f"bytes 5-9/{total}",
                "bytes */5",
                "x",
                "bytes 9-0/" + "9" * 5000,
            )
            headers["Content-Range"] = choose(ranges)
        elif action == 3:
            headers["ETag"] = choose(('"b"', "", "W/", "x" * 5000, '"\xe9"'))
        elif action == 4:
            data = choose((data[: len(data) // 2], data[::-1], data + data, b""))
        elif action == 5:
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            data = choose(
                (b"3\r\nabc\r\n0\r\n\r\n", b"zz\r\n", b"ffffffffffffffffff\r\na", b"-1\r\n\r\n")
            )
        elif action == 6:
            headers["Content-Encoding"] = choose(("gzip", "deflate", "br", "x"))
        elif action == 7:
            headers["Location"] = choose(("/", self.path, "http://127.0.0.1:1/", "ftp://x", "//"))
            return choose((301, 302, 303, 307)), data
        elif action == 8:
            headers["X"] = "y" * 20_000
        else:
            time.sleep(0.05)
            self.connection.shutdown(socket.SHUT_RDWR)
        return status, data

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that have gone."""


@contextmanager
def serve(folder: Path, random: Random) -> Iterator[str]:
    """Serve a folder inside the block; the answers follow from the random numbers."""
    server = _Server(("127.0.0.1", 0), partial(_Handler, folder=folder, random=random))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
