"""A copy holds exactly the selected samples, byte for byte, also after it was killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.datamodules.index.uids import derive_uid, format_uid, parse_uids
from siftclip.datamodules.pool.pool import Pool, open_pool
from siftclip.datamodules.selection import compaction
from siftclip.datamodules.selection.compaction import END_MARK, Compaction, compact_pool
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.selection.run import run_selection
from siftclip.datamodules.selection.selection import (
    SUBSET_NAME,
    Selection,
    expand_rows,
    make_selection,
    read_subset,
)
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.datamodules.streaming.batches import SampleDataset
from siftclip.datamodules.streaming.datamodule import LoaderOptions, OrderSampler, make_loader
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.errors import InputError
from siftclip.files import read_json
from siftclip.selectors.methods.external import External

Make = Callable[..., Any]
LoadPool = Callable[..., Pool]
Members = dict[str, bytes]
LONG = "a_long_name/" * 12  # beyond the 100 bytes of a header, and beyond ustar's prefix


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: LoadPool) -> Pool:
    return load_pool(write_pool(make_samples(20), shards=3))


def select(pool: Pool, rows: Any, multiplicities: Any = None) -> Selection:
    rows = np.asarray(rows)
    counts = np.ones(len(rows)) if multiplicities is None else np.asarray(multiplicities)
    return make_selection(pool.uids[rows], counts.astype(np.int64), {})


def select_all(pool: Pool) -> Selection:
    return select(pool, np.arange(len(pool)))


def compact(
    pool: Pool,
    selection: Selection,
    folder: Path,
    *,
    shard_samples: int = 4,
    max_bad_fraction: float = 0.0,
) -> Compaction:
    return compact_pool(
        pool,
        selection,
        folder,
        shard_samples=shard_samples,
        max_bad_fraction=max_bad_fraction,
        progress=False,
    )


def contents(pool: Pool) -> dict[str, Members]:
    """The files of every sample by uid and suffix, read by Python's tarfile."""
    found: dict[str, Members] = {}
    for number, shard in enumerate(pool.shards):
        files: dict[str, Members] = {}
        with tarfile.open(shard.path) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                file = archive.extractfile(member)
                if file is not None:
                    files.setdefault(key, {})[suffix] = file.read()
        for row in pool.shard_rows(number):
            found[format_uid(pool.uids[row])] = files[pool.keys[row].decode()]
    return found


