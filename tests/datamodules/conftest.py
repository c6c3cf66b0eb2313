"""What streaming needs beside a pool: open_clip's transforms and tokenizer, all picklable.

And for pools behind a URL: an HTTP server that fails when it is told to, and an object store.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

from siftclip.datamodules.models.load import Tokenizer, Transform
from siftclip.datamodules.pool.pool import Pool, make_storage, open_pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.storage import remote as remote_storage
from siftclip.datamodules.streaming.batches import Batch, SampleDataset
from siftclip.datamodules.streaming.datamodule import LoaderOptions, OrderSampler, make_loader
from siftclip.datamodules.streaming.order import SampleOrder

# Draws from torch's and from Python's random numbers, as a user's aug_cfg may
AUGMENTATION = AugmentationCfg(
    scale=(0.3, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.5,
    gray_scale_prob=0.3,
)


@pytest.fixture(scope="session")
def transform() -> Transform:
    """A random augmentation to 16 x 16 pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # open_clip calls the colour jitter unused, but applies it
        return image_transform_v2(PreprocessCfg(size=16), is_train=True, aug_cfg=AUGMENTATION)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return open_clip.SimpleTokenizer(context_length=12)


@pytest.fixture
def root(make_samples: Callable[..., Any], write_pool: Callable[..., Any]) -> Path:
    """Twenty samples in two tars."""
    return write_pool(make_samples(20), shards=2)


@pytest.fixture
def other(make_samples: Callable[..., Any], write_tar: Callable[..., Any], root: Path) -> bytes:
    """A tar as large as the second one, with the same names and sizes and other samples."""
    samples = make_samples(10, start=10)
    for sample in samples:
        sample.image, sample.caption = sample.image[::-1], sample.caption[::-1]
    members = [member for sample in samples for member in sample.members()]
    data = write_tar(root.parent / "other.tar", members).read_bytes()
    assert len(data) == (root / "shards" / "00000001.tar").stat().st_size
    return data


@pytest.fixture
def make_dataset(transform: Transform, tokenizer: Tokenizer) -> Callable[..., SampleDataset]:
    """`make_dataset(pool, substitutes=rows)`; without it every row of the pool may be one."""

    def make(
        pool: Pool,
        *,
        seed: int = 7,
        max_image_pixels: int = 10_000,
        substitutes: np.ndarray | str | None = "all",
    ) -> SampleDataset:
        if isinstance(substitutes, str):
            substitutes = np.arange(len(pool))
        return SampleDataset(
            reader=SampleReader(pool=pool, max_image_pixels=max_image_pixels),
            transform=transform,
            tokenizer=tokenizer,
            seed=seed,
            substitutes=substitutes,
        )

    return make


class Request(NamedTuple):
    """What a server was asked, and what it gave."""

    method: str
    path: str
    status: int
    sent_bytes: int


