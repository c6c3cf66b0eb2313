"""A subset against its pool: whole, in part, changed, copied, or another pool altogether."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.datamodules.pool.index_changes import IndexChanges, index_changes
from siftclip.datamodules.pool.pool import Pool, PoolOptions
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.selection.registry import pool_record, tar_records
from siftclip.datamodules.selection.verification import verify_subset

Make = Callable[..., Any]


@pytest.fixture
def pools(make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]) -> Any:
    """A pool of three tars, its root, and a function that opens it as it is."""
    root = write_pool(make_samples(9), shards=3)
    return load_pool(root), root, lambda: load_pool(root, max_bad_fraction=1.0)


def findings(before: Pool, now: Pool, **changes: Any) -> dict[str, list[str]]:
    """The faults of all of the samples of a pool as it was, by check; notes are left out."""
    subset = CountedUids(before.table.sorted_uids, np.ones(len(before), dtype=np.int64))
    given = {"noted": pool_record(before), "tars": tar_records(before), "index": IndexChanges()}
    found = verify_subset(subset, now, **(given | changes))
    assert {finding.check for finding in found} >= {"index", "uids", "pool"}
    faults: dict[str, list[str]] = {}
    for finding in found:
        if finding.is_fault:
            faults.setdefault(finding.check, []).append(finding.text)
    return faults


def cache(tmp_path: Path, root: Path) -> PoolOptions:
    return PoolOptions(root=str(root), cache_dir=str(tmp_path / "cache"))


def test_the_pool_itself_fits(pools: Any) -> None:
    pool, _, load = pools
    assert findings(pool, load()) == {}


def test_a_copied_pool_is_the_same(pools: Any, load_pool: Make, tmp_path: Path) -> None:
    pool, root, _ = pools
    copy = shutil.copytree(root, tmp_path / "copy")
    for number, tar in enumerate(copy.rglob("*.tar")):
        os.utime(tar, (number, number))
    subset = CountedUids(pool.table.sorted_uids, np.ones(len(pool), dtype=np.int64))
    found = verify_subset(
        subset,
        load_pool(copy, cache="other"),
        noted=pool_record(pool),
        tars=tar_records(pool),
        index=IndexChanges(),
    )
    assert not any(finding.is_fault for finding in found)
    assert [f.text for f in found if f.check == "tars"] == [
        "written or copied since, with the same sizes: 00000000.tar, 00000001.tar, 00000002.tar"
    ]


def test_a_replaced_tar_is_named(
    pools: Any, make_samples: Make, write_tar: Make, tmp_path: Path
) -> None:
    pool, root, load = pools
    samples = make_samples(2, start=3)  # of the three that it had
    write_tar(root / "shards" / "00000001.tar", [m for s in samples for m in s.members()])
    assert index_changes(cache(tmp_path, root)) == IndexChanges(changed=("00000001.tar",))
    now = load()
    assert index_changes(cache(tmp_path, root)) == IndexChanges()  # opening has indexed it anew
    faults = findings(pool, now, index=IndexChanges(changed=("00000001.tar",)))
    assert faults["index"] == ["changed since it was indexed: 00000001.tar"]
    assert faults["uids"] == [f"1 of 9 are not in the pool {pool.root}"]
    assert faults["tars"] == ["changed: 00000001.tar"]
    (text,) = faults["pool"]
    assert text.startswith("the pool has changed, or is another one: made for")
    assert "9 samples" in text
    assert "8 samples" in text


def test_tars_that_are_gone_or_new_are_named(
    pools: Any, make_samples: Make, write_tar: Make, tmp_path: Path
) -> None:
    pool, root, load = pools
    (root / "shards" / "00000002.tar").unlink()
    samples = make_samples(2, start=50)
    write_tar(root / "shards" / "new.tar", [m for s in samples for m in s.members()])
    changes = index_changes(cache(tmp_path, root))
    assert changes == IndexChanges(missing=("00000002.tar",), new=("new.tar",))
    faults = findings(pool, load(), index=changes)
    assert faults["index"] == ["missing, and indexed before: 00000002.tar"]
    assert faults["tars"] == [
        "missing: 00000002.tar",
        "not there when the subset was made: new.tar",
    ]
    assert faults["uids"] == [f"3 of 9 are not in the pool {pool.root}"]


def test_other_bytes_in_a_tar_of_the_same_size_are_noticed(pools: Any, write_tar: Make) -> None:
    """The same uids and sizes of tars, but a caption that is longer at the cost of padding."""
    pool, root, load = pools
    path = root / "shards" / "00000000.tar"
    data = path.read_bytes()
    assert data.count(b"caption of sample 1") == 1
    header = data.index(b"000000001.txt\0")
    size = f"{len(b'caption of sample 1'):011o}".encode()
    assert data[header + 124 : header + 135] == size
    import tarfile

    with tarfile.open(path) as archive:
        members = [
            (m.name, archive.extractfile(m).read())  # type: ignore[union-attr]
            for m in archive.getmembers()
        ]
    longer = [(n, c + b"!!" if n == "000000001.txt" else c) for n, c in members]
    write_tar(path, longer)
    assert path.stat().st_size == len(data)
    faults = findings(pool, load())
    assert faults == {
        "pool": ["images or captions have other sizes or places in tars of the same size"]
    }


def test_another_pool_is_told(
    pools: Any, make_samples: Make, write_pool: Make, load_pool: Make
) -> None:
    pool, *_ = pools
    other = load_pool(write_pool(make_samples(4, start=100), folder="other"), cache="other")
    faults = findings(pool, other)
    assert faults["uids"] == [f"none is in the pool {other.root}"]
    assert faults["pool"][0].startswith("another pool: made for")
    assert "tars" not in faults  # of another pool their names mean nothing


def test_without_notes_the_uids_decide(pools: Any) -> None:
    pool, _, load = pools
    assert findings(pool, load(), noted=None, tars=None) == {}


def test_repeats_are_told_and_no_fault(
    make_samples: Make, write_pool: Make, load_pool: Make
) -> None:
    samples = make_samples(4)
    samples[3].record = samples[0].record
    pool = load_pool(write_pool(samples))
    subset = CountedUids(pool.table.sorted_uids, np.array([1, 3, 2]))
    found = verify_subset(subset, pool, noted=None, tars=None, index=IndexChanges())
    assert not any(finding.is_fault for finding in found)
    assert [finding.text for finding in found if finding.check == "repeats"] == [
        "2 uids of the subset are kept more than once, up to 3 times",
        "1 samples of the pool have the uid of an earlier one and are left out",
    ]


def test_an_index_that_is_not_there_yet_is_no_fault(
    make_samples: Make, write_pool: Make, tmp_path: Path
) -> None:
    root = write_pool(make_samples(4))
    changes = index_changes(cache(tmp_path, root))
    assert changes == IndexChanges(new=("00000000.tar", "00000001.tar"))
