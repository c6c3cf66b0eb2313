"""The index of a tar: the samples that webdataset would give, and where their bytes are."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from siftclip.datamodules.index import tar_index
from siftclip.datamodules.index.tar_index import ShardIndex, load_shard_index
from siftclip.datamodules.index.tar_walk import LocalTar, TarSample, walk_tar
from siftclip.datamodules.index.uids import derive_uid, format_uid
from siftclip.datamodules.storage.local import LocalStorage

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
ODD_MEMBERS: list[tuple[str, bytes | None]] = [
    ("folder", None),
    ("folder/a.jpg", b"image a"),
    ("folder/a.txt", b"text a"),
    ("README", b"no dot"),
    ("b.JPG", b"image b"),
    ("b.Txt", b"text b"),
    ("no/dot/here", b"between the members of one key"),
    ("b.json", b'{"uid": "0123456789abcdef0123456789abcdef"}'),
    ("x.y/c.seg.png", b"a suffix with two dots"),
    ("x.y/c.png", b"image c"),
    ("x.y/c.txt", b""),
    ("__meta__", b"not a sample"),
    ("__meta__/d.txt", b"not a sample"),
    ("d.jpg", b"image d"),
    ("e.jpg", b"image e"),
    ("d.txt", b"the key d again, behind another one"),
    (".hidden", b"starts with a dot"),
    ("ünïcode/f.jpg", b"image f"),
    ("ünïcode/f.txt", b"text f"),
]


def as_webdataset_sees(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        members = [{**m, "__url__": ""} for m in tar_file_iterator(file)]
    samples = []
    for sample in group_by_keys(members):
        samples.append({k: v for k, v in sample.items() if k != "__url__"})
    return samples


def as_we_see(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    samples = []
    with LocalTar(path) as tar:
        walked = list(walk_tar(tar))
    for sample in walked:
        found: dict[str, Any] = {"__key__": sample.key}
        for member in sample.members:
            end = member.offset_bytes + member.size_bytes
            found[member.suffix] = data[member.offset_bytes : end]
        samples.append(found)
    return samples


def load(path: Path, cache: Path) -> ShardIndex:
    (shard,) = (s for s in LocalStorage(str(path.parent)).shards() if s.name == path.name)
    return load_shard_index(shard.name, shard.stamp, lambda: LocalTar(path), cache)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_grouping_is_webdatasets(
    tar_format: str, tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    path = write_tar(tmp_path / "a.tar", ODD_MEMBERS, tar_format=FORMATS[tar_format])
    expected = as_webdataset_sees(path)
    assert [s["__key__"] for s in expected] == [
        "folder/a",
        "b",
        "x.y/c",
        "d",
        "e",
        "d",
        "ünïcode/f",
    ]
    assert as_we_see(path) == expected


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_long_names_are_webdatasets(
    list_tar: Callable[[Path], list[TarSample]],
    tar_format: str,
    tmp_path: Path,
    write_tar: Callable[..., Path],
) -> None:
    key = "/".join(["f" * 90, "g" * 90, "k" * 140])  # longer than a header's 100 + 155 bytes
    members = [(f"{key}{i}.{suffix}", b"%d" % i) for i in range(3) for suffix in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", members, tar_format=FORMATS[tar_format])
    assert as_we_see(path) == as_webdataset_sees(path)
    assert [sample.key for sample in list_tar(path)] == [f"{key}{i}" for i in range(3)]


def test_links_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("a.jpg", tarfile.REGTYPE),
            ("a.txt", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info, io.BytesIO(b""))
    assert as_we_see(path) == as_webdataset_sees(path) == [{"__key__": "a", "jpg": b""}]


def test_names_that_are_not_utf8_can_be_shown(
    index_tar: Callable[[Path], ShardIndex], tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    path = write_tar(tmp_path / "a.tar", [("kXy.jpg", b"i"), ("kXy.txt", b"t")])
    data = bytearray(path.read_bytes())
    for start in (0, 1024):  # the two headers
        data[start + 1] = 0xE9  # é in Latin-1
        checksum = sum(data[start : start + 512]) - sum(data[start + 148 : start + 156]) + 8 * 32
        data[start + 148 : start + 156] = b"%06o\0 " % checksum
    path.write_bytes(data)
    index = index_tar(path)
    assert index.keys.tolist() == [rb"k\xe9y"]
    assert format_uid(index.uids[0]) == derive_uid("a.tar", r"k\xe9y")


def test_index_points_at_the_bytes(
    index_tar: Callable[[Path], ShardIndex],
    tmp_path: Path,
    write_tar: Callable[..., Path],
    make_samples: Callable[..., list[Any]],
) -> None:
    samples = make_samples(7)
    path = write_tar(tmp_path / "a.tar", [member for s in samples for member in s.members()])
    index = index_tar(path)
    data = path.read_bytes()
    assert len(index) == 7
    assert not index.truncated
    assert index.derived_uids == 0
    assert index.faults.samples == 0
    for i, sample in enumerate(samples):
        assert index.keys[i].decode() == sample.key
        assert format_uid(index.uids[i]) == sample.uid
        at, size = index.image_offsets_bytes[i], index.image_sizes_bytes[i]
        assert data[at : at + size] == sample.image
        at, size = index.text_offsets_bytes[i], index.text_sizes_bytes[i]
        assert data[at : at + size] == sample.caption


def test_uid_is_derived_where_there_is_none(
    index_tar: Callable[[Path], ShardIndex], tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    members: list[tuple[str, bytes]] = []
    for key, record in (("a", None), ("b", b"{}"), ("c", b'{"uid": null}'), ("d", b"[1]")):
        members += [(f"{key}.jpg", b"i"), (f"{key}.txt", b"t")]
        members += [] if record is None else [(f"{key}.json", record)]
    index = index_tar(write_tar(tmp_path / "s.tar", members))
    assert index.derived_uids == 4
    assert [format_uid(uid) for uid in index.uids] == [derive_uid("s.tar", key) for key in "abcd"]


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (b'{"uid": "abc"}', "with a uid that is not 32 hexadecimal digits"),
        (b'{"uid": "%s"}' % (b"z" * 32), "with a uid that is not 32 hexadecimal digits"),
        (b'{"uid": 7}', "with a uid that is not 32 hexadecimal digits"),
        (b'{"uid": ["%s"]}' % (b"0" * 32), "with a uid that is not 32 hexadecimal digits"),
        (b"not json", "with a uid that is not 32 hexadecimal digits"),
        (b"\xff\xff", "with a uid that is not 32 hexadecimal digits"),
        (b"[" * 100_000, "with a uid that is not 32 hexadecimal digits"),
    ],
)
def test_bad_json_is_counted_and_left_out(
    index_tar: Callable[[Path], ShardIndex],
    record: bytes,
    cause: str,
    tmp_path: Path,
    write_tar: Callable[..., Path],
) -> None:
    members = [
        ("a.jpg", b"i"),
        ("a.txt", b"t"),
        ("a.json", record),
        ("b.jpg", b"i"),
        ("b.txt", b"t"),
    ]
    index = index_tar(write_tar(tmp_path / "s.tar", members))
    assert index.keys.tolist() == [b"b"]
    assert index.faults.counts == {cause: 1}
    assert index.faults.examples == {cause: ["s.tar:a"]}


def test_sample_without_image_or_caption_is_counted(
    index_tar: Callable[[Path], ShardIndex], tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    members = [("a.txt", b"t"), ("b.jpg", b"i"), ("c.jpeg", b"i"), ("c.txt", b"t"), ("d.gif", b"i")]
    index = index_tar(write_tar(tmp_path / "s.tar", members))
    assert index.keys.tolist() == [b"c"]
    assert index.faults.counts == {"without image": 2, "without caption": 1}


def test_cached_index_is_equal_and_reused(
    tmp_path: Path, write_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [("a.txt", b"t"), ("bb.jpg", b"i"), ("bb.txt", b"t")]
    path, cache = write_tar(tmp_path / "s.tar", members), tmp_path / "cache" / "s.npz"
    fresh = load(path, cache)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the tar was read again")

    monkeypatch.setattr(tar_index, "build_shard_index", refuse)
    cached = load(path, cache)
    for name in ("uids", "keys", "image_offsets_bytes", "text_offsets_bytes", "text_sizes_bytes"):
        assert np.array_equal(getattr(cached, name), getattr(fresh, name))
    assert cached.faults == fresh.faults
    assert (cached.derived_uids, cached.truncated) == (1, False)


def test_cache_is_rebuilt_when_the_tar_changes(
    tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    path, cache = tmp_path / "s.tar", tmp_path / "s.npz"
    write_tar(path, [("a.jpg", b"i"), ("a.txt", b"t")])
    assert load(path, cache).keys.tolist() == [b"a"]
    status = path.stat()
    write_tar(path, [("b.jpg", b"i"), ("b.txt", b"t")])  # of equal size: only the time differs
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load(path, cache).keys.tolist() == [b"b"]
    status = path.stat()
    members = [(f"{key}.{suffix}", b"x" * 9000) for key in "cd" for suffix in ("jpg", "txt")]
    write_tar(path, members)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # of equal time: only the size
    assert load(path, cache).keys.tolist() == [b"c", b"d"]


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_damaged_cache_is_rebuilt(
    keep: int, tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    path, cache = tmp_path / "s.tar", tmp_path / "s.npz"
    write_tar(path, [("a.jpg", b"i"), ("a.txt", b"t"), ("a.json", json.dumps({}).encode())])
    load(path, cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:keep])
    assert load(path, cache).keys.tolist() == [b"a"]
    assert cache.read_bytes() == whole
