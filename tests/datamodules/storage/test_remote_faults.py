"""Servers that fail: what passes is asked again, what stays is counted, nothing hangs or lies."""

from __future__ import annotations

import errno
import importlib
import logging
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.datamodules.pool.pool import Pool, make_storage, metadata_coverage
from siftclip.datamodules.pool.reader import BadSampleError, SampleReader
from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage import remote as remote_storage
from siftclip.datamodules.storage.remote import ATTEMPTS, RemoteStorage
from siftclip.datamodules.streaming.batches import Batch
from siftclip.errors import InputError
from siftclip.writing import WriteError

Make = Callable[..., Any]
ALWAYS = 1_000_000
ROWS = np.arange(20)


@pytest.fixture
def pool(root: Path, file_server: Any, open_remote: Make) -> Pool:
    """That pool, opened while the server was well."""
    opened = open_remote(f"{file_server.url}/{root.name}")
    file_server.requests.clear()
    return opened


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of all pauses of the storage, none of which is made; other threads do sleep."""
    made: list[float] = []
    own_time = SimpleNamespace(**{**vars(time), "sleep": made.append})
    monkeypatch.setattr(remote_storage, "time", own_time)
    return made


def read(pool: Pool, rows: np.ndarray) -> list[Any]:
    """Raw samples in the order of `rows`; the cause in place of a bad one."""
    found = dict(SampleReader(pool=pool, max_image_pixels=10_000).read(rows))
    samples = [found[index] for index in range(len(rows))]
    return [str(s) if isinstance(s, BadSampleError) else s for s in samples]


def drop_copies(root: Path) -> None:
    for copy in (root.parent / "remote" / "shards").glob("*.tar"):
        copy.unlink()


def assert_same_samples(first: list[Batch], second: list[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        for name in ("images", "tokens", "rows", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


# ---- what passes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["errors", "cuts", "whole", "hangs", "too many requests", "time-out at the server"]
)
def test_what_passes_is_asked_again(
    pool: Pool,
    root: Path,
    file_server: Any,
    load_pool: Make,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    if fault == "hangs":
        monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", 1.0)
    statuses = {"too many requests": 429, "time-out at the server": 408}
    file_server.error_status = statuses.get(fault, 503)
    setattr(file_server, "errors" if fault in statuses else fault, 3)
    started = time.monotonic()
    assert read(pool, ROWS) == read(load_pool(root), ROWS)
    assert pool.storage.retries == 3  # two tars: two reads, and one of them twice
    assert len(file_server.requests) - 3 <= 2 + (fault == "hangs")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("fault", ["errors", "cuts", "hangs"])
@pytest.mark.parametrize("shard_cache_gb", [0, 1])
def test_what_passes_in_an_object_store_is_counted_as_well(
    root: Path,
    file_server: Any,
    open_remote: Make,
    load_pool: Make,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    shard_cache_gb: float,
) -> None:
    if fault == "hangs":
        monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", 1.0)
    # a bucket is a folder to whoever gives no listings
    options = {"key": "a", "secret": "b", "endpoint_url": file_server.url}
    pool = open_remote(
        "s3://pool/shards/{00000000..00000001}.tar", options=options, shard_cache_gb=shard_cache_gb
    )
    drop_copies(root)
    setattr(file_server, fault, 3)
    assert read(pool, ROWS) == read(load_pool(root), ROWS)
    assert pool.storage.retries == 3
    file_server.errors = ALWAYS
    drop_copies(root)
    (cause,) = read(pool, np.array([3]))
    assert cause.startswith("in a tar that could not be read (")


def test_pauses_grow_and_only_what_failed_is_asked_again(
    pool: Pool,
    root: Path,
    file_server: Any,
    load_pool: Make,
    monkeypatch: pytest.MonkeyPatch,
    pauses: list[float],
) -> None:
    monkeypatch.setattr(RemoteStorage, "max_gap_bytes", 1024)
    monkeypatch.setattr(remote_storage, "FIRST_PAUSE_SECONDS", 0.25)
    file_server.errors = 20 + 3 + 1
    rows = np.arange(0, 20, 2)  # ten requests
    assert read(pool, rows) == read(load_pool(root), rows)
    assert pauses == [0.25, 0.5, 1.0]
    assert pool.storage.retries == 10 + 10 + 4
    assert len(file_server.requests) == 10 + 10 + 10 + 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_count_what_was_repeated(
    pool: Pool, root: Path, file_server: Any, load_pool: Make, stream: Make, num_workers: int
) -> None:
    expected = stream(load_pool(root), ROWS)
    file_server.errors, file_server.cuts = 2, 1
    batches = stream(pool, ROWS, num_workers=num_workers)
    assert_same_samples(batches, expected)
    assert sum(batch.retries for batch in batches) == 3
    assert all(batch.faults == () for batch in batches)


def test_pool_opens_on_a_server_that_stumbles(
    root: Path, file_server: Any, open_remote: Make, load_pool: Make
) -> None:
    file_server.errors, file_server.cuts = 9, 2
    remote = open_remote(f"{file_server.url}/pool")
    assert remote.fingerprint == load_pool(root).fingerprint
    assert remote.storage.retries >= 5


def test_whole_tars_are_copied_again_when_they_come_cut(
    root: Path, file_server: Any, open_remote: Make, load_pool: Make
) -> None:
    file_server.errors, file_server.cuts = 1, 2
    remote = open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
    assert remote.fingerprint == load_pool(root).fingerprint
    assert read(remote, ROWS) == read(load_pool(root), ROWS)


def test_copy_that_stalls_is_begun_again(
    root: Path,
    file_server: Any,
    open_remote: Make,
    load_pool: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", 0.5)
    file_server.hangs = 1
    remote = open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
    assert remote.fingerprint == load_pool(root).fingerprint
    assert remote.storage.retries == 1


# ---- what stays -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("errors", "in a tar that could not be read (HTTP status 503)"),
        ("cuts", "in a tar that could not be read (ClientPayloadError)"),
        ("whole", "in a tar that could not be read (WholeFileError)"),
        ("hangs", "in a tar that could not be read (TimeoutError)"),
    ],
)
def test_what_stays_is_a_bad_sample(
    pool: Pool,
    file_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    cause: str,
) -> None:
    if fault == "hangs":  # others answer, on a busy machine later than that
        monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", 0.2)
    setattr(file_server, fault, ALWAYS)
    started = time.monotonic()
    assert read(pool, np.array([3])) == [cause]
    assert time.monotonic() - started < 5
    if fault == "hangs":  # asked again beside the first, as often as there is time for
        assert pool.storage.retries > 0
    else:  # then image and caption once each, alone
        assert pool.storage.retries == ATTEMPTS - 1
        assert len(file_server.requests) == ATTEMPTS + 2
    monkeypatch.undo()
    monkeypatch.setattr(remote_storage, "FIRST_PAUSE_SECONDS", 0.002)
    setattr(file_server, fault, 0)
    assert isinstance(read(pool, np.array([3]))[0], tuple)
    if fault != "hangs":
        setattr(file_server, fault, 1)
        assert isinstance(read(pool, np.array([3]))[0], tuple)  # it is trusted again


@pytest.mark.parametrize("shard_cache_gb", [0, 1])
def test_tar_that_has_recovered_is_asked_as_often_as_at_first(
    root: Path,
    file_server: Any,
    open_remote: Make,
    load_pool: Make,
    pauses: list[float],
    shard_cache_gb: float,
) -> None:
    """Fails, is asked once while it fails, recovers, and stumbles again as much as it may."""
    pool = open_remote(f"{file_server.url}/pool", shard_cache_gb=shard_cache_gb)
    rows = np.array([3])
    drop_copies(root)
    file_server.errors = ALWAYS
    for _ in range(2):
        assert read(pool, rows) == ["in a tar that could not be read (HTTP status 503)"]
    assert len(pauses) == ATTEMPTS - 1  # all before the first answer
    file_server.errors = 0
    assert read(pool, rows) == read(load_pool(root), rows)
    drop_copies(root)
    file_server.errors = ATTEMPTS - 1
    assert read(pool, rows) == read(load_pool(root), rows)
    assert len(pauses) == 2 * (ATTEMPTS - 1)


def test_answer_that_is_not_the_range_is_not_transferred(
    make_samples: Make, write_pool: Make, file_server: Any, open_remote: Make
) -> None:
    samples = make_samples(4)
    samples[2].image += bytes(40 << 20)  # a tar that does not fit into the buffers of sockets
    write_pool(samples, shards=1)
    pool = open_remote(f"{file_server.url}/pool")
    file_server.whole = ALWAYS
    file_server.requests.clear()
    (cause,) = read(pool, np.array([0]))
    assert "WholeFileError" in cause
    while file_server.answering:  # what the server still does
        time.sleep(0.01)
    assert file_server.aborted == len(file_server.requests) == ATTEMPTS + 2


def test_bad_samples_are_replaced_from_tars_that_can_be_read(
    pool: Pool, root: Path, stream: Make, load_pool: Make
) -> None:
    (root / "shards" / "00000001.tar").unlink()
    good = np.arange(10)
    batches = stream(pool, ROWS, num_workers=2, substitutes=good)
    assert all(batch.valid.all() and (batch.rows < 10).all() for batch in batches)
    causes = Counter(cause for batch in batches for cause, _ in batch.faults)
    assert set(causes) == {"in a tar that is not there any more"}
    assert causes.total() == 20  # of two passes over the pool
    assert sum(batch.retries for batch in batches) == 0


def test_only_the_tar_that_is_gone_is_bad(
    pool: Pool, root: Path, file_server: Any, load_pool: Make
) -> None:
    expected = read(load_pool(root), ROWS)
    (root / "shards" / "00000000.tar").unlink()
    gone = ["in a tar that is not there any more"] * 10
    assert read(pool, ROWS) == gone + expected[10:]
    assert pool.storage.retries == 0


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (403, "may not be read"),
        (410, "is not there any more"),
        (400, "could not be read (HTTP status 400)"),
    ],
)
@pytest.mark.parametrize("shard_cache_gb", [0, 1])
def test_refusals_are_not_repeated(
    root: Path,
    file_server: Any,
    open_remote: Make,
    shard_cache_gb: float,
    status: int,
    reason: str,
) -> None:
    pool = open_remote(f"{file_server.url}/pool", shard_cache_gb=shard_cache_gb)
    drop_copies(root)
    file_server.errors, file_server.error_status = ALWAYS, status
    assert read(pool, np.array([3])) == [f"in a tar that {reason}"]
    assert pool.storage.retries == 0


def test_tar_that_is_shorter_by_now_has_changed(
    pool: Pool, root: Path, open_remote: Make, file_server: Any
) -> None:
    cached = open_remote(f"{file_server.url}/pool", shard_cache_gb=1, cache="cached")
    shutil.rmtree(root.parent / "cached" / "shards")
    tar = root / "shards" / "00000001.tar"
    tar.write_bytes(tar.read_bytes()[:512])
    good, *bad = read(pool, np.array([3, 13, 19]))
    assert not isinstance(good, str)
    assert bad == ["in a tar that has changed since the pool was opened"] * 2
    file_server.requests.clear()
    assert (
        read(cached, np.arange(13, 17))
        == ["in a tar that has changed since the pool was opened"] * 4
    )
    assert len(file_server.requests) == 1  # one transfer is enough to know


def test_run_on_a_server_that_is_gone_ends_with_a_message(
    pool: Pool, file_server: Any, stream: Make
) -> None:
    file_server.errors = ALWAYS
    with pytest.raises(InputError, match=r"21 samples.*in a row are bad.*HTTP status 503"):
        stream(pool, ROWS, num_workers=1)


def test_index_of_a_broken_tar_is_an_error_with_its_name(
    root: Path, file_server: Any, open_remote: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteStorage, "_answers_ranges", lambda *_: True)
    file_server.cuts = ALWAYS
    match = r"/shards/0000000\d\.tar could not be read \(ClientPayloadError\)\.$"
    for shard_cache_gb in (0, 1):
        with pytest.raises(InputError, match=match):
            open_remote(f"{file_server.url}/pool", shard_cache_gb=shard_cache_gb)


@pytest.mark.parametrize("ranges", [False, True])
def test_full_disk_is_not_the_fault_of_the_samples(
    root: Path,
    file_server: Any,
    open_remote: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ranges: bool,
) -> None:
    """A server that answers ranges is read without the copies of tars."""
    file_server.ranges = ranges

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("siftclip.datamodules.storage.remote.copy_file", full)
    if not ranges:
        with pytest.raises(WriteError, match=r"tar cannot be written: its disk is full"):
            open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
        return
    pool = open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
    assert "its disk is full" in caplog.text
    assert "reads from" in caplog.text
    assert read(pool, np.arange(20)) == read(open_remote(str(root)), np.arange(20))


def test_metadata_that_cannot_be_copied_is_an_error_with_its_name(
    root: Path, make_samples: Make, write_metadata: Make, file_server: Any, pool: Pool
) -> None:
    write_metadata(root / "metadata", [sample.uid for sample in make_samples(20)])
    file_server.cuts = ALWAYS
    with pytest.raises(InputError, match=r"/metadata/\w+\.parquet could not be read"):
        metadata_coverage(pool)
    file_server.cuts, file_server.errors = 0, ALWAYS
    with pytest.raises(InputError, match=r"cannot be listed: ClientResponseError: 503"):
        metadata_coverage(pool)
    file_server.errors = 0
    coverage = metadata_coverage(pool)
    assert coverage is not None
    assert coverage.present == 20


# ---- what was never right ---------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("kind", ["http", "braces", "s3"])
def test_host_that_refuses_connections(open_remote: Make, kind: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    roots = {"http": f"{url}/pool", "braces": f"{url}/{{0..3}}.tar", "s3": "s3://bucket/pool"}
    options = {"key": "a", "secret": "b", "endpoint_url": url} if kind == "s3" else {}
    started = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be listed: \w+: .*(connect|Connect)"):
        open_remote(roots[kind], options=options)
    assert time.monotonic() - started < 8


def test_server_that_never_answers_is_given_up(
    root: Path, file_server: Any, open_remote: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", 0.3)
    file_server.hangs = ALWAYS
    with pytest.raises(InputError, match=r"cannot be listed: TimeoutError"):
        open_remote(f"{file_server.url}/pool")


def test_bucket_that_does_not_exist(object_store: dict[str, Any], open_remote: Make) -> None:
    with pytest.raises(
        InputError, match=r"s3://no-such-bucket/pool.*(holds none|cannot be listed)"
    ):
        open_remote("s3://no-such-bucket/pool", options=object_store)


def test_wrong_key_is_not_shown(open_remote: Make, object_store: dict[str, Any]) -> None:
    options = {**object_store, "secret": "very secret", "client_kwargs": None, "mistake": {}}
    with pytest.raises(InputError) as caught:
        open_remote("nonsense://bucket/pool", options=options)
    assert "nonsense" in str(caught.value)
    assert "mistake" in str(caught.value)
    assert "very secret" not in str(caught.value)


def test_missing_package_is_named(open_remote: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module("fsspec.registry").known_implementations
    missing = {"class": "no_such_gcsfs.GCSFileSystem", "err": "Please install gcsfs"}
    monkeypatch.setitem(known, "gs", missing)
    with pytest.raises(
        InputError, match=r"root cannot be read .*Please install gcsfs. Got 'gs://bucket/pool'"
    ):
        open_remote("gs://bucket/pool")


def test_options_of_a_url_are_refused_for_a_folder(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is for pools behind a URL"):
        make_storage(str(root), cache_dir=tmp_path, options={"anon": True}, shard_cache_gb=0)


def test_server_without_sizes(root: Path, file_server: Any, open_remote: Make) -> None:
    file_server.sizes = False
    with pytest.raises(InputError, match=r"does not tell the size of http.*\.tar"):
        open_remote(f"{file_server.url}/pool")


def test_storage_reports_nothing_while_all_is_well(
    root: Path, file_server: Any, open_remote: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="siftclip"):
        open_remote(f"{file_server.url}/pool")
    assert caplog.text == ""
