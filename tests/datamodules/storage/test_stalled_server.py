"""A server that stalls: what it leaves open is asked for again, and nothing waits without end."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import BadSampleError, RawSample, SampleReader
from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage.remote import RemoteStorage
from siftclip.errors import InputError

LIMIT = 3.0  # in place of 60 s
ROWS = np.arange(90)


@dataclass(kw_only=True)
class Stalling:
    """A server of tars over HTTP, by ranges, that stalls as it is told while it runs."""

    folder: Path
    url: str = ""
    silent: int = 0  # so many requests are accepted and never answered
    dripping: bool = False  # a body comes by a byte at a time
    silent_ranges: tuple[int, ...] = ()  # a request that begins there is never answered
    requests: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, start: int) -> bool:
        """Count a request, and say whether it is answered."""
        with self.lock:
            self.requests += 1
            if self.silent:
                self.silent -= 1
                return False
            return start not in self.silent_ranges


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, server_state: Stalling) -> None:
        self.state = server_state
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        data = (self.state.folder / self.path.lstrip("/")).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, last = (int(asked[1]), int(asked[2])) if asked else (0, len(data) - 1)
        if not self.state.begin(start):
            self.state.ended.wait(60)
            return
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("Content-Length", str(last + 1 - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(data)}")
        self.end_headers()
        part = data[start : last + 1] if body else b""
        try:
            if self.state.dripping:
                for place in range(len(part)):
                    self.wfile.write(part[place : place + 1])
                    if self.state.ended.wait(LIMIT / 60):
                        return
            else:
                self.wfile.write(part)
        except ConnectionError:
            pass


class Server(ThreadingHTTPServer):
    request_queue_size = 200  # else a connection may take a second
    daemon_threads = True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Stalling]:
    state = Stalling(folder=tmp_path)
    http = Server(("127.0.0.1", 0), partial(Handler, server_state=state))
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    state.ended.set()
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def pool(
    make_samples: Any,
    write_pool: Any,
    server: Stalling,
    open_remote: Callable[..., Pool],
    monkeypatch: pytest.MonkeyPatch,
) -> Pool:
    """A hundred samples behind that server, each read by a request of its own."""
    write_pool(make_samples(100), shards=2)
    monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", LIMIT)
    monkeypatch.setattr(RemoteStorage, "max_gap_bytes", 600)
    opened = open_remote(f"{server.url}/pool/shards/{{00000000..00000001}}.tar")
    server.requests = 0
    return opened


def read(pool: Pool, rows: np.ndarray = ROWS) -> tuple[dict[int, Any], float]:
    start = time.monotonic()
    answers = dict(SampleReader(pool=pool, max_image_pixels=10_000).read(rows))
    return answers, time.monotonic() - start


def causes(answers: dict[int, Any]) -> dict[int, str]:
    return {row: str(a) for row, a in answers.items() if isinstance(a, BadSampleError)}


def assert_stalled(pool: Pool) -> None:
    """Read single samples until that ends, as a batch does that looks for others."""

    def look() -> None:
        for row in range(21):
            read(pool, np.array([row]))

    with pytest.raises(
        InputError, match=r"has stalled: for \d+ s, most of .*the same command cont"
    ):
        look()


def test_nothing_is_asked_twice_of_a_healthy_server(pool: Pool, server: Stalling) -> None:
    answers, _ = read(pool)
    assert not causes(answers)
    assert pool.storage.retries == 0
    assert server.requests <= 2 * len(ROWS)


def test_a_server_that_never_answers_ends_in_a_message(pool: Pool, server: Stalling) -> None:
    server.silent = 1_000_000
    start = time.monotonic()
    answers, seconds = read(pool)
    assert len(causes(answers)) == len(ROWS)
    assert seconds < 2 * LIMIT + 2  # all of them together
    assert_stalled(pool)
    assert time.monotonic() - start < 4 * LIMIT + 4


def test_a_server_that_sends_a_byte_at_a_time(pool: Pool, server: Stalling) -> None:
    server.dripping = True
    start = time.monotonic()
    assert_stalled(pool)
    assert time.monotonic() - start < 4 * LIMIT + 4


def test_a_range_that_stalls_is_a_bad_sample_and_no_other(pool: Pool, server: Stalling) -> None:
    (row,) = np.array([17])
    place = int(pool.image_offsets_bytes[row])
    starts = [place, int(pool.text_offsets_bytes[row])]
    server.silent_ranges = tuple(starts)
    answers, seconds = read(pool)
    assert causes(answers) == {row: "in a tar that could not be read (TimeoutError)"}
    assert sum(isinstance(answer, RawSample) for answer in answers.values()) == len(ROWS) - 1
    assert seconds < 2 * LIMIT + 2
    server.silent_ranges = ()
    assert not causes(read(pool)[0])


@pytest.mark.parametrize("silent", [1, 40, 150])
def test_a_server_that_recovers_costs_time_and_no_sample(
    pool: Pool, server: Stalling, silent: int
) -> None:
    server.silent = silent
    answers, seconds = read(pool)
    assert not causes(answers)
    assert pool.storage.retries >= silent
    assert seconds < LIMIT + 1


def test_a_listing_that_never_comes_is_given_up(
    pool: Pool, server: Stalling, open_remote: Callable[..., Pool]
) -> None:
    server.silent = 1_000_000
    start = time.monotonic()
    with pytest.raises(InputError, match="cannot be listed: TimeoutError: the server does not"):
        open_remote(f"{server.url}/pool/shards/{{00000000..00000001}}.tar")
    assert time.monotonic() - start < 3 * LIMIT


def test_a_copy_that_hardly_comes_is_given_up(
    pool: Pool, server: Stalling, open_remote: Callable[..., Pool]
) -> None:
    server.dripping = True
    start = time.monotonic()
    with pytest.raises(InputError, match=r"00000000\.tar could not be read \(TimeoutError\)"):
        open_remote(
            f"{server.url}/pool/shards/{{00000000..00000001}}.tar", shard_cache_gb=1, cache="other"
        )
    assert time.monotonic() - start < 4 * LIMIT
