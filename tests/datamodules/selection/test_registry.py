"""Named subsets: what made them stays with them, and nothing half written is taken for one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.selection.registry import (
    SubsetEntry,
    describe_input,
    find_subset,
    pool_record,
    read_entry,
    read_tar_records,
    require_name,
    subset_names,
    tar_records,
    write_named,
)
from siftclip.datamodules.selection.selection import make_selection, read_selection, write_selection
from siftclip.datamodules.selection.subset_files import read_subset_file
from siftclip.errors import InputError, ParameterError
from siftclip.files import sha256_of
from siftclip.writing import WriteError

Make = Callable[..., Any]
SUBSET = CountedUids(np.array([[0, 4], [0, 9]], dtype=np.uint64), np.array([1, 3]))
OTHER = CountedUids(SUBSET.uids[:1], SUBSET.multiplicities[:1])


def write(root: Path, name: str, subset: CountedUids = SUBSET, **more: Any) -> SubsetEntry:
    return write_named(root, name, subset, operation="import", inputs=[], **more)[0]


def test_a_subset_is_a_selection_with_its_making(tmp_path: Path) -> None:
    source = tmp_path / "a.npy"
    np.save(source, np.array([(0, 9), (0, 4), (0, 9), (0, 9)], dtype=np.dtype("u8,u8")))
    file = read_subset_file(source)
    given = describe_input(file, kind=file.format, place=str(source))
    root = tmp_path / "subsets"
    entry, is_new = write_named(root, "best", file.counted, operation="import", inputs=[given])
    assert is_new
    assert sorted(path.name for path in entry.folder.iterdir()) == [
        "selection.json",
        "selection.npy",
    ]
    selection = read_selection(root / "best")
    assert selection.digest == entry.digest
    assert selection.to_subset().tolist() == [(0, 4), (0, 9), (0, 9), (0, 9)]
    manifest = read_entry(root, "best").manifest
    assert manifest == {**selection.manifest, "digest": entry.digest}
    assert (manifest["kept_samples"], manifest["kept_distinct"], manifest["pool"]) == (4, 2, None)
    (noted,) = manifest["made"]["inputs"]
    assert noted["files"] == {"a.npy": sha256_of(source)}
    assert (noted["kind"], noted["place"]) == ("datacomp", str(source))
    assert (noted["digest"], noted["samples"], noted["distinct"]) == (entry.digest, 4, 2)


def test_what_made_a_selection_goes_along(tmp_path: Path) -> None:
    uids = np.array([[0, 4]], dtype=np.uint64)
    about = {"selector": "vas", "parameters": {"api_key": "sesame"}, "cost": {"seconds": 1}}
    write_selection(make_selection(uids, np.array([1]), about), tmp_path / "run")
    file, given = find_subset(tmp_path / "subsets", str(tmp_path / "run"))
    assert (file.format, given["kind"]) == ("selection", "selection")
    assert given["selection"] == {"selector": "vas", "parameters": {"api_key": "***"}}
    write_named(tmp_path / "subsets", "a", file.counted, operation="import", inputs=[given])
    again = find_subset(tmp_path / "subsets", "a")[1]
    assert again["selection"]["made"]["inputs"] == [given]  # of a subset the whole chain
    assert again["kind"] == "subset"


def test_the_same_samples_are_kept_once_and_others_refused(tmp_path: Path) -> None:
    entry = write(tmp_path, "a")
    before = {path: path.stat().st_mtime_ns for path in entry.folder.iterdir()}
    again, is_new = write_named(tmp_path, "a", SUBSET, operation="union", inputs=[])
    assert not is_new
    assert again.manifest["made"]["operation"] == "import"
    assert {path: path.stat().st_mtime_ns for path in entry.folder.iterdir()} == before
    with pytest.raises(ParameterError, match=r"name is that of another subset, of 4 samples"):
        write(tmp_path, "a", OTHER)
    assert read_entry(tmp_path, "a").digest == entry.digest
    assert write(tmp_path, "a", OTHER, overwrite=True).digest != entry.digest
    assert read_selection(tmp_path / "a").uids.tolist() == [[0, 4]]


def test_weights_and_tars_go_when_the_new_subset_has_none(tmp_path: Path) -> None:
    tars: Any = {"0.tar": {"size_bytes": 1, "samples": 2, "stamp": "x"}}
    write(tmp_path, "a", weights=np.array([1, 2], dtype=np.float32), tars=tars)
    assert read_tar_records(tmp_path / "a") == tars
    assert read_selection(tmp_path / "a").weights is not None
    write(tmp_path, "a", overwrite=True)
    assert sorted(os.listdir(tmp_path / "a")) == ["selection.json", "selection.npy"]


@pytest.mark.parametrize("kept", ["tars.json", "selection.npy", "selection.json"])
def test_a_killed_writer_leaves_the_old_subset_or_none(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of its files: what is then there is no mixture of two subsets."""
    tars: Any = {"0.tar": {"size_bytes": 1, "samples": 2, "stamp": "x"}}
    old = write(tmp_path, "a").digest
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == kept:
            raise OSError(5, "killed here")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises((OSError, WriteError)):
            write(tmp_path, "a", OTHER, tars=tars, overwrite=True)
    assert subset_names(tmp_path) == []
    with pytest.raises(InputError, match="there are none"):
        read_entry(tmp_path, "a")
    new = write(tmp_path, "a", OTHER, tars=tars)  # the same command again
    assert read_selection(tmp_path / "a").uids.tolist() == [[0, 4]]
    assert new.digest != old


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".a", "-a", "a b", "a.tmp", "x" * 101, "ä"])
def test_names_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="name must be 1 to 100 letters"):
        write(tmp_path, name)
    assert not list(tmp_path.rglob("*"))


