"""Pools behind a URL hold and stream what the local folder does that they were copied from."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.features.store import open_features
from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.pool.pool import Pool, metadata_coverage
from siftclip.datamodules.pool.reader import BadSampleError, SampleReader
from siftclip.datamodules.storage import connections
from siftclip.datamodules.storage.local import ShardFile, Span
from siftclip.datamodules.storage.remote import RemoteStorage
from siftclip.datamodules.storage.shard_cache import ShardCache
from siftclip.datamodules.streaming.batches import Batch
from siftclip.errors import InputError

Make = Callable[..., Any]
ROWS = np.array([0, 2, 3, 3, 3, 8, 10, 11, 14, 17, 19])
ARRAYS = (
    "uids",
    "keys",
    "shard_of_row",
    "sample_offsets_bytes",
    "sample_sizes_bytes",
    "image_offsets_bytes",
    "image_sizes_bytes",
    "text_offsets_bytes",
    "text_sizes_bytes",
)


@pytest.fixture
def root(make_samples: Make, write_pool: Make) -> Path:
    """Twenty samples in three tars."""
    return write_pool(make_samples(20), shards=3)


@pytest.fixture
def place(file_server: Any, request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """`place("http", folder)` or `place("s3", folder)`: root and options of the pool there."""

    def find(kind: str, folder: Path) -> dict[str, Any]:
        if kind == "http":
            return {"root": f"{file_server.url}/{folder.name}"}
        url = request.getfixturevalue("upload")(folder)
        return {"root": url, "options": request.getfixturevalue("object_store")}

    return find


def assert_same_pool(remote: Pool, local: Pool) -> None:
    assert isinstance(remote.storage, RemoteStorage)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(remote, name), getattr(local, name))
    assert remote.fingerprint == local.fingerprint
    assert [s.name for s in remote.shards] == [s.name for s in local.shards]
    assert [s.size_bytes for s in remote.shards] == [s.size_bytes for s in local.shards]


def read(pool: Pool, rows: np.ndarray) -> list[Any]:
    """Raw samples in the order of `rows`; the cause in place of a bad one."""
    found = dict(SampleReader(pool=pool, max_image_pixels=10_000).read(rows))
    assert len(found) == len(rows)
    samples = [found[index] for index in range(len(rows))]
    return [str(s) if isinstance(s, BadSampleError) else s for s in samples]


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) == 5
    for one, other in zip(first, second, strict=True):
        for name in ("images", "tokens", "rows", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.faults == other.faults


# ---- the same pool ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["shards", "flat"])
@pytest.mark.parametrize("kind", ["http", "s3"])
def test_remote_pool_is_the_local_one(
    make_samples: Make,
    write_pool: Make,
    place: Make,
    load_pool: Make,
    open_remote: Make,
    kind: str,
    layout: str,
) -> None:
    root = write_pool(make_samples(20), shards=3, layout=layout)
    local, remote = load_pool(root), open_remote(**place(kind, root))
    assert_same_pool(remote, local)
    rows = np.random.default_rng(3).integers(0, 20, 40)  # many repeat
    assert read(remote, rows) == read(local, rows)
    reader = SampleReader(pool=remote, max_image_pixels=10_000)
    assert reader.read_caption(7) == "caption of sample 7"
    assert remote.storage.retries == 0


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_names_that_need_quoting(
    root: Path, place: Make, load_pool: Make, open_remote: Make, kind: str
) -> None:
    tars = sorted((root / "shards").iterdir())
    for tar, name in zip(tars, ("a b+c[1].tar", "d%20e#f.tar", "g?h&é=.tar"), strict=True):
        tar.rename(tar.with_name(name))
    root = root.rename(root.with_name("my pool"))
    local, remote = load_pool(root), open_remote(**place(kind, root))
    assert_same_pool(remote, local)
    assert read(remote, np.arange(20)) == read(local, np.arange(20))
    cached = open_remote(**place(kind, root), shard_cache_gb=1, cache="other")
    assert read(cached, np.arange(20)) == read(local, np.arange(20))


def test_braces_name_the_tars_where_there_are_no_listings(
    root: Path, file_server: Any, load_pool: Make, open_remote: Make
) -> None:
    file_server.listings = False
    with pytest.raises(InputError, match=r"holds none\. A server without listings needs the names"):
        open_remote(f"{file_server.url}/pool")
    remote = open_remote(f"{file_server.url}/pool/shards/{{00000000..00000002}}.tar")
    assert_same_pool(remote, load_pool(root))
    assert read(remote, ROWS) == read(load_pool(root), ROWS)
    assert metadata_coverage(remote) is None
    asked = open_remote(f"{file_server.url}/pool/shards/{{00000000..00000002}}.tar?download=true")
    assert_same_pool(asked, remote)  # a query is no part of a name
    with pytest.raises(InputError, match=r"cannot be listed: ClientResponseError: 404.*00000003"):
        open_remote(f"{file_server.url}/pool/shards/{{00000000..00000003}}.tar")


@pytest.mark.parametrize("shard_cache_gb", [0, 1])
def test_file_system_that_is_not_async(
    root: Path, load_pool: Make, open_remote: Make, shard_cache_gb: float
) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(root), "/pool", recursive=True)
    try:
        remote = open_remote("memory://pool", shard_cache_gb=shard_cache_gb)
        assert_same_pool(remote, load_pool(root))
        assert read(remote, ROWS) == read(load_pool(root), ROWS)
        store.rm("/pool/shards/00000001.tar")
        if shard_cache_gb == 0:
            (cause,) = read(remote, np.array([8]))[:1]
            assert cause == "in a tar that is not there any more"
    finally:
        store.rm("/pool", recursive=True)


def test_tars_of_the_same_name_are_refused(root: Path, file_server: Any, open_remote: Make) -> None:
    shutil.copytree(root / "shards", root / "more")
    with pytest.raises(InputError, match=r"must have different names.*/shards/0.*/more/0"):
        open_remote(f"{file_server.url}/pool/{{shards,more}}/00000000.tar")


def test_listing_cannot_name_a_place_outside_of_the_cache(
    root: Path, file_server: Any, open_remote: Make, tmp_path: Path
) -> None:
    page = '<a href="..%2f..%2fshards%2f00000001.tar">a tar</a>'
    (root / "shards" / "index.html").write_text(page)
    shutil.copytree(root / "shards", root.parent / "shards")
    pool = open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
    assert [shard.name for shard in pool.shards] == ["00000001.tar"]
    assert len(pool) == 7
    assert len(list((tmp_path / "remote" / "shards").glob("*.tar"))) == 1


# ---- what is transferred ----------------------------------------------------------------------


def test_about_the_selected_bytes_are_transferred(
    make_samples: Make,
    write_pool: Make,
    file_server: Any,
    open_remote: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_pool(make_samples(60), shards=3)
    pool = open_remote(f"{file_server.url}/pool")
    monkeypatch.setattr(RemoteStorage, "max_gap_bytes", 1024)  # to the caption, not further
    file_server.requests.clear()
    rows = np.array([5, 17, 17, 33, 59])
    read(pool, rows)
    chosen = np.unique(rows)
    wanted = (pool.image_sizes_bytes[chosen] + pool.text_sizes_bytes[chosen]).sum()
    assert wanted <= file_server.sent_bytes() <= wanted + 1024 * len(chosen)
    assert {request.status for request in file_server.requests} == {206}
    assert len(file_server.requests) == 4  # the caption follows its image; repeats come once


def test_neighbours_come_in_one_request(
    root: Path, file_server: Any, open_remote: Make, load_pool: Make
) -> None:
    pool = open_remote(f"{file_server.url}/pool")
    file_server.requests.clear()
    assert read(pool, np.arange(20)) == read(load_pool(root), np.arange(20))
    assert len(file_server.requests) == 3  # tars


def test_index_is_made_once_and_again_for_a_tar_that_has_changed(
    root: Path,
    make_samples: Make,
    write_tar: Make,
    file_server: Any,
    load_pool: Make,
    open_remote: Make,
) -> None:
    sizes = sum(path.stat().st_size for path in (root / "shards").iterdir())
    url = f"{file_server.url}/pool"
    first = open_remote(url)
    assert file_server.sent_bytes() <= sizes + 2
    for stamp in ("ETag", "Last-Modified"):
        file_server.stamp = stamp
        open_remote(url)
        file_server.requests.clear()
        assert open_remote(url).fingerprint == first.fingerprint
        assert file_server.sent_bytes() <= 2  # to see whether ranges are answered
        tar = root / "shards" / "00000001.tar"
        before = tar.stat()
        samples = make_samples(14, start=7)
        for sample in samples:  # of the same lengths
            flipped = sample.uid[::-1] if stamp == "ETag" else sample.uid[1:] + sample.uid[:1]
            sample.record = sample.record.replace(sample.uid.encode(), flipped.encode())
        write_tar(tar, [member for sample in samples[:7] for member in sample.members()])
        assert tar.stat().st_size == before.st_size
        os.utime(tar, (before.st_atime, before.st_mtime + 2))
        file_server.requests.clear()
        changed = open_remote(url)
        assert changed.fingerprint != first.fingerprint
        assert_same_pool(changed, load_pool(root))
        tars = {request.path for request in file_server.of_tars() if request.sent_bytes > 2}
        assert tars == {"/pool/shards/00000001.tar"}
        first = changed


def test_one_storage_sees_what_has_changed_in_a_bucket(
    root: Path, upload: Make, object_store: dict[str, Any], open_remote: Make
) -> None:
    import s3fs

    url = upload(root)
    pool = open_remote(url, options=object_store)
    store = s3fs.S3FileSystem(**object_store, skip_instance_cache=True)
    store.pipe_file(f"{url}/shards/00000002.tar", b"x" * pool.shards[2].size_bytes)
    before, after = pool.shards, pool.storage.shards()
    assert [b.stamp == a.stamp for b, a in zip(before, after, strict=True)] == [True, True, False]


# ---- streaming --------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_cache_gb", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["http", "s3"])
def test_forked_workers_of_a_parent_that_has_read_give_the_same_batches(
    root: Path,
    place: Make,
    load_pool: Make,
    open_remote: Make,
    stream: Make,
    kind: str,
    shard_cache_gb: float,
) -> None:
    expected = stream(load_pool(root), ROWS)
    remote = open_remote(**place(kind, root), shard_cache_gb=shard_cache_gb)
    assert_equal(stream(remote, ROWS), expected)
    assert_equal(stream(remote, ROWS, num_workers=2, start_method="fork"), expected)
    assert_equal(stream(remote, ROWS), expected)  # the parent reads on
    assert remote.storage.retries == 0


@pytest.mark.slow
def test_workers_of_a_forkserver_give_the_same_batches(
    root: Path, place: Make, load_pool: Make, open_remote: Make, stream: Make
) -> None:
    """It and the pool reach them pickled, as they reach spawned ones."""
    expected = stream(load_pool(root), ROWS)
    remote = open_remote(**place("s3", root))
    assert_equal(stream(remote, ROWS, num_workers=1, start_method="forkserver"), expected)


def test_pickled_pool_opens_its_own_connection(
    root: Path, place: Make, load_pool: Make, open_remote: Make
) -> None:
    remote = open_remote(**place("http", root))
    read(remote, ROWS)
    copied = pickle.loads(pickle.dumps(remote))  # noqa: S301 - our own bytes
    assert read(copied, ROWS) == read(load_pool(root), ROWS)


def test_child_that_ends_leaves_its_parents_connection_alone(
    root: Path,
    file_server: Any,
    load_pool: Make,
    open_remote: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "READ_TIMEOUT_SECONDS", 600.0)  # on a busy machine, too
    remote = open_remote(f"{file_server.url}/pool")
    expected = read(load_pool(root), ROWS)
    file_server.hangs = 1
    answers: list[Any] = []
    reading = threading.Thread(target=lambda: answers.append(read(remote, ROWS)))
    reading.start()
    while file_server.hangs:  # the parent waits for an answer while the child lives
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        try:
            same = read(remote, ROWS) == expected
            remote.storage.__dict__.clear()
            gc.collect()
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    file_server.released.set()
    reading.join()
    assert answers == [expected]
    assert remote.storage.retries == 0


# ---- whole tars -------------------------------------------------------------------------------


def test_cache_transfers_each_tar_once(
    root: Path, file_server: Any, load_pool: Make, open_remote: Make, stream: Make
) -> None:
    expected = stream(load_pool(root), ROWS)
    for _ in range(2):  # another run finds the copies
        remote = open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
        assert_equal(stream(remote, ROWS), expected)
        assert_equal(stream(remote, ROWS, num_workers=2), expected)
        sent = [(request.path, request.status) for request in file_server.of_tars()]
        assert sorted(sent) == [(f"/pool/shards/{n:08d}.tar", 200) for n in range(3)]


def test_small_cache_streams_the_same_with_several_workers(
    root: Path,
    file_server: Any,
    load_pool: Make,
    open_remote: Make,
    stream: Make,
    tmp_path: Path,
) -> None:
    largest = max(path.stat().st_size for path in (root / "shards").iterdir())
    remote = open_remote(f"{file_server.url}/pool", shard_cache_gb=largest / 1e9)
    batches = stream(remote, ROWS, num_workers=2)
    assert_equal(batches, stream(load_pool(root), ROWS))
    assert len(list((tmp_path / "remote" / "shards").glob("*.tar"))) == 1


def test_copy_that_goes_before_it_is_opened_is_fetched_again(
    root: Path,
    file_server: Any,
    load_pool: Make,
    open_remote: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetch, seen = ShardCache.fetch, set[str]()

    def fetch_and_lose(cache: ShardCache, shard: ShardFile, download: Any) -> Path:
        path = fetch(cache, shard, download)
        if shard.name not in seen:  # as if another process had made room
            seen.add(shard.name)
            path.unlink()
        return path

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_lose)
    remote = open_remote(f"{file_server.url}/pool", shard_cache_gb=1)
    assert_same_pool(remote, load_pool(root))
    assert len(seen) == 3
    seen.clear()
    spans = [Span(shard, 0, 512) for shard in remote.shards]  # not by the reader, which tries anew
    local = [Path(shard.path) for shard in load_pool(root).shards]
    assert list(remote.storage.read(spans)) == [path.read_bytes()[:512] for path in local]
    assert len(seen) == 3


def test_copies_that_are_gone_are_not_kept_open(
    root: Path, file_server: Any, open_remote: Make
) -> None:
    largest = max(path.stat().st_size for path in (root / "shards").iterdir())
    remote = open_remote(f"{file_server.url}/pool", shard_cache_gb=largest / 1e9)
    read(remote, np.arange(20))
    links = [Path(f"/proc/self/fd/{file}") for file in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if link.is_symlink()]
    copies = [name for name in opened if name.startswith(str(root.parent / "remote/shards"))]
    assert len(copies) == 1  # each holds its space
    remote.storage.close()


def test_server_without_ranges_is_read_whole_once(
    root: Path,
    file_server: Any,
    load_pool: Make,
    open_remote: Make,
    stream: Make,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file_server.ranges = False
    sizes = {f"/pool/shards/{p.name}": p.stat().st_size for p in (root / "shards").iterdir()}
    asked = f"/pool/shards/{0:08d}.tar"  # whether it answers ranges
    for _ in range(2):
        file_server.requests, earlier = [], file_server.requests
        remote = open_remote(f"{file_server.url}/pool")
        assert f"{sum(sizes.values()) / 1e9:.2f} GB for the whole pool" in caplog.text
        assert_same_pool(remote, load_pool(root))
        assert_equal(stream(remote, ROWS, num_workers=2), stream(load_pool(root), ROWS))
        paths = [request.path for request in file_server.of_tars()]
        paths.remove(asked)
        assert sorted(paths) == ([] if earlier else sorted(sizes))
        # what is there already needs no more space
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))


def test_server_without_ranges_needs_the_disk(
    root: Path, file_server: Any, open_remote: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_server.ranges = False
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    match = r"do not fit on the disk.*shard_cache_gb .*shuffle_window_shards"
    with pytest.raises(InputError, match=match):
        open_remote(f"{file_server.url}/pool")
    assert len(open_remote(f"{file_server.url}/pool", shard_cache_gb=1)) == 20


def test_tar_larger_than_the_cache_is_refused(
    root: Path, file_server: Any, open_remote: Make
) -> None:
    with pytest.raises(InputError, match=r"shard_cache_gb must hold at least one tar"):
        open_remote(f"{file_server.url}/pool", shard_cache_gb=1e-6)


# ---- metadata ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_selection_reads_the_pools_own_metadata(
    root: Path,
    make_samples: Make,
    write_metadata: Make,
    place: Make,
    open_remote: Make,
    kind: str,
) -> None:
    uids = [sample.uid for sample in make_samples(25)]  # five are not in the shards
    truth = write_metadata(root / "metadata", uids)
    pool = open_remote(**place(kind, root))
    coverage = metadata_coverage(pool)
    assert coverage is not None
    assert (coverage.named, coverage.present) == (25, 20)
    store = open_features(pool, folder=None, keys=("l14_img",), max_bad_fraction=0)
    assert store.pool_coverage.present == 20
    features = RowFeatures.build(store, ("l14_img",), len(pool))
    for part in store.parts:
        vectors = features.gather(part.rows)["l14_img"].numpy()
        for row, vector in zip(part.rows, vectors, strict=True):
            np.testing.assert_array_equal(vector, truth["l14_img"][format_uid(pool.uids[row])])


def test_metadata_is_copied_once_and_again_when_it_changes(
    root: Path, make_samples: Make, write_metadata: Make, file_server: Any, open_remote: Make
) -> None:
    uids = [sample.uid for sample in make_samples(20)]
    write_metadata(root / "metadata", uids)
    url = f"{file_server.url}/pool"

    def copied(suffixes: tuple[str, ...] = (".parquet", ".npz")) -> list[str]:
        file_server.requests.clear()
        folder = open_remote(url).storage.metadata(suffixes)
        for path in (root / "metadata").glob("*"):
            if path.suffix in suffixes:
                assert (folder / path.name).read_bytes() == path.read_bytes()
        return [
            Path(request.path).suffix
            for request in file_server.requests
            if request.path.startswith("/pool/metadata/0") or request.sent_bytes > 2
            if request.method == "GET" and not request.path.endswith(("/", ".tar"))
        ]

    assert copied((".parquet",)) == [".parquet"] * 2
    assert copied() == [".npz"] * 2
    assert copied() == []
    write_metadata(root / "metadata", uids, seed=1)
    assert copied() != []
    local = sorted(open_remote(url).storage.metadata().glob("*.npz"))
    gone, stays = local
    (root / "metadata" / gone.name).unlink()
    assert copied() == []
    assert not gone.exists()  # it is no part of the pool any more
    stays.unlink()
    assert copied() == [".npz"]


def test_parquets_beside_the_tars_are_not_the_pools_list(
    root: Path, file_server: Any, load_pool: Make, open_remote: Make
) -> None:
    # img2dataset writes one beside each tar, which may lack uids
    pq.write_table(pa.table({"url": ["a"]}), root / "shards" / "00000000.parquet")
    assert metadata_coverage(load_pool(root)) is None
    pool = open_remote(f"{file_server.url}/pool")
    assert metadata_coverage(pool) is None
    assert [path.name for path in pool.storage.metadata().glob("*.parquet")] == ["00000000.parquet"]


def test_pool_without_metadata_says_so(root: Path, file_server: Any, open_remote: Make) -> None:
    pool = open_remote(f"{file_server.url}/pool")
    assert metadata_coverage(pool) is None
    with pytest.raises(InputError, match=r"No features \(\*\.npz\)"):
        open_features(pool, folder=None, keys=("l14_img",), max_bad_fraction=0)
