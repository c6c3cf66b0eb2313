"""Remote tars that change, and servers that answer what was not asked: never other bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import ChangedTarError, RawSample, SampleReader
from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage import remote as remote_storage
from siftclip.datamodules.storage.remote import RemoteStorage
from siftclip.errors import InputError

Make = Callable[..., Any]
ALWAYS = 1_000_000
ROWS = np.arange(20)
CAUSE = "in a tar that has changed since the pool was opened"


def put(root: Path, data: bytes, *, seconds: float = 2.0) -> None:
    """Give the second tar other content, and a later time."""
    tar = root / "shards" / "00000001.tar"
    status = tar.stat()
    tar.write_bytes(data)
    os.utime(tar, (status.st_atime, status.st_mtime + seconds))


def read(pool: Pool) -> list[RawSample | Exception]:
    found = dict(SampleReader(pool=pool, max_image_pixels=10_000).read(ROWS))
    return [found[row] for row in range(len(ROWS))]


def assert_changed(samples: list[RawSample | Exception], expected: list[Any]) -> None:
    assert samples[:10] == expected[:10]
    assert {str(sample) for sample in samples[10:]} == {CAUSE}
    assert all(isinstance(sample, ChangedTarError) for sample in samples[10:])


@pytest.mark.parametrize("conditions", ["kept", "ignored"])
@pytest.mark.parametrize("stamp", ["ETag", "Last-Modified"])
@pytest.mark.parametrize("gap_bytes", [0, 1 << 20])  # a request for each part, or for all of a tar
def test_no_sample_has_the_bytes_of_another_tar(
    root: Path,
    other: bytes,
    file_server: Any,
    load_pool: Make,
    open_remote: Make,
    monkeypatch: pytest.MonkeyPatch,
    conditions: str,
    stamp: str,
    gap_bytes: int,
) -> None:
    monkeypatch.setattr(RemoteStorage, "max_gap_bytes", gap_bytes)
    file_server.conditions, file_server.stamp = conditions, stamp
    pool, expected = open_remote(f"{file_server.url}/pool"), read(load_pool(root))
    assert read(pool) == expected
    put(root, other)
    assert_changed(read(pool), expected)
    if stamp == "ETag" and conditions == "kept":
        of_second = [r for r in file_server.of_tars() if r.path.endswith("1.tar")]
        assert of_second[-1].status == 412
    file_server.requests.clear()
    assert_changed(read(pool), expected)
    assert not any(r.path.endswith("1.tar") for r in file_server.requests)  # it is known
    assert pool.storage.retries == 0


def test_weak_tag_is_compared_and_not_asked_for(
    root: Path, other: bytes, file_server: Any, load_pool: Make, open_remote: Make
) -> None:
    file_server.weak = True
    pool, expected = open_remote(f"{file_server.url}/pool"), read(load_pool(root))
    assert read(pool) == expected
    assert {request.status for request in file_server.of_tars()} == {206}
    put(root, other)
    assert_changed(read(pool), expected)


@pytest.mark.parametrize("stamp", ["ETag", "Last-Modified"])
def test_version_that_ranges_do_not_say_is_asked_for(
    root: Path,
    other: bytes,
    file_server: Any,
    load_pool: Make,
    open_remote: Make,
    monkeypatch: pytest.MonkeyPatch,
    stamp: str,
) -> None:
    """Once in a while, as of file systems whose answers never say it."""
    file_server.conditions, file_server.stamp = "ignored", stamp
    file_server.stamps_ranges = False
    pool, expected = open_remote(f"{file_server.url}/pool"), read(load_pool(root))
    file_server.requests.clear()
    assert [read(pool) for _ in range(3)] == [expected] * 3
    assert len(file_server.of_tars("HEAD")) <= 2
    put(root, other)
    monkeypatch.setattr(remote_storage, "CHECK_SECONDS", 0.0)
    assert_changed(read(pool), expected)


def test_size_of_the_file_is_part_of_the_answer(
    root: Path, other: bytes, file_server: Any, load_pool: Make, open_remote: Make
) -> None:
    file_server.stamp = "Last-Modified"
    pool, expected = open_remote(f"{file_server.url}/pool"), read(load_pool(root))
    put(root, other + bytes(10240), seconds=0)
    assert_changed(read(pool), expected)


def test_run_stops_and_names_the_tar(
    root: Path, other: bytes, file_server: Any, open_remote: Make, stream: Make
) -> None:
    pool = open_remote(f"{file_server.url}/pool")
    put(root, other)
    with pytest.raises(InputError, match=r"/shards/00000001\.tar has changed.*siftclip index"):
        stream(pool, ROWS, substitutes=np.arange(10))


@pytest.mark.parametrize("conditions", ["kept", "ignored"])
def test_copy_of_another_tar_is_not_kept(
    root: Path,
    other: bytes,
    file_server: Any,
    load_pool: Make,
    open_remote: Make,
    conditions: str,
) -> None:
    file_server.conditions = conditions
    pool = open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
    expected = read(load_pool(root))
    put(root, other)
    assert read(pool) == expected  # the copies are still those of the old one
    for copy in (root.parent / "remote" / "shards").glob("*.tar"):
        copy.unlink()
    assert_changed(read(pool), expected)
    assert len(list((root.parent / "remote" / "shards").glob("*.tar"))) == 1


def test_copy_that_was_cut_is_made_again(
    root: Path, file_server: Any, load_pool: Make, open_remote: Make
) -> None:
    pool = open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
    for copy in (root.parent / "remote" / "shards").glob("*.tar"):
        os.truncate(copy, 1000)
    assert read(pool) == read(load_pool(root))


def test_tar_that_changes_while_it_is_indexed(
    root: Path, other: bytes, file_server: Any, open_remote: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = RemoteStorage.shards

    def shards_and_change(storage: RemoteStorage) -> Any:
        found = shards(storage)
        put(root, other)
        return found

    monkeypatch.setattr(RemoteStorage, "shards", shards_and_change)
    for shard_cache_gb in (0, 1):
        with pytest.raises(InputError, match=r"00000001\.tar has changed since the pool was"):
            open_remote(f"{file_server.url}/pool", shard_cache_gb=shard_cache_gb)


# ---- answers that were not asked for ----------------------------------------------------------


def test_other_range_than_asked_for_is_asked_again_and_not_believed(
    root: Path, file_server: Any, load_pool: Make, open_remote: Make
) -> None:
    pool, expected = open_remote(f"{file_server.url}/pool"), read(load_pool(root))
    file_server.shifted = 2
    assert read(pool) == expected
    assert pool.storage.retries == 2
    file_server.shifted = ALWAYS
    assert {str(sample) for sample in read(pool)} == {"in a tar that could not be read (OSError)"}


def test_answer_that_does_not_say_its_range_is_not_believed(
    root: Path, file_server: Any, load_pool: Make, open_remote: Make, caplog: Any
) -> None:
    pool, expected = open_remote(f"{file_server.url}/pool"), read(load_pool(root))
    file_server.stated = False
    assert {str(sample) for sample in read(pool)} == {
        "in a tar that could not be read (WholeFileError)"
    }
    whole = open_remote(f"{file_server.url}/pool", cache="whole")
    assert "does not answer range requests" in caplog.text
    assert read(whole) == expected


@pytest.mark.parametrize(
    ("stated", "error"),
    [
        ("bytes 100-199/1000", None),
        (" BYTES 100-199/* ", None),
        ("bytes 100-199/1001", connections.ChangedError),
        ("bytes 100-198/1000", OSError),
        ("bytes 0-99/1000", OSError),
        ("bytes 100-299/1000", OSError),
        ("", connections.WholeFileError),
        ("bytes */1000", connections.WholeFileError),
        ("items 100-199/1000", connections.WholeFileError),
    ],
)
def test_stated_range(stated: str, error: type[Exception] | None) -> None:
    shard = remote_storage.ShardFile(name="a.tar", path="a.tar", size_bytes=1000, stamp="")
    span = remote_storage.Span(shard, 100, 200)
    if error is None:
        connections.require_range(span, stated)
        return
    with pytest.raises(error):
        connections.require_range(span, stated)


def test_server_that_understands_no_conditions(
    root: Path, other: bytes, file_server: Any, load_pool: Make, open_remote: Make
) -> None:
    file_server.conditions = "refused"
    pool, expected = open_remote(f"{file_server.url}/pool"), read(load_pool(root))
    file_server.requests.clear()
    assert read(pool) == expected
    assert len(file_server.requests) == 2  # it is asked no more
    put(root, other)
    assert_changed(read(pool), expected)


def test_server_that_tells_no_version_is_pointed_out(
    root: Path, file_server: Any, open_remote: Make, caplog: pytest.LogCaptureFixture
) -> None:
    file_server.stamp = "none"
    open_remote(f"{file_server.url}/pool")
    assert "tells neither an ETag nor a time of change" in caplog.text


# ---- other file systems -----------------------------------------------------------------------


@pytest.mark.parametrize("shard_cache_gb", [0, 1])
def test_object_store(
    root: Path,
    other: bytes,
    upload: Make,
    object_store: dict[str, Any],
    load_pool: Make,
    open_remote: Make,
    shard_cache_gb: float,
) -> None:
    import s3fs

    url, expected = upload(root), read(load_pool(root))
    pool = open_remote(url, options=object_store, shard_cache_gb=shard_cache_gb)
    assert read(pool) == expected
    store = s3fs.S3FileSystem(**object_store, skip_instance_cache=True)
    store.pipe_file(f"{url}/shards/00000001.tar", other)
    for copy in (root.parent / "remote" / "shards").glob("*.tar"):
        copy.unlink()
    assert_changed(read(pool), expected)
    pool.storage._on_condition = False  # type: ignore[attr-defined]  # as of a store without them
    pool.storage._changed.clear()  # type: ignore[attr-defined]
    assert_changed(read(pool), expected)


@pytest.mark.parametrize("shard_cache_gb", [0, 1])
def test_file_system_whose_answers_tell_no_version(
    root: Path,
    other: bytes,
    load_pool: Make,
    open_remote: Make,
    monkeypatch: pytest.MonkeyPatch,
    shard_cache_gb: float,
) -> None:
    """It is asked for, once in a while."""
    store, expected = fsspec.filesystem("memory"), read(load_pool(root))
    store.put(str(root), "/pool", recursive=True)
    try:
        pool = open_remote("memory://pool", shard_cache_gb=shard_cache_gb)
        asked = []
        info = type(store).info
        monkeypatch.setattr(type(store), "info", lambda *a, **k: asked.append(1) or info(*a, **k))
        assert [read(pool) for _ in range(3)] == [expected] * 3
        assert len(asked) <= 2
        store.pipe_file("/pool/shards/00000001.tar", other)
        for copy in (root.parent / "remote" / "shards").glob("*.tar"):
            copy.unlink()
        monkeypatch.setattr(remote_storage, "CHECK_SECONDS", 0.0)
        assert_changed(read(pool), expected)
    finally:
        store.rm("/pool", recursive=True)
