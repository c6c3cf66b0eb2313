"""A root that is no pool: the message says what is there, and what to name or to type instead."""

from __future__ import annotations

import gzip
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.datamodules.pool.pool import Pool, make_storage, metadata_tables
from siftclip.datamodules.storage.folders import describe_names
from siftclip.errors import InputError

Make = Callable[..., Any]
PAIR = [("a.jpg", b"i"), ("a.txt", b"t")]


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def message_of(root: Path | str, cache_dir: Path) -> str:
    with pytest.raises(InputError) as caught:
        Pool(root, cache_dir=cache_dir, progress=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "root", "ends"),
    [
        ([], "", "It is empty."),
        ([".cache/x", ".DS_Store"], "", "It is empty."),
        (["a.csv", "b.csv", "README"], "", "It holds 2 .csv and 1 without a suffix."),
        (["0.TAR"], "", "It holds 1 .TAR. Rename them: the suffix is .tar in lower case."),
        (["cat/0.jpg", "dog/0.jpg"], "", "It holds the folders cat, dog."),
        (
            ["train/0.tar", "val/0.tar", "val/1.tar"],
            "",
            "It holds the folders train, val. Name one of its folders that hold tars: "
            "{root}/train (tars: 1), {root}/val (tars: 2)",
        ),
        (["a/shards/0.tar"], "", "Name one of its folders that hold tars: {root}/a (tars: 1)"),
        (
            ["shards/0.tar", "metadata/0.parquet"],
            "metadata",
            "It holds 1 .parquet. It is the metadata of a pool: name {root}",
        ),
        (
            ["train-0.parquet"],
            "",
            "It holds 1 .parquet. Images are not read from parquet files: docs/pools.md has a "
            "program that writes them as tars.",
        ),
        (["0.tar"], "0.tar", "It is one tar. Name its folder: {root}"),
        (["pool.csv"], "pool.csv", "pool.csv'. It is a file."),
        ([], "nowhere", "must be an existing folder or a URL. Got '{root}/nowhere'."),
    ],
)
def test_message_says_what_is_there(names: list[str], root: str, ends: str, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    write(folder, *names)
    message = message_of(folder / root if root else folder, tmp_path / "cache")
    assert message.endswith(ends.format(root=folder))


def run_advice(message: str, first_word: str, folder: Path) -> None:
    command = message[message.rindex(first_word) :]
    subprocess.run(["bash", "-c", command], check=True, cwd=folder)


def test_folder_of_images_is_packed(tmp_path: Path) -> None:
    root = tmp_path / "my images"
    write(root, *(f"{n}.{suffix}" for n in range(3) for suffix in ("jpg", "txt")))
    message = message_of(root, tmp_path / "cache")
    assert "It holds 3 .jpg and 3 .txt. Images beside captions of the same name" in message
    run_advice(message, "mkdir new;", tmp_path)
    assert len(Pool(tmp_path / "new", max_bad_fraction=0, progress=False)) == 3


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
def test_compressed_tars_are_decompressed(suffix: str, tmp_path: Path, write_tar: Make) -> None:
    tar = write_tar(tmp_path / "0.tar", PAIR)
    root = tmp_path / "a pool"
    root.mkdir()
    (root / f"0{suffix}").write_bytes(gzip.compress(tar.read_bytes()))
    message = message_of(root, tmp_path / "cache")
    assert f"It holds 1 {suffix}. Single samples cannot be read from compressed tars." in message
    run_advice(message, "gunzip", tmp_path)
    assert len(Pool(root, progress=False)) == 1


@pytest.mark.parametrize("pattern", ["shards/*.tar", "shards/{0..1}.tar", "shards/[01].tar"])
def test_pattern_becomes_a_folder_of_links(pattern: str, tmp_path: Path, write_tar: Make) -> None:
    for number in range(2):
        write_tar(tmp_path / "pool" / "shards" / f"{number}.tar", PAIR)
    message = message_of(tmp_path / "pool" / pattern, tmp_path / "cache")
    assert f"A pool is all tars of a folder: name {tmp_path}/pool/shards." in message
    run_advice(message, "mkdir part;", tmp_path)
    assert len(Pool(tmp_path / "part", progress=False)) == 2


def test_shards_of_a_pool_find_the_metadata_beside_them(
    make_samples: Make, write_pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_pool(make_samples(4))
    write(root, "metadata/0.parquet")
    for place in (root, root / "shards"):
        pool = Pool(place, cache_dir=tmp_path / "cache", progress=False)
        assert metadata_tables(pool) == [root / "metadata" / "0.parquet"]
    monkeypatch.chdir(root / "shards")
    pool = Pool(".", cache_dir=tmp_path / "cache", progress=False)
    assert metadata_tables(pool) == [root / "metadata" / "0.parquet"]


def test_place_behind_a_url_is_described(tmp_path: Path) -> None:
    import fsspec

    filesystem = fsspec.filesystem("memory")
    filesystem.makedirs("/stranger/train")
    for name in ("a.parquet", "b.parquet", "train/0.tar"):
        filesystem.pipe(f"/stranger/{name}", b"x")
    storage = make_storage("memory://stranger", cache_dir=tmp_path, options={}, shard_cache_gb=0)
    with pytest.raises(
        InputError, match=r"It holds none. It holds 2 .parquet and the folder train. A server"
    ):
        storage.shards()


def test_names_are_listed_by_number() -> None:
    names = [*"abc", "a.x", "b.x", "c.y", "d.z", "e.w", "f.v", "0.tar.gz"]
    expected = "It holds 3 without a suffix, 2 .x, 1 .tar.gz, 1 .v and 3 more."
    assert describe_names(names, []) == expected
    assert describe_names([], list("edcba")) == "It holds the folders a, b, c, d and 1 more."
