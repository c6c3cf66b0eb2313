"""The walk over headers sees what tarfile and webdataset see, in any tar that they can read."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from siftclip.datamodules.index import tar_walk
from siftclip.datamodules.index.tar_index import ShardIndex
from siftclip.datamodules.index.tar_walk import LocalTar, TarSample, TruncatedTarError, walk_tar

KINDS = {
    "file": tarfile.REGTYPE,
    "old file": tarfile.AREGTYPE,
    "contiguous": tarfile.CONTTYPE,
    "folder": tarfile.DIRTYPE,
    "link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "pipe": tarfile.FIFOTYPE,
}
NAMES = st.one_of(
    st.from_regex(r"[ab]{1,2}\.(jpg|txt|json|JPG)", fullmatch=True),
    st.from_regex(r"(x/|y\.z/){0,2}[abé]{0,2}(\.[a-c.]{0,3}){0,2}", fullmatch=True),
    st.from_regex(r"__[ab]{0,2}(__)?(\.jpg|/a\.txt)?", fullmatch=True),
    st.builds(
        lambda n, c: "/".join([c * 60] * n) + "/k.jpg", st.integers(2, 5), st.sampled_from("fé")
    ),
)
MEMBERS = st.lists(
    st.tuples(
        NAMES.filter(lambda name: name.strip("/") != ""),
        st.sampled_from([*KINDS, *["file"] * 8]),
        st.one_of(st.integers(0, 1500), st.just(9000)),
        st.sampled_from([0, 1.5]),  # pax has a header of its own for parts of a second
    ),
    max_size=12,
)


def write(path: Path, members: list[tuple[str, str, int, float]], tar_format: int) -> None:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for number, (name, kind, size, mtime) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type, info.mtime = KINDS[kind], mtime  # type: ignore[assignment]  # floats are legal
            info.linkname = "target" * 30 if "link" in kind else ""
            # a name with a slash at its end is a folder in old tars, without data
            info.size = size if info.isreg() and not name.endswith("/") else 0
            archive.addfile(info, io.BytesIO(random.Random(number).randbytes(size)))


def as_webdataset_sees(path: Path) -> list[dict[str, Any]]:
    """Less hidden files in folders, which webdataset takes for parts of a sample `folder/`."""
    with path.open("rb") as file:
        members = [
            {**member, "__url__": ""}
            for member in tar_file_iterator(file)
            if not member["fname"].rpartition("/")[2].startswith(".")
        ]
    return [
        {key: value for key, value in sample.items() if key != "__url__"}
        for sample in group_by_keys(members, handler=lambda error: True)
    ]


def has_repeats(samples: list[TarSample]) -> bool:
    """Whether a sample has a suffix twice, which webdataset refuses."""
    return any(len({m.suffix for m in s.members}) < len(s.members) for s in samples)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(members=MEMBERS)
def test_any_archive_is_what_webdataset_sees(
    tar_format: int, members: list[tuple[str, str, int, float]], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("walk") / "a.tar"
    write(path, members, tar_format)
    data = path.read_bytes()
    with LocalTar(path) as tar:
        samples = list(walk_tar(tar, content_of="json"))
    if has_repeats(samples):
        return
    expected = as_webdataset_sees(path)
    assert [sample.key for sample in samples] == [sample["__key__"] for sample in expected]
    for sample, theirs in zip(samples, expected, strict=True):
        ours = {
            member.suffix: data[member.offset_bytes : member.offset_bytes + member.size_bytes]
            for member in sample.members
        }
        assert {**ours, "__key__": sample.key} == theirs
        for member in sample.members:
            assert member.content == (ours["json"] if member.suffix == "json" else None)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_range_of_a_sample_holds_all_its_members(tar_format: int, tmp_path: Path) -> None:
    """Cut out and closed with zeros, it is a tar of this sample alone, long names included."""
    names = ["a.jpg", "a.txt", "folder", "f/" * 80 + "b.jpg", "f/" * 80 + "b.txt", "c.jpg"]
    kinds = ["folder" if name == "folder" else "file" for name in names]
    write(
        tmp_path / "a.tar",
        [(name, kind, 700, 1.5) for name, kind in zip(names, kinds, strict=True)],
        tar_format,
    )
    data = (tmp_path / "a.tar").read_bytes()
    with LocalTar(tmp_path / "a.tar") as tar:
        samples = list(walk_tar(tar))
    assert [len(sample.members) for sample in samples] == [2, 2, 1]
    for sample in samples:
        part = data[sample.start_bytes : sample.end_bytes] + bytes(1024)
        with tarfile.open(fileobj=io.BytesIO(part)) as archive:
            found = [member.name for member in archive.getmembers()]
        assert found == [f"{sample.key}.{member.suffix}" for member in sample.members]


def test_blocks_of_headers_join_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.tar", [(f"{i // 3}.{'abc'[i % 3]}", "file", i, 0) for i in range(40)], 1)
    with LocalTar(tmp_path / "a.tar") as tar:
        expected = list(walk_tar(tar))
    assert len(expected) == 14
    for headers in (1, 2, 3, 7):
        monkeypatch.setattr(tar_walk, "_HEADERS_A_BLOCK", headers)
        with LocalTar(tmp_path / "a.tar") as tar:
            assert list(walk_tar(tar)) == expected


def test_damaged_header_in_a_later_block_keeps_what_is_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.tar", [(f"{i}.jpg", "file", 100, 0) for i in range(20)], 1)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024 * 13 + 5] ^= 1  # in the name of the 14th member
    (tmp_path / "a.tar").write_bytes(data)
    for headers in (4, 1024):
        monkeypatch.setattr(tar_walk, "_HEADERS_A_BLOCK", headers)
        with LocalTar(tmp_path / "a.tar") as tar:
            samples = walk_tar(tar)
            # the 13th is complete only if the 14th begins another sample, which nobody knows
            assert [next(samples).key for _ in range(12)] == [str(i) for i in range(12)]
            with pytest.raises(TruncatedTarError, match="damaged"):
                next(samples)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_sparse_files_are_passed_over(
    tmp_path: Path, index_tar: Callable[[Path], ShardIndex]
) -> None:
    with (tmp_path / "b.jpg").open("wb") as file:
        for block in range(40):  # so many holes that the map continues behind the header
            file.seek(block * 100_000)
            file.write(b"x" * 5000)
    for key in "ac":
        (tmp_path / f"{key}.jpg").write_bytes(b"image")
    for key in "abc":
        (tmp_path / f"{key}.txt").write_bytes(b"text")
    names = [f"{key}.{suffix}" for key in "abc" for suffix in ("jpg", "txt")]
    for tar_format in ("gnu", "posix"):
        command = ["tar", "-S", f"--format={tar_format}", "-cf", "s.tar", *names]
        subprocess.run(command, cwd=tmp_path, check=True)
        index = index_tar(tmp_path / "s.tar")
        assert index.keys.tolist() == [b"a", b"c"]
        assert index.faults.counts == {"without image": 1}


def test_size_of_binary_and_of_pax(tmp_path: Path) -> None:
    """Sizes from 8 GiB on are not octal; smaller ones may be written so as well."""
    write(tmp_path / "a.tar", [("a.jpg", "file", 300, 0), ("b.jpg", "file", 5, 0)], 1)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[124:136] = b"\x80" + (300).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "binary.tar").write_bytes(data)
    record = b"12 size=300\n"
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    start = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[124:136] = b"00000000000\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "pax.tar").write_bytes(start + data)
    for name in ("a.tar", "binary.tar", "pax.tar"):
        with LocalTar(tmp_path / name) as tar:
            samples = list(walk_tar(tar))
        assert [(s.key, s.members[0].size_bytes) for s in samples] == [("a", 300), ("b", 5)]


def test_of_two_members_alike_the_first_is_found(tmp_path: Path) -> None:
    members = [("a.jpg", "file", 5, 0), ("a.png", "file", 7, 0), ("a.jpg", "file", 9, 0)]
    write(tmp_path / "a.tar", members, tarfile.GNU_FORMAT)
    with LocalTar(tmp_path / "a.tar") as tar:
        (sample,) = walk_tar(tar)
    for suffixes, size in ((("jpg",), 5), (("png", "jpg"), 7), (("webp", "jpg"), 5)):
        found = sample.find(*suffixes)
        assert found is not None
        assert found.size_bytes == size
    assert sample.find("txt") is None
    assert sample.repeats()


def test_record_behind_the_time_is_not_overlooked(tmp_path: Path) -> None:
    """pax headers with a time alone are passed over quickly; this one says more."""
    write(tmp_path / "a.tar", [("a.jpg", "file", 300, 0), ("b.jpg", "file", 5, 0)], 1)
    data = (tmp_path / "a.tar").read_bytes()
    for record in (b"11 mtime=1\n14 path=c.jpg\n", b"12 mtime=1\n13 path=c.jpg\n"[:11] + b"\n"):
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        start = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
        (tmp_path / "pax.tar").write_bytes(start + data)
        with LocalTar(tmp_path / "pax.tar") as tar:
            keys = [sample.key for sample in walk_tar(tar)]
        assert keys == (["c", "b"] if b"path" in record else ["a", "b"])
