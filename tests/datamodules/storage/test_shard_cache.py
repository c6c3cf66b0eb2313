"""Copies of tars stay within their limit, whoever fetches, is killed, or comes at the same time."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.datamodules.storage.local import ShardFile
from siftclip.datamodules.storage.shard_cache import ShardCache
from siftclip.errors import InputError
from siftclip.writing import WriteError

FORK = multiprocessing.get_context("fork")


def shard(number: int, size_bytes: int, stamp: str = "1") -> ShardFile:
    name = f"{number:08d}.tar"
    return ShardFile(name=name, path=f"bucket/{name}", size_bytes=size_bytes, stamp=stamp)


def content(file: ShardFile) -> bytes:
    return f"{file.name} {file.stamp} ".encode().ljust(file.size_bytes, b".")[: file.size_bytes]


def writer(file: ShardFile, log: list[Any]) -> Callable[[Path], None]:
    """A download that is noted in `log`."""

    def download(path: Path) -> None:
        log.append((file.name, file.stamp))
        path.write_bytes(content(file))

    return download


def copies(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.glob("*.tar"))


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


# (number of a tar, its stamp) in the order of access; sizes follow from the number
ACCESSES = st.lists(st.tuples(st.integers(0, 7), st.sampled_from("12")), max_size=40)


@settings(max_examples=40)
@given(accesses=ACCESSES, limit_bytes=st.integers(80, 400))
def test_those_used_least_recently_go(
    tmp_path_factory: pytest.TempPathFactory,
    accesses: list[tuple[int, str]],
    limit_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    twin: OrderedDict[tuple[str, str], bytes] = OrderedDict()
    for number, stamp in accesses:
        file = shard(number, 10 * (number + 1), stamp)
        log: list[Any] = []
        # a new object each time: all that it knows is in the folder
        path = ShardCache(folder, limit_bytes=limit_bytes).fetch(file, writer(file, log))
        assert path.read_bytes() == content(file)
        key = (file.name, stamp)
        assert log == ([] if key in twin else [key])
        twin[key] = content(file)
        twin.move_to_end(key)
        while sum(map(len, twin.values())) > limit_bytes:
            twin.popitem(last=False)
        assert copies(folder) == sorted(twin.values())
        assert sum(map(len, copies(folder))) <= limit_bytes


def test_tar_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=1_999_999_999)
    log: list[Any] = []
    file = shard(3, 2_000_000_000)
    match = r"hold at least one tar\. 00000003\.tar has 2\.000 GB, the cache 2\.000 GB"
    with pytest.raises(InputError, match=match):
        cache.fetch(file, writer(file, log))
    assert log == []


def test_tar_of_just_the_limit_fits(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=100)
    for number in (1, 2, 1):
        file = shard(number, 100)
        cache.fetch(file, writer(file, []))
        assert cache.holds(file)
        assert copies(tmp_path) == [content(file)]


def test_changed_stamp_is_another_copy(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=1000)
    log: list[Any] = []
    for stamp in ("1", "2", "1", "2"):
        file = shard(0, 50, stamp)
        assert cache.fetch(file, writer(file, log)).read_bytes() == content(file)
    assert log == [("00000000.tar", "1"), ("00000000.tar", "2")]
    assert not cache.holds(shard(0, 50, "3"))


def test_same_name_in_another_place_is_another_copy(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=1000)
    here = shard(0, 50)
    there = ShardFile(name=here.name, path="other/00000000.tar", size_bytes=50, stamp="1")
    cache.fetch(here, lambda path: path.write_bytes(b"here") and None)
    assert not cache.holds(there)


def test_failed_download_leaves_and_evicts_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=100)
    kept = shard(1, 100)
    cache.fetch(kept, writer(kept, []))

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        cache.fetch(shard(2, 100), fail)
    assert copies(tmp_path) == [content(kept)]
    assert temporaries(tmp_path) == []
    file = shard(2, 100)
    assert cache.fetch(file, writer(file, [])).read_bytes() == content(file)


def test_tars_that_are_not_copies_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "00000000.tar"  # of a local pool, whose folder was given for the cache
    mine.write_bytes(bytes(500))
    cache = ShardCache(tmp_path, limit_bytes=100)
    for number in range(3):
        file = shard(number, 60)
        cache.fetch(file, writer(file, []))
    assert mine.stat().st_size == 500
    assert len(copies(tmp_path)) == 2


@pytest.mark.parametrize("name", ["a[1].tar", "*.tar", "?.tar", "ü b.tar"])
def test_names_are_not_patterns(tmp_path: Path, name: str) -> None:
    cache = ShardCache(tmp_path, limit_bytes=1000)
    file = ShardFile(name=name, path=name, size_bytes=10, stamp="1")
    other = tmp_path / ".another.tar.1.tmp"
    other.write_bytes(b"")
    path = cache._path(file)
    left = path.with_name(f".{path.name}.99999999.tmp")
    left.write_bytes(b"of a process that was killed")
    assert cache.fetch(file, writer(file, [])).read_bytes() == content(file)
    assert temporaries(tmp_path) == [other]


def test_processes_that_want_the_same_tar_download_it_once(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=1000)
    file = shard(0, 100)
    started, results = FORK.Barrier(4), FORK.SimpleQueue()

    def fetch() -> None:
        def download(path: Path) -> None:
            (tmp_path / f"download-{os.getpid()}").touch()
            path.write_bytes(content(file)[:50])
            time.sleep(0.2)
            path.write_bytes(content(file))

        started.wait()
        results.put(cache.fetch(file, download).read_bytes())

    processes = [FORK.Process(target=fetch) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert [results.get() for _ in processes] == [content(file)] * 4
    assert len(list(tmp_path.glob("download-*"))) == 1


class _SlowCache(ShardCache):
    """Leaves time for others between making room and filling it."""

    def _make_room(self, size_bytes: int) -> None:
        super()._make_room(size_bytes)
        time.sleep(0.1)


def test_limit_holds_when_processes_end_different_downloads_at_once(tmp_path: Path) -> None:
    cache = _SlowCache(tmp_path, limit_bytes=250)  # two and a half of them
    started = FORK.Barrier(4)

    def fetch(number: int) -> None:
        file = shard(number, 100)
        started.wait()
        cache.fetch(file, writer(file, []))

    processes = [FORK.Process(target=fetch, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert len(copies(tmp_path)) == 2
    assert temporaries(tmp_path) == []


def test_process_killed_in_a_download_leaves_nothing_that_counts_or_blocks(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=100)
    file = shard(0, 100)
    halfway = FORK.Event()

    def fetch() -> None:
        def download(path: Path) -> None:
            path.write_bytes(content(file)[:50])
            halfway.set()
            time.sleep(60)

        cache.fetch(file, download)

    process = FORK.Process(target=fetch)
    process.start()
    assert halfway.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert len(temporaries(cache.folder)) == 1
    assert not cache.holds(file)
    other = shard(1, 100)
    cache.fetch(other, writer(other, []))
    assert copies(cache.folder) == [content(other)]
    log: list[Any] = []
    started = time.monotonic()
    assert cache.fetch(file, writer(file, log)).read_bytes() == content(file)
    assert time.monotonic() - started < 5
    assert log == [(file.name, "1")]
    assert copies(cache.folder) == [content(file)]
    assert temporaries(cache.folder) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Tars are copied all the same, and what another process is just writing is left alone."""

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache, file = ShardCache(tmp_path / "shards", limit_bytes=200), shard(0, 60)
    others = tmp_path / "shards" / f".{cache._path(file).name}.1.tmp"
    others.parent.mkdir()
    others.write_bytes(b"half")
    assert cache.fetch(file, writer(file, [])).read_bytes() == content(file)
    assert others.exists()


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    cache = ShardCache(tmp_path / "shards", limit_bytes=200)
    match = r"shards cannot be written: its file system is read-only\. Choose another folder"
    with pytest.raises(WriteError, match=match):
        cache.fetch(shard(0, 60), writer(shard(0, 60), []))