def test_good_names() -> None:
    for name in ("a", "clip_score-30.2", "0", "A" * 100):
        assert require_name(name) == name


def test_damaged_subsets_are_listed_and_told(tmp_path: Path) -> None:
    write(tmp_path, "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    (tmp_path / "bad" / "selection.json").write_text('{"name": 3}')
    (tmp_path / "stranger").mkdir()
    (tmp_path / "notes.txt").touch()
    assert subset_names(tmp_path) == ["bad", "good"]
    with pytest.raises(InputError, match=r"bad/selection\.json.* Delete the folder"):
        read_entry(tmp_path, "bad")
    (tmp_path / "good" / "tars.json").write_text("[]")
    with pytest.raises(InputError, match=r"tars\.json must be an object.* is then not named"):
        read_tar_records(tmp_path / "good")


def test_a_reference_is_a_name_before_it_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("subsets")
    write(root, "a")
    np.save("a", np.array([(5, 5)], dtype=np.dtype("u8,u8")))
    assert find_subset(root, "a")[0].counted.samples == 4
    assert find_subset(root, "a.npy")[0].counted.samples == 1
    assert find_subset(root, "subsets/a")[1]["kind"] == "selection"
    with pytest.raises(InputError, match=r"'b' must be the name of a subset in subsets \(a\), or"):
        find_subset(root, "b")


def test_the_pool_and_its_tars_are_noted(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = load_pool(write_pool(make_samples(5), shards=2))
    write(tmp_path / "subsets", "a", pool=pool_record(pool), tars=tar_records(pool))
    noted = json.loads((tmp_path / "subsets" / "a" / "selection.json").read_text())["pool"]
    assert noted == {
        "root": pool.root,
        "fingerprint": pool.fingerprint,
        "samples": 5,
        "members": pool.members_digest,
    }
    tars = read_tar_records(tmp_path / "subsets" / "a")
    assert tars is not None
    assert {name: tar["samples"] for name, tar in tars.items()} == {
        "00000000.tar": 3,
        "00000001.tar": 2,
    }
    for shard in pool.shards:
        assert tars[shard.name]["size_bytes"] == Path(shard.path).stat().st_size