def without_json(samples: dict[str, Members]) -> dict[str, Members]:
    return {
        uid: {suffix: data for suffix, data in members.items() if suffix != "json"}
        for uid, members in samples.items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- what a copy holds --------------------------------------------------------------------------
@pytest.mark.parametrize("shard_samples", [1, 4, 100])
def test_samples_are_copied_byte_for_byte_in_the_order_of_the_pool(
    pool: Pool, tmp_path: Path, shard_samples: int
) -> None:
    rows = [0, 1, 2, 5, 6, 7, 8, 13, 19]
    outcome = compact(pool, select(pool, rows), tmp_path / "copy", shard_samples=shard_samples)
    expected = b""
    for row in rows:
        start = pool.sample_offsets_bytes[row]
        tar = Path(pool.shards[pool.shard_of_row[row]].path).read_bytes()
        expected += tar[start : start + pool.sample_sizes_bytes[row]]
    paths = sorted((tmp_path / "copy" / "shards").iterdir())
    assert len(paths) == len(outcome.shards) == -(-len(rows) // shard_samples)
    assert paths[0].name == "00000000.tar"
    tars = [path.read_bytes() for path in paths]
    assert all(tar.endswith(END_MARK) for tar in tars)
    assert b"".join(tar[: -len(END_MARK)] for tar in tars) == expected


def test_manifest_says_what_it_is_a_copy_of(pool: Pool, tmp_path: Path) -> None:
    selection = select(pool, [2, 3, 11], [1, 3, 1])
    folder = tmp_path / "copy"
    outcome = compact(pool, selection, folder, shard_samples=2)
    manifest = read_json(folder / "compact.json")
    assert (manifest["selection"], manifest["pool"]) == (selection.digest, pool.fingerprint)
    assert manifest["complete"] is True
    assert (manifest["samples"], manifest["selected_samples"]) == (outcome.samples, 5) == (3, 5)
    sizes = {path.name: path.stat().st_size for path in (folder / "shards").iterdir()}
    assert {shard["name"]: shard["bytes"] for shard in manifest["shards"]} == sizes
    assert manifest["bytes"] == outcome.size_bytes == sum(sizes.values())
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 1]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "folder/", LONG])
def test_any_tar_gives_the_same_samples(
    make_samples: Make,
    write_tar: Make,
    load_pool: LoadPool,
    tmp_path: Path,
    tar_format: int,
    prefix: str,
) -> None:
    """Members in any order, members of no sample between them, and more members than needed."""
    samples = make_samples(12)
    for shard in range(2):
        members: list[tuple[str, bytes | None]] = [("a_folder", None)]
        for number in range(6 * shard, 6 * shard + 6):
            own = [(prefix + name, data) for name, data in samples[number].members()]
            own.append((f"{prefix}{samples[number].key}.cls", b"%d" % number))
            own.append((f"{prefix}{samples[number].key}.Extra.NPY", bytes(600)))
            members += own[number % 5 :] + own[: number % 5]
            members.append(("LICENSE", b"of no sample"))
        write_tar(tmp_path / "pool" / f"{shard}.tar", members, tar_format=tar_format)
    pool = load_pool(tmp_path / "pool")
    assert len(pool) == 12
    rows = [0, 1, 3, 4, 5, 6, 10, 11]
    compact(pool, select(pool, rows), tmp_path / "copy", shard_samples=3)
    copy = load_pool(tmp_path / "copy", cache="of_copy")
    assert np.array_equal(copy.uids, pool.uids[rows])
    assert np.array_equal(copy.keys, pool.keys[rows])
    assert copy.faults.samples == 0
    original = contents(pool)
    assert contents(copy) == {format_uid(uid): original[format_uid(uid)] for uid in copy.uids}


@pytest.mark.parametrize("record", [None, b'{"width": 7, "uid": null}', b"[1, 2]"])
def test_derived_uids_are_written_into_the_json(
    make_samples: Make, write_pool: Make, load_pool: LoadPool, tmp_path: Path, record: bytes | None
) -> None:
    samples = make_samples(9)
    for sample in samples[::2]:
        sample.record = record
    pool = load_pool(write_pool(samples, shards=2))
    assert format_uid(pool.uids[0]) == derive_uid("00000000.tar", samples[0].key)
    selection = select(pool, [0, 1, 4, 5, 6, 8])
    compact(pool, selection, tmp_path / "copy")
    copy = load_pool(tmp_path / "copy", cache="of_copy")
    assert np.array_equal(copy.uids, pool.uids[[0, 1, 4, 5, 6, 8]])
    original, copied = contents(pool), contents(copy)
    uid = format_uid(pool.uids[0])
    assert copy.keys[0].decode() == uid
    assert copy.keys[1] == pool.keys[1]
    expected = {None: {}, b"[1, 2]": {"content": [1, 2]}}.get(record, {"width": 7})
    assert json.loads(copied[uid]["json"]) == {**expected, "uid": uid}
    assert copied[format_uid(pool.uids[1])] == original[format_uid(pool.uids[1])]
    others = {uid: original[uid] for uid in copied}
    assert without_json(copied) == without_json(others)


