"""Files that change after places in them were found: never the bytes of another file."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from siftclip import file_identity
from siftclip.datamodules.features.files import read_feature_file
from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.features.store import open_features
from siftclip.datamodules.index import tar_index
from siftclip.datamodules.pool.image_sizes import read_image_sizes
from siftclip.datamodules.pool.pool import Pool, open_pool
from siftclip.datamodules.pool.reader import ChangedTarError, RawSample, SampleReader
from siftclip.datamodules.selection.columns import read_pool_column, read_pool_lists
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.errors import InputError
from siftclip.file_identity import FileIdentity
from siftclip.selectors.core.base import Chunk, ScoreSelector
from siftclip.selectors.core.source import ExternalColumn, FeatureFile, Requirements
from siftclip.writing import WriteError

Make = Callable[..., Any]
ROWS = np.arange(20)


def replace(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def with_old_time(change: Callable[[Path, bytes], Any]) -> Callable[[Path, bytes], None]:
    def hide(path: Path, data: bytes) -> None:
        status = path.stat()
        change(path, data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return hide


CHANGES: dict[str, Callable[[Path, bytes], Any]] = {
    "replaced": replace,
    "replaced, its time kept": with_old_time(replace),
    "written in place": Path.write_bytes,
    "shortened": lambda path, data: os.truncate(path, len(data) // 2),
    "grown": lambda path, data: path.write_bytes(data + bytes(10240)),
    "grown, its time kept": with_old_time(lambda path, data: path.write_bytes(data + bytes(512))),
}


def read(pool: Pool) -> list[RawSample | Exception]:
    found = dict(SampleReader(pool=pool, max_image_pixels=10_000).read(ROWS))
    return [found[row] for row in range(len(ROWS))]


# ---- tars -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_open", [False, True])
def test_no_sample_has_the_bytes_of_another_tar(
    root: Path, other: bytes, load_pool: Make, is_open: bool, change: str
) -> None:
    pool = load_pool(root)
    expected = read(load_pool(root, cache="another"))
    if is_open:
        read(pool)
    CHANGES[change](root / "shards" / "00000001.tar", other)
    for reader in (pool, pickle.loads(pickle.dumps(pool))):  # noqa: S301 - our own bytes
        samples = read(reader)
        assert samples[:10] == expected[:10]
        # what is open stays the file that it was when another one takes its name
        if reader is pool and is_open and change.startswith("replaced"):
            assert samples == expected
        else:
            assert all(isinstance(sample, ChangedTarError) for sample in samples[10:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_run_stops_and_names_the_tar(
    root: Path, other: bytes, load_pool: Make, stream: Make, num_workers: int
) -> None:
    """Whatever share of its samples that is: no bound of bad samples is asked."""
    pool = load_pool(root)
    replace(root / "shards" / "00000001.tar", other)
    match = r"/shards/00000001\.tar has changed since the pool was opened.*siftclip index"
    with pytest.raises(InputError, match=match):
        stream(pool, ROWS, num_workers=num_workers, substitutes=np.arange(10))
    source = PoolSource(
        pool,
        features=[None],
        scores_root=root.parent,
        chunk_samples=100,
        max_bad_fraction=1,
        progress=False,
    )
    with pytest.raises(InputError, match=match):
        source.take(ROWS, Requirements(captions=True))


@pytest.mark.parametrize("change", CHANGES)
def test_pool_that_is_opened_again_is_the_new_one(
    root: Path, other: bytes, load_pool: Make, change: str
) -> None:
    first = load_pool(root)
    CHANGES[change](root / "shards" / "00000001.tar", other)
    again = load_pool(root, max_bad_fraction=1.0)
    fresh = load_pool(root, max_bad_fraction=1.0, cache="another")
    assert again.shards != first.shards
    assert np.array_equal(again.uids, fresh.uids)
    assert np.array_equal(again.image_offsets_bytes, fresh.image_offsets_bytes)
    found = dict(SampleReader(pool=again, max_image_pixels=10_000).read(np.arange(len(again))))
    assert all(isinstance(sample, RawSample) for sample in found.values())


def test_copied_pool_needs_no_new_index(
    root: Path, load_pool: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inodes are others; the time of a tar decides, else a look into the tar."""
    expected = read(load_pool(root, cache="pool/.siftclip"))
    copy = root.parent / "copy"
    shutil.copytree(root, copy)  # keeps times
    opened = []
    build = tar_index.build_shard_index
    monkeypatch.setattr(
        tar_index, "build_shard_index", lambda source, *a: opened.append(1) or build(source, *a)
    )
    for _ in range(2):
        assert read(load_pool(copy, cache="copy/.siftclip")) == expected
    assert opened == []
    os.utime(copy / "shards" / "00000000.tar")
    assert read(load_pool(copy, cache="copy/.siftclip")) == expected
    assert opened == [1]


