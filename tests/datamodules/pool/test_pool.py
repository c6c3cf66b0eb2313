"""What a pool is: rows, shards, layouts, identity, repeated uids."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.datamodules.index.uids import derive_uid, format_uid
from siftclip.datamodules.pool import pool as pool_module
from siftclip.datamodules.pool.pool import (
    Pool,
    metadata_coverage,
)
from siftclip.datamodules.storage.local import LocalStorage, ShardFile, default_cache

Make = Callable[..., Any]
Load = Callable[..., Pool]


def hex_uids(pool: Pool) -> list[str]:
    return [format_uid(uid) for uid in pool.uids]


def test_rows_follow_shards_in_order_of_name(
    make_samples: Make, write_pool: Make, load_pool: Load
) -> None:
    samples = make_samples(10)
    pool = load_pool(write_pool(samples, shards=3))
    assert len(pool) == 10
    assert [shard.name for shard in pool.shards] == [f"0000000{i}.tar" for i in range(3)]
    assert hex_uids(pool) == [sample.uid for sample in samples]
    assert pool.keys.tolist() == [sample.key.encode() for sample in samples]
    assert pool.shard_of_row.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert [pool.shard_rows(i).tolist() for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert pool.place(5) == "00000001.tar:000000005"
    assert pool.faults.samples == 0
    assert pool.table.find(pool.uids).tolist() == list(range(10))


def test_flat_layout_is_the_same_pool(
    make_samples: Make, write_pool: Make, load_pool: Load
) -> None:
    samples = make_samples(6)
    nested = load_pool(write_pool(samples, folder="nested"), cache="a")
    flat = load_pool(write_pool(samples, folder="flat", layout="flat"), cache="b")
    assert flat.fingerprint == nested.fingerprint
    assert np.array_equal(flat.uids, nested.uids)


def test_fingerprint_depends_on_content_not_on_place(
    make_samples: Make, write_pool: Make, load_pool: Load
) -> None:
    samples = make_samples(6)
    root = write_pool(samples, folder="first")
    fingerprint = load_pool(root, cache="a").fingerprint
    assert load_pool(root, cache="a").fingerprint == fingerprint  # from the cached index
    moved = root.rename(root.parent / "second")
    os.utime(moved / "shards" / "00000000.tar", ns=(1, 1))
    assert load_pool(moved, cache="b").fingerprint == fingerprint

    others = [
        write_pool(samples, folder="cut otherwise", shards=3),
        write_pool(samples[:-1], folder="one less"),
        write_pool(make_samples(6, start=1), folder="other uids"),
        write_pool([samples[1], samples[0], *samples[2:]], folder="other order"),
    ]
    (moved / "shards" / "00000001.tar").rename(moved / "shards" / "00000002.tar")
    found = {load_pool(other, cache=other.name).fingerprint for other in [*others, moved]}
    assert len(found | {fingerprint}) == 6


def test_img2dataset_folder_without_uids_gets_derived_ones(
    make_samples: Make, write_pool: Make, load_pool: Load
) -> None:
    samples = make_samples(4)
    for sample in samples:
        sample.record = b'{"key": "%s", "status": "success"}' % sample.key.encode()
    root = write_pool(samples, layout="flat")
    (root / "00000000_stats.json").write_text("{}")
    pool = load_pool(root)
    assert hex_uids(pool) == [
        derive_uid(f"0000000{i // 2}.tar", sample.key) for i, sample in enumerate(samples)
    ]


def test_first_of_repeated_uids_is_used(
    make_samples: Make,
    write_pool: Make,
    load_pool: Load,
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = make_samples(9)
    samples[3].record = samples[1].record  # in the same shard
    samples[8].record = samples[1].record  # in the last shard
    samples[5].record = samples[4].record
    pool = load_pool(write_pool(samples, shards=2))
    assert pool.keys.tolist() == [samples[i].key.encode() for i in (0, 1, 2, 4, 6, 7)]
    assert len(set(hex_uids(pool))) == len(pool) == 6
    assert pool.shard_rows(0).tolist() == [0, 1, 2, 3]
    assert pool.shard_rows(1).tolist() == [4, 5]
    assert pool.table.find(pool.uids).tolist() == list(range(6))
    assert (
        "3 samples with duplicate uids are left out; the first of each uid is used" in caplog.text
    )


def test_shard_without_samples_has_no_rows(
    make_samples: Make, write_pool: Make, write_tar: Make, load_pool: Load
) -> None:
    root = write_pool(make_samples(4))
    write_tar(root / "shards" / "00000000a.tar", [])
    pool = load_pool(root)
    assert [len(pool.shard_rows(i)) for i in range(3)] == [2, 0, 2]


def test_coverage_of_metadata(
    make_samples: Make, write_pool: Make, write_metadata: Make, load_pool: Load
) -> None:
    samples = make_samples(8)
    root = write_pool(samples[:6])
    assert metadata_coverage(load_pool(root)) is None
    write_metadata(root / "metadata", [sample.uid for sample in samples])
    coverage = metadata_coverage(load_pool(root))
    assert coverage is not None
    assert (coverage.named, coverage.present) == (8, 6)
    assert str(coverage) == "6 of 8 (75.0 %)"
    assert LocalStorage(str(root)).metadata() == root / "metadata"


def test_metadata_folder_of_img2dataset_is_beside_the_tars(
    make_samples: Make, write_pool: Make
) -> None:
    samples = make_samples(2)
    flat = write_pool(samples, folder="a", layout="flat")
    assert LocalStorage(str(flat)).metadata() == flat
    nested = write_pool(samples, folder="b")
    assert LocalStorage(str(nested)).metadata() == nested / "shards"


def test_cache_lies_in_the_pool_or_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_cache(str(tmp_path)) == tmp_path / ".siftclip"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    at_home = default_cache(str(tmp_path))
    assert at_home.is_relative_to(Path.home() / ".cache" / "siftclip")
    assert at_home != default_cache(str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["keys.npy", "sorted_uids.npy", "notes.json"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_damaged_table_is_made_again_and_said(
    root: Path, load_pool: Load, name: str, kept: float, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_pool(root)
    path = before.table_folder / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    after = load_pool(root)
    assert after.fingerprint == before.fingerprint
    assert len(after) == 20
    (said,) = [r.getMessage() for r in caplog.records if "is made again" in r.message]
    assert name in said
    caplog.clear()
    load_pool(root)
    assert "made again" not in caplog.text


def test_interrupted_index_goes_on_with_the_next_tar(
    make_samples: Make, write_pool: Make, load_pool: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_pool(make_samples(12), shards=4)
    real, indexed = pool_module.load_shard_index, list[str]()

    def stop_at_the_third(name: str, *arguments: Any) -> Any:
        if len(indexed) == 2:
            raise KeyboardInterrupt
        indexed.append(name)
        return real(name, *arguments)

    monkeypatch.setattr(pool_module, "load_shard_index", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        load_pool(root)
    monkeypatch.setattr(pool_module, "load_shard_index", real)
    opened: list[str] = []
    real_open = LocalStorage.open_tar

    def spy(storage: LocalStorage, shard: ShardFile) -> Any:
        opened.append(shard.name)
        return real_open(storage, shard)

    monkeypatch.setattr(LocalStorage, "open_tar", spy)
    assert len(load_pool(root)) == 12
    assert opened == ["00000002.tar", "00000003.tar"]
    load_pool(root)
    assert len(opened) == 2


@pytest.mark.slow
def test_processes_build_the_same_index(
    make_samples: Make,
    write_pool: Make,
    load_pool: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = write_pool(make_samples(12), shards=4)
    alone = load_pool(root, cache="alone")
    monkeypatch.setattr(pool_module, "PROCESSES_FROM_BYTES", 0)
    together = pool_module.open_pool(
        LocalStorage(str(root)),
        cache_dir=tmp_path / "together",
        max_bad_fraction=0,
        workers=2,
        progress=False,
    )
    assert together.fingerprint == alone.fingerprint
    for name in ("uids", "keys", "image_offsets_bytes", "sample_sizes_bytes", "shard_of_row"):
        assert np.array_equal(getattr(together, name), getattr(alone, name))


def test_pickled_pool_maps_the_same_files(
    make_samples: Make, write_pool: Make, load_pool: Load
) -> None:
    pool = load_pool(write_pool(make_samples(40)))
    data = pickle.dumps(pool)
    assert len(data) < 2000
    copied = pickle.loads(data)  # noqa: S301 - our own bytes
    assert np.array_equal(copied.uids, pool.uids)
    assert copied.place(7) == pool.place(7)
    assert copied.faults == pool.faults
    assert not copied.uids.flags.writeable


def test_changed_tar_replaces_the_table(
    make_samples: Make, write_pool: Make, load_pool: Load, tmp_path: Path
) -> None:
    root = write_pool(make_samples(6))
    first = load_pool(root)
    write_pool(make_samples(6, start=3))
    second = load_pool(root)
    assert hex_uids(second) != hex_uids(first)
    tables = list((tmp_path / "cache" / "index").glob("table-*"))
    assert tables == [second.table_folder]
    assert hex_uids(first)[0] == make_samples(1)[0].uid  # its maps live on