def test_a_key_of_two_tars_is_given_to_one_sample(
    make_samples: Make, write_pool: Make, load_pool: LoadPool, tmp_path: Path
) -> None:
    samples = make_samples(8)
    for number, sample in enumerate(samples):
        sample.key = f"{number % 4:05d}"
    # and one whose key is the uid that another one is to be named by
    samples[1].key = samples[4].uid
    pool = load_pool(write_pool(samples, shards=2))
    # the last of the first tar and the first of the second are neighbours in the copy
    rows = [0, 1, 3, 4, 5, 7]
    compact(pool, select(pool, rows), tmp_path / "copy", shard_samples=10)
    copy = load_pool(tmp_path / "copy", cache="of_copy")
    assert np.array_equal(copy.uids, pool.uids[rows])
    uid = samples[4].uid
    expected = ["00000", uid, "00003", f"{uid}-1", "00001", samples[7].uid]
    assert [key.decode() for key in copy.keys] == expected
    original = contents(pool)
    assert contents(copy) == {
        format_uid(pool.uids[row]): original[format_uid(pool.uids[row])] for row in rows
    }


def test_a_header_for_all_files_behind_it_is_not_copied(
    make_samples: Make, load_pool: LoadPool, tmp_path: Path
) -> None:
    samples = make_samples(6)
    for shard in range(2):
        path = tmp_path / "pool" / f"{shard}.tar"
        path.parent.mkdir(exist_ok=True)
        headers = {"comment": f"of tar {shard}"}
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as archive:
            for sample in samples[3 * shard : 3 * shard + 3]:
                for name, data in sample.members():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    pool = load_pool(tmp_path / "pool")
    compact(pool, select_all(pool), tmp_path / "copy")
    copy = load_pool(tmp_path / "copy", cache="of_copy")
    assert np.array_equal(copy.uids, pool.uids)
    assert contents(copy) == contents(pool)
    for shard_file in copy.shards:
        assert b"of tar" not in Path(shard_file.path).read_bytes()


