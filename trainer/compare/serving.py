"""Shows a report to this machine's own browser, and writes it anew while training goes on."""

from __future__ import annotations

import html
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from siftclip.errors import InputError
from siftclip.reading import read_bytes
from siftclip.trainer.compare.arms import CompareOutcome

HOST = "127.0.0.1"  # this machine alone
_NAMES = (HOST, "localhost")

log = logging.getLogger(__name__)


def serve_report(
    write: Callable[[], CompareOutcome],
    *,
    port: int,
    interval_seconds: float,
    serving: Callable[[str], None],
) -> None:
    """Write a report again and again, and serve its page; until Ctrl-C.

    Once no run is missing, it is served as it is.

    Args:
        write: writes the report.
        port: on the loopback address; 0: any that is free.
        interval_seconds: between two reports; the browser asks as often.
        serving: is told the address, once it answers.

    Raises:
        InputError: the port is taken, or a report cannot be written but for want of finished runs.
    """
    with _server(port, interval_seconds) as server:
        serving(f"http://{HOST}:{server.server_address[1]}")
        while True:
            try:
                outcome = write()
            except InputError as error:
                if "runs is finished" not in str(error):
                    raise
                server.show(f"<!doctype html><p>{html.escape(str(error))}</p>".encode())
                time.sleep(interval_seconds)
                continue
            server.show(read_bytes(outcome.report))
            if outcome.comparison is not None and not outcome.comparison.missing:
                threading.Event().wait()
            time.sleep(interval_seconds)


class ReportServer(ThreadingHTTPServer):
    """Answers with one page."""

    daemon_threads = True

    def __init__(self, port: int, refresh_seconds: float) -> None:
        self.page = b"<!doctype html><p>The report is being written.</p>"
        self.refresh_seconds = refresh_seconds
        super().__init__((HOST, port), _Handler)

    def show(self, page: bytes) -> None:
        """Answer with this page from now on."""
        self.page = page


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if name not in _NAMES:  # a page of somebody else whose name leads to here
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path not in ("/", "/report.html"):
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            page = self.server.page
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Refresh", f"{max(1, round(self.server.refresh_seconds))}")
            self.end_headers()
            self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""


@contextmanager
def _server(port: int, refresh_seconds: float) -> Iterator[ReportServer]:
    try:
        server = ReportServer(port, refresh_seconds)
    except OSError as error:
        raise InputError(
            f"report.port={port} cannot be listened on: {error.strerror}. Another port, or 0 for "
            "any that is free."
        ) from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