@dataclass(kw_only=True)
class FileServer:
    """Serves a folder over HTTP. What it does wrong is set while it runs.

    The counts are of GETs of files (not of listings), and go down by one with each that fails.
    """

    folder: Path
    url: str = ""
    ranges: bool = True  # False: 200 and the whole file
    listings: bool = True  # False: 404 for folders
    stamp: str = "ETag"  # or Last-Modified, or none
    weak: bool = False  # the ETag
    sizes: bool = True  # False: no Content-Length for HEAD and for whole files
    errors: int = 0  # answered with `error_status`, also for HEAD
    error_status: int = 503
    cuts: int = 0  # closed after half of the body
    whole: int = 0  # answered as if `ranges` were False
    shifted: int = 0  # answered with the bytes behind those that were asked for, and says so
    conditions: str = "kept"  # or "ignored", or "refused", each of them
    stated: bool = True  # False: no Content-Range
    stamps_ranges: bool = True  # False: the stamp is for HEAD and for whole files alone
    hangs: int = 0  # not answered before `released`
    answering: int = 0  # requests at the moment
    aborted: int = 0  # bodies that a client did not want
    released: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, count: str) -> bool:
        """Whether the next request is to fail in this way."""
        with self.lock:
            left = getattr(self, count)
            setattr(self, count, max(0, left - 1))
            return bool(left)

    def of_tars(self, method: str = "GET") -> list[Request]:
        """The requests for tars."""
        return [r for r in self.requests if r.method == method and r.path.endswith(".tar")]

    def sent_bytes(self) -> int:
        """Of tars."""
        return sum(request.sent_bytes for request in self.of_tars())


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as real servers do

    def __init__(self, *args: Any, served: FileServer) -> None:
        self.served = served
        super().__init__(*args, directory=str(served.folder))

    def handle(self) -> None:
        with suppress(ConnectionError):  # of clients that have gone
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Into the record of the server, not to the terminal."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        with self.served.lock:
            self.served.answering += 1
        try:
            self.answer(with_body=True)
        finally:
            with self.served.lock:
                self.served.answering -= 1

    def answer(self, *, with_body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_dir():
            if self.served.listings:
                self.note(200, 0)
                super().do_GET()
            else:
                self.send(404, {}, b"")
        elif self.served.take("errors"):
            self.send(self.served.error_status, {}, b"")
        elif not path.is_file():
            self.send(404, {}, b"")
        else:
            self.send_file(path, with_body)

    def send_file(self, path: Path, with_body: bool) -> None:
        data, status = path.read_bytes(), path.stat()
        headers = {}
        if self.served.stamp == "Last-Modified":
            headers = {"Last-Modified": formatdate(status.st_mtime, usegmt=True)}
        elif self.served.stamp == "ETag":
            weak = "W/" if self.served.weak else ""
            headers = {"ETag": f'{weak}"{status.st_mtime_ns:x}-{status.st_size:x}"'}
        wanted, kept = self.headers.get("If-Match"), self.served.conditions
        if wanted and (kept == "refused" or (kept == "kept" and wanted != headers.get("ETag"))):
            self.send(412, {}, b"")
            return
        if not with_body:
            self.send(200, headers, data, only_headers=True)
            return
        if self.served.take("hangs"):
            self.served.released.wait(30)
        asked = self.headers.get("Range")
        code = 200
        if asked and self.served.ranges and not self.served.take("whole"):
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, len(data)) if last else len(data)
            if self.served.take("shifted"):
                start, end = start + 512, end + 512
            if self.served.stated:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            if not self.served.stamps_ranges:
                headers.pop(self.served.stamp, None)
            code, data = 206, data[start:end]
        self.send(code, headers, data, cut=self.served.take("cuts"))

    def send(
        self,
        code: int,
        headers: dict[str, str],
        data: bytes,
        *,
        only_headers: bool = False,
        cut: bool = False,
    ) -> None:
        body = b"" if only_headers else data[: len(data) // 2] if cut else data
        self.note(code, len(body))
        self.send_response(code)
        if self.served.sizes or code != 200:
            headers["Content-Length"] = str(len(data))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:  # a client that has heard enough
            cut = True
            self.served.aborted += 1
        self.close_connection = cut or not self.served.sizes

    def note(self, code: int, sent_bytes: int) -> None:
        self.served.requests.append(Request(self.command, self.path, code, sent_bytes))


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[FileServer]:
    """An HTTP server over the test's folder: `write_pool`'s pool is at `file_server.url/pool`."""
    served = FileServer(folder=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, served=served))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def object_store() -> Iterator[dict[str, Any]]:
    """An S3 server; the fixture is the storage options for it."""
    from moto.server import ThreadedMotoServer  # takes a second

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = {"endpoint_url": f"http://{host}:{port}"}
    yield {"key": "test", "secret": "test", "client_kwargs": endpoint}
    server.stop()


@pytest.fixture
def upload(object_store: dict[str, Any]) -> Callable[[Path], str]:
    """`upload(folder)`: its URL in a bucket of its own."""
    import s3fs

    def copy(folder: Path) -> str:
        store = s3fs.S3FileSystem(**object_store, skip_instance_cache=True)
        bucket = f"bucket-{time.time_ns()}"
        store.mkdir(bucket)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            store.pipe_file(f"{bucket}/data/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{bucket}/data"

    return copy


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_storage, "FIRST_PAUSE_SECONDS", 0.002)


@pytest.fixture
def open_remote(tmp_path: Path, _short_pauses: None) -> Callable[..., Pool]:
    """`open_remote(url, options={}, shard_cache_gb=0)`: the pool, its indices in the test's folder.

    Pauses between attempts are short.
    """

    def load(
        root: str,
        *,
        options: dict[str, Any] | None = None,
        shard_cache_gb: float = 0.0,
        cache: str = "remote",
    ) -> Pool:
        folder = tmp_path / cache
        storage = make_storage(
            root, cache_dir=folder, options=options or {}, shard_cache_gb=shard_cache_gb
        )
        return open_pool(storage, cache_dir=folder, max_bad_fraction=0.0, progress=False)

    return load


@pytest.fixture
def stream(make_dataset: Callable[..., SampleDataset]) -> Callable[..., list[Batch]]:
    """`stream(pool, rows, num_workers=0, start_method=None)`: the batches of five steps of eight.

    Bad samples are replaced by rows of `substitutes`, by default any of the pool.
    """

    def load(
        pool: Pool,
        rows: np.ndarray,
        *,
        num_workers: int = 0,
        start_method: Any = None,
        substitutes: Any = "all",
    ) -> list[Batch]:
        dataset = make_dataset(pool, substitutes=substitutes)
        sampler = OrderSampler(
            order=SampleOrder(rows=rows, seed=7, global_batch=8),
            global_batch=8,
            start_step=0,
            total_steps=5,
            rank=0,
            world_size=1,
        )
        options = LoaderOptions(num_workers=num_workers, start_method=start_method)
        return list(make_loader(dataset, sampler, options, pin_memory=False))

    return load