def test_file_system_with_changing_inodes_is_believed(
    root: Path, load_pool: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = load_pool(root)
    expected = read(load_pool(root, cache="another"))
    for name in ("00000000.tar", "00000001.tar"):
        path = root / "shards" / name
        with_old_time(replace)(path, path.read_bytes())
    assert read(pool) == expected


def test_opening_again_reads_no_tar(
    root: Path, load_pool: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_pool(root)
    monkeypatch.setattr(file_identity, "probe", lambda *_: pytest.fail("a tar was read"))
    load_pool(root)
    (root.parent / "cache" / "index" / "probes.json").write_text("damaged")
    monkeypatch.undo()
    load_pool(root)


def test_tar_that_is_written_while_it_is_indexed(
    root: Path, load_pool: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tar_index.build_shard_index

    def write_meanwhile(source: Any, *arguments: Any) -> Any:
        index = build(source, *arguments)
        os.utime(source.name)
        return index

    monkeypatch.setattr(tar_index, "build_shard_index", write_meanwhile)
    with pytest.raises(InputError, match=r"00000000\.tar has changed"):
        load_pool(root)
    monkeypatch.undo()
    assert len(load_pool(root)) == 20


def test_index_that_cannot_be_written_to_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Pool:
        storage = LocalStorage(str(root))
        return open_pool(storage, cache_dir=tmp_path / "c", max_bad_fraction=0, progress=False)

    load()
    (tmp_path / "c" / "index" / "probes.json").unlink()

    def refuse(*_: Any) -> None:
        raise WriteError(tmp_path, errno.EACCES)

    monkeypatch.setattr("siftclip.datamodules.storage.local.write_json", refuse)
    assert len(load()) == 20


# ---- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [np.arange(600), np.array([3, 590])])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("change", ["replaced", "written in place", "shortened"])
def test_features_of_another_file_are_an_error(
    make_samples: Make,
    write_pool: Make,
    load_pool: Make,
    tmp_path: Path,
    rows: np.ndarray,
    compressed: bool,
    change: str,
) -> None:
    samples = make_samples(20)
    pool = load_pool(write_pool(samples))
    # a set of its own, large enough for both ways of reading
    folder = tmp_path / "features"
    folder.mkdir()
    values = np.arange(1200, dtype=np.float16).reshape(600, 2)
    uids = np.concatenate([pool.uids, np.arange(1160, dtype=np.uint64).reshape(580, 2)])
    save = np.savez_compressed if compressed else np.savez
    save(folder / "a.npz", uids=uids, x=values)
    save(tmp_path / "other.npz", uids=uids[::-1], x=values[::-1])
    store = open_features(pool, folder=folder, keys=("x",), max_bad_fraction=0)
    features = RowFeatures.build(store, ("x",), len(pool))
    wanted = np.resize(np.arange(20), len(rows))
    expected = values[store.parts[0].positions][wanted]
    assert np.array_equal(features.gather(wanted)["x"].numpy(), expected)
    data = (tmp_path / "other.npz").read_bytes()
    if change == "shortened":
        data = data[:100]
    (replace if change == "replaced" else Path.write_bytes)(folder / "a.npz", data)
    for reader in (features, pickle.loads(pickle.dumps(features))):  # noqa: S301 - our own bytes
        with pytest.raises(InputError, match=r"a\.npz has changed since it was first read"):
            reader.gather(wanted)


@pytest.fixture
def features(
    make_samples: Make, write_pool: Make, write_metadata: Make, load_pool: Make, tmp_path: Path
) -> RowFeatures:
    """`l14_img` of a pool of eight samples."""
    samples = make_samples(8)
    pool = load_pool(write_pool(samples))
    folder = tmp_path / "metadata"
    write_metadata(folder, [sample.uid for sample in samples])
    store = open_features(pool, folder=folder, keys=("l14_img",), max_bad_fraction=0)
    return RowFeatures.build(store, ("l14_img",), len(pool))


def test_features_that_are_deleted_while_they_are_mapped(features: RowFeatures) -> None:
    expected = features.gather(np.arange(8))["l14_img"]
    for path in features.paths:
        path.unlink()
    assert features.gather(np.arange(8))["l14_img"].equal(expected)


def test_features_that_change_while_they_are_read(
    features: RowFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_file = RowFeatures._read_file

    def read_and_change(self: RowFeatures, part: int, key: str, positions: Any) -> Any:
        os.utime(self.paths[part])
        return read_file(self, part, key, positions)

    monkeypatch.setattr(RowFeatures, "_read_file", read_and_change)
    with pytest.raises(InputError, match=r"\.npz has changed since it was first read"):
        features.gather(np.arange(8))


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_feature_file_that_changes_between_chunks(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"target{suffix}"

    def write(values: np.ndarray) -> None:
        (np.savez if suffix == ".npz" else np.save)(path, values)

    write(np.zeros((30, 4), dtype=np.float32))
    chunks = read_feature_file(FeatureFile(path=str(path)), 10)
    assert next(chunks).shape == (10, 4)
    write(np.ones((30, 4), dtype=np.float32))
    with pytest.raises(InputError, match=r"target\.np[yz] has changed since it was first read"):
        next(chunks)


# ---- identities -------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4096, 4097, 50_000])
def test_probe_sees_the_ends_and_small_files_whole(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "file"
    data = bytearray(np.random.default_rng(0).bytes(size_bytes))
    path.write_bytes(data)
    probe = FileIdentity.of(path).probe
    places: Sequence[int] = (
        [0, size_bytes - 1] if size_bytes > 8 * 4096 else range(0, size_bytes, 97)
    )
    for place in places:
        if size_bytes == 0:
            break
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert FileIdentity.of(path).probe != probe


def test_identity_of_what_is_no_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=rf"cannot be read: {reason}"):
            FileIdentity.of(path)


# ---- parquet files, and what is kept of them --------------------------------------------------


def write_metadata_table(path: Path, uids: Sequence[str], first: int) -> None:
    values = list(range(first, first + len(uids)))
    columns = {"uid": uids, "score": values, "original_width": values, "original_height": values}
    new = path.with_suffix(".new")
    pq.write_table(pa.table(columns), new)
    new.replace(path)


@pytest.fixture
def with_metadata(make_samples: Make, write_pool: Make, load_pool: Make) -> tuple[Pool, list[str]]:
    """A pool of eight samples whose metadata has a number and a size of each."""
    samples = make_samples(8)
    pool = load_pool(write_pool(samples))
    (Path(pool.root) / "metadata").mkdir()
    uids = [sample.uid for sample in samples]
    write_metadata_table(Path(pool.root) / "metadata" / "a.parquet", uids, 0)
    return pool, uids


READERS: dict[str, Callable[[Pool], Any]] = {
    "column": lambda pool: read_pool_column(pool, SCORE),
    "lists": lambda pool: read_pool_lists(pool, SCORE),
    "sizes": lambda pool: read_image_sizes(pool, progress=False),
    "features": lambda pool: open_features(
        pool, folder=pool.storage.metadata(), keys=("x",), max_bad_fraction=0
    ),
}
SCORE = ExternalColumn(path=None, column="score")


@pytest.mark.parametrize("change", ["replaced", "written in place"])
@pytest.mark.parametrize("kind", READERS)
def test_parquet_that_changes_while_it_is_read(
    with_metadata: tuple[Pool, list[str]], monkeypatch: pytest.MonkeyPatch, kind: str, change: str
) -> None:
    """The rows of another file have other uids: no number may be joined with those."""
    pool, uids = with_metadata
    path = Path(pool.root) / "metadata" / "a.parquet"
    np.savez(path.with_suffix(".npz"), x=np.zeros((8, 2), dtype=np.float16))
    read, old = READERS[kind], path.read_bytes()
    read(pool)
    write_metadata_table(path, uids[::-1], 0)
    new = path.read_bytes()
    path.write_bytes(old)

    class Changing(pq.ParquetFile):
        def read(self, *arguments: Any, **options: Any) -> Any:
            table = super().read(*arguments, **options)
            CHANGES[change](path, new)
            return table

    monkeypatch.setattr(pq, "ParquetFile", Changing)
    with pytest.raises(InputError, match=r"a\.parquet has changed since it was first read\. Start"):
        read(pool)


def make_source(pool: Pool, folder: Path) -> PoolSource:
    return PoolSource(
        pool,
        features=[None],
        scores_root=folder,
        chunk_samples=100,
        max_bad_fraction=0,
        progress=False,
    )


@pytest.mark.parametrize("kind", ["column", "lists", "sizes", "target"])
def test_what_is_kept_was_read_of_what_it_is_kept_under(
    with_metadata: tuple[Pool, list[str]], tmp_path: Path, kind: str
) -> None:
    """A file that changes between the two makes an answer that belongs to neither."""
    pool, uids = with_metadata
    target = FeatureFile(path=str(tmp_path / "target.npy"))
    np.save(target.path, np.zeros((8, 2), dtype=np.float32))
    requires = {
        "column": Requirements(column=SCORE),
        "lists": Requirements(lists=SCORE),
        "sizes": Requirements(sizes=True),
        "target": Requirements(files=(target,)),
    }[kind]

    def read(source: PoolSource) -> object:
        if kind == "target":
            return list(source.file(target))
        return source.take(np.arange(8), requires)

    selector = Reads(requires)
    before = make_source(pool, tmp_path)
    identity = before.identity(selector)
    if kind == "target":
        np.save(target.path, np.ones((8, 2), dtype=np.float32))
    else:
        write_metadata_table(Path(pool.root) / "metadata" / "a.parquet", uids, 100)
    with pytest.raises(InputError, match="has changed since it was first read"):
        read(before)
    after = make_source(pool, tmp_path)
    read(after)
    assert after.identity(selector) != identity


class Reads(ScoreSelector):
    """A selector that reads what it is told."""

    def __init__(self, requires: Requirements) -> None:
        super().__init__(fraction=0.5)
        self._requires = requires

    @property
    def requires(self) -> Requirements:
        return self._requires

    def score(self, chunk: Chunk) -> torch.Tensor:
        return torch.zeros(len(chunk.rows))