def test_reading_in_small_groups_changes_nothing(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact(pool, select(pool, range(0, 20, 2)), tmp_path / "a")
    monkeypatch.setattr(compaction, "READ_AHEAD_BYTES", 1)
    compact(pool, select(pool, range(0, 20, 2)), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


# ---- training on a copy -------------------------------------------------------------------------
def test_training_on_the_copy_sees_the_same_samples(
    pool: Pool, load_pool: LoadPool, make_dataset: Callable[..., SampleDataset], tmp_path: Path
) -> None:
    """The same uids, pixels and repetitions, in the same order."""
    selection = select(pool, [0, 2, 3, 8, 10, 11, 17], [1, 1, 3, 1, 2, 1, 1])
    compact(pool, selection, tmp_path / "copy")
    copy = load_pool(tmp_path / "copy", cache="of_copy")
    parameters = {"path": str(tmp_path / "copy" / SUBSET_NAME)}
    source = PoolSource(
        copy,
        features=[None],
        scores_root=tmp_path / "s",
        chunk_samples=3,
        max_bad_fraction=0.0,
        progress=False,
    )
    again = run_selection(External(**parameters), "external", parameters, source)
    assert again.digest == selection.digest

    def stream(source: Pool, chosen: Selection) -> tuple[list[str], torch.Tensor]:
        rows = expand_rows(chosen, source)[0]
        sampler = OrderSampler(
            order=SampleOrder(rows=rows, seed=3, global_batch=4),
            global_batch=4,
            start_step=0,
            total_steps=6,
            rank=0,
            world_size=1,
        )
        dataset = make_dataset(source, substitutes=rows)
        batches = list(
            make_loader(dataset, sampler, LoaderOptions(num_workers=0), pin_memory=False)
        )
        uids = [format_uid(source.uids[row]) for batch in batches for row in batch.rows]
        return uids, torch.cat([batch.images for batch in batches])

    uids, images = stream(pool, selection)
    copied_uids, copied_images = stream(copy, again)
    assert uids == copied_uids
    assert torch.equal(images, copied_images)


def test_subset_file_repeats_as_the_selection_does(pool: Pool, tmp_path: Path) -> None:
    selection = select(pool, [4, 9], [5, 2])
    outcome = compact(pool, selection, tmp_path / "copy")
    uids, counts = read_subset(tmp_path / "copy" / SUBSET_NAME)
    assert np.array_equal(uids, selection.uids)
    assert np.array_equal(counts, selection.multiplicities)
    assert outcome.samples == 2


# ---- killed and continued -----------------------------------------------------------------------
KILLED = """
import os, pathlib, signal, sys
import numpy as np
from siftclip.datamodules.selection import compaction
from siftclip.datamodules.pool.pool import open_pool
from siftclip.datamodules.selection.selection import make_selection
from siftclip.datamodules.storage.local import LocalStorage

root, cache, folder, where, calls = sys.argv[1:]
original, left = getattr(compaction, where), [int(calls)]

def die(*arguments):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

setattr(compaction, where, die)
pool = open_pool(
    LocalStorage(root), cache_dir=pathlib.Path(cache), max_bad_fraction=0, progress=False
)
selection = make_selection(pool.uids, np.ones(len(pool), np.int64), {})
compaction.compact_pool(
    pool, selection, pathlib.Path(folder), shard_samples=4, max_bad_fraction=0, progress=False
)
"""


@pytest.mark.parametrize(
    ("where", "calls", "finished"),
    [
        ("_for_new_tar", 11, 2),  # in the middle of the third tar
        ("write_json", 3, 1),  # the second tar is there, but the manifest does not know it yet
    ],
)
def test_killed_copy_goes_on_and_ends_the_same(
    pool: Pool, tmp_path: Path, where: str, calls: int, finished: int
) -> None:
    compact(pool, select_all(pool), tmp_path / "whole")
    folder, cache = tmp_path / "killed", tmp_path / "cache"
    result = subprocess.run(
        [sys.executable, "-c", KILLED, pool.root, str(cache), str(folder), where, str(calls)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert files_of(folder) != files_of(tmp_path / "whole")
    kept = [folder / "shards" / f"{number:08d}.tar" for number in range(finished)]
    times = [path.stat().st_mtime_ns for path in kept]
    outcome = compact(pool, select_all(pool), folder)
    assert files_of(folder) == files_of(tmp_path / "whole")
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert outcome.samples == 20
    rest = pool.sample_sizes_bytes[4 * finished :].sum()
    assert outcome.copied_bytes == rest


def test_finished_copy_is_left_alone_and_a_damaged_one_repaired(pool: Pool, tmp_path: Path) -> None:
    first = compact(pool, select_all(pool), tmp_path / "copy")
    before = files_of(tmp_path / "copy")
    again = compact(pool, select_all(pool), tmp_path / "copy")
    assert (again.copied_bytes, again.shards) == (0, first.shards)
    os.truncate(tmp_path / "copy" / "shards" / "00000001.tar", 1000)
    repaired = compact(pool, select_all(pool), tmp_path / "copy")
    assert repaired.copied_bytes == pool.sample_sizes_bytes[4:8].sum()
    assert files_of(tmp_path / "copy") == before


def test_an_index_in_the_copy_is_no_stranger(pool: Pool, tmp_path: Path) -> None:
    compact(pool, select_all(pool), tmp_path / "copy")
    open_pool(
        LocalStorage(str(tmp_path / "copy")),
        cache_dir=tmp_path / "copy" / ".siftclip",
        max_bad_fraction=0,
        progress=False,
    )
    assert compact(pool, select_all(pool), tmp_path / "copy").copied_bytes == 0


# ---- what is refused ----------------------------------------------------------------------------
def test_folder_with_other_files_is_refused_and_left_alone(pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    (folder / ".thesis.tex.1.tmp").write_text("also")
    before = files_of(folder)
    message = r"must be a new or an empty folder. Got .* It holds .*thesis.tex, but no compact.json"
    with pytest.raises(InputError, match=message):
        compact(pool, select_all(pool), folder)
    assert files_of(folder) == before
    with pytest.raises(
        InputError, match=r"folder must be a folder, and it is a file. Got .*thesis.tex"
    ):
        compact(pool, select_all(pool), folder / "thesis.tex")
    with pytest.raises(InputError, match="holds shards"):
        compact(pool, select_all(pool), Path(pool.root))


def test_folder_of_another_copy_is_refused_and_left_alone(pool: Pool, tmp_path: Path) -> None:
    compact(pool, select_all(pool), tmp_path / "copy")
    before = files_of(tmp_path / "copy")
    with pytest.raises(InputError, match=r"holds another compaction: its compact.json says"):
        compact(pool, select(pool, [1, 2, 3]), tmp_path / "copy")
    with pytest.raises(InputError, match=r"shard_samples 4, this one .*shard_samples 5"):
        compact(pool, select_all(pool), tmp_path / "copy", shard_samples=5)
    assert files_of(tmp_path / "copy") == before
    (tmp_path / "copy" / "shards" / "mine.tar").write_bytes(END_MARK)
    with pytest.raises(InputError, match=r"It holds mine.tar. Move this elsewhere"):
        compact(pool, select_all(pool), tmp_path / "copy")


def test_full_disk_is_found_before_the_first_tar(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(compaction.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(InputError, match=r"needs 0.00 GB, and its disk has 0.00 GB left"):
        compact(pool, select_all(pool), tmp_path / "copy")
    assert files_of(tmp_path / "copy") == {}


@pytest.mark.parametrize("shard_samples", [0, 1.5, True])
def test_shard_size_is_checked(pool: Pool, tmp_path: Path, shard_samples: Any) -> None:
    with pytest.raises(InputError, match=r"^shard_samples must be an integer of at least 1"):
        compact(pool, select_all(pool), tmp_path / "copy", shard_samples=shard_samples)


# ---- bad sources --------------------------------------------------------------------------------
def test_source_that_has_changed_stops_the_copy(pool: Pool, tmp_path: Path) -> None:
    """However many bad samples are allowed: a whole tar would be missing."""
    os.truncate(pool.shards[0].path, int(pool.sample_offsets_bytes[5]) + 700)
    with pytest.raises(InputError, match=r"00000000\.tar has changed since the pool was opened"):
        compact(pool, select_all(pool), tmp_path / "copy", max_bad_fraction=1.0)


def test_source_that_is_gone_is_counted(pool: Pool, tmp_path: Path) -> None:
    os.unlink(pool.shards[2].path)
    outcome = compact(pool, select_all(pool), tmp_path / "copy", max_bad_fraction=0.5)
    assert outcome.faults.samples == 6
    assert "in a tar that cannot be opened" in outcome.faults.summary()


def test_source_that_was_overwritten_is_counted(pool: Pool, tmp_path: Path) -> None:
    """By a program that hides it, or by a disk that fails."""
    row, tar = 3, Path(pool.shards[0].path)
    status = tar.stat()
    with tar.open("rb+") as file:
        file.seek(int(pool.sample_offsets_bytes[row]))
        file.write(b"another name")
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    outcome = compact(pool, select_all(pool), tmp_path / "copy", max_bad_fraction=0.5)
    assert dict(outcome.faults.counts) == {"whose headers are not those that were indexed": 1}
    assert outcome.samples == 19


def test_uid_of_a_derived_sample_survives_the_next_copy(
    make_samples: Make, write_pool: Make, load_pool: LoadPool, tmp_path: Path
) -> None:
    samples = make_samples(4)
    for sample in samples:
        sample.record = None
    pool = load_pool(write_pool(samples))
    compact(pool, select_all(pool), tmp_path / "a", shard_samples=3)
    first = load_pool(tmp_path / "a", cache="a_index")
    compact(first, select_all(first), tmp_path / "b", shard_samples=4)
    second = load_pool(tmp_path / "b", cache="b_index")
    assert np.array_equal(second.uids, pool.uids)
    assert contents(second) == contents(first)
    expected = parse_uids([derive_uid(f"0000000{n // 2}.tar", samples[n].key) for n in range(4)])
    assert np.array_equal(second.uids, expected)
