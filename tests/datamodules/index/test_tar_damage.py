"""Tars that are cut or damaged give what is whole in them, and say that they are not whole."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from siftclip.datamodules.index.tar_index import ShardIndex
from siftclip.datamodules.index.tar_walk import NoTarError, TarSample
from siftclip.errors import InputError


@pytest.fixture(params=[tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def small_tar(
    request: pytest.FixtureRequest, tmp_path: Path, write_tar: Callable[..., Path]
) -> Path:
    """Five samples; the names of the second have headers of their own."""
    members = []
    for number in range(5):
        key = f"{'folder' * 30}/é{number}" if number == 1 else f"{number:05d}"
        members += [
            (f"{key}.jpg", bytes([number + 1]) * (700 + 300 * number)),
            (f"{key}.txt", b"caption"),
            (f"{key}.json", b'{"uid": "%032x"}' % number),
        ]
    return write_tar(tmp_path / "a.tar", members, tar_format=request.param)


def content_end(path: Path) -> int:
    """Where the zero blocks begin that end a tar."""
    with tarfile.open(path) as archive:
        archive.getmembers()
        return archive.offset


def test_tar_cut_anywhere_gives_a_prefix(
    list_tar: Callable[[Path], list[TarSample]],
    index_tar: Callable[[Path], ShardIndex],
    small_tar: Path,
) -> None:
    data, true_samples = small_tar.read_bytes(), list_tar(small_tar)
    end = content_end(small_tar)
    sizes = {*range(0, len(data), 700), *range(0, end + 512, 512), end - 1, end + 1, end + 511}
    lengths = set()
    for size in sorted(sizes):
        small_tar.write_bytes(data[:size])
        try:
            index = index_tar(small_tar)
        except InputError:  # not even one header
            assert size < 2048, f"cut at {size}"
            continue
        keys = [sample.key for sample in true_samples]
        assert index.keys.tolist() == [key.encode() for key in keys[: len(index)]], f"cut at {size}"
        whole = size >= end + 512
        # a cut into the zeros at the very end loses nothing, whether it is noticed or not
        assert index.truncated == (not whole) or end < size < end + 512, f"cut at {size}"
        assert index.faults.samples == int(index.truncated)
        assert (len(index) == 5) if whole else (len(index) <= 5)
        for offsets, bytes_ in (
            (index.image_offsets_bytes, index.image_sizes_bytes),
            (index.text_offsets_bytes, index.text_sizes_bytes),
        ):
            assert ((offsets + bytes_) <= size).all()
        lengths.add(len(index))
    assert lengths == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("member", [0, 1, 2])
def test_only_the_sample_which_the_cut_runs_through_is_lost(
    list_tar: Callable[[Path], list[TarSample]],
    index_tar: Callable[[Path], ShardIndex],
    small_tar: Path,
    member: int,
) -> None:
    third = list_tar(small_tar)[2]
    data = small_tar.read_bytes()
    small_tar.write_bytes(data[: third.members[member].offset_bytes + 3])
    index = index_tar(small_tar)
    assert len(index) == 2
    assert index.truncated


@pytest.mark.parametrize("behind", [b"more", b"\0" * 9_000 + b"more"], ids=["at once", "later"])
def test_what_is_behind_the_end_mark_is_not_lost_silently(
    index_tar: Callable[[Path], ShardIndex], small_tar: Path, behind: bytes
) -> None:
    """Tars that were joined by cat: no reader goes on behind the first one's end."""
    data = small_tar.read_bytes()
    whole = index_tar(small_tar)
    small_tar.write_bytes(data + bytes(1 << 15))
    assert not index_tar(small_tar).truncated
    for joined in (data + data, data + behind):
        small_tar.write_bytes(joined)
        index = index_tar(small_tar)
        assert (len(index), index.truncated, index.faults.samples) == (len(whole), True, 1)


def test_member_of_negative_size_counts_as_cut(
    index_tar: Callable[[Path], ShardIndex], tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    members = [("a.jpg", b""), ("a.txt", b"t"), ("b.jpg", b"i"), ("b.txt", b"t")]
    path = write_tar(tmp_path / "a.tar", members)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" * 11 + b"\x9c"  # -100, as GNU tar writes numbers beyond octal
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    index = index_tar(path)
    assert index.truncated
    assert len(index) == 0


def test_damaged_headers_never_escape_as_other_errors(
    index_tar: Callable[[Path], ShardIndex], small_tar: Path
) -> None:
    data, generator = small_tar.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(data)
        start = generator.randrange(0, len(data), 512)
        # half of them in the size or the type, with which tarfile computes
        where = generator.choice([generator.randrange(512), *range(124, 136), 156])
        damaged[start + where] = generator.choice([0xFF, 0x80, 0x00, 0x20, 0x39, 0x78, 0x4C])
        block = damaged[start : start + 512]
        block[148:156] = b" " * 8
        damaged[start + 148 : start + 156] = b"%06o\0 " % sum(block)  # a valid checksum
        small_tar.write_bytes(damaged)
        try:
            index = index_tar(small_tar)
        except InputError:
            outcomes.add("refused")
            continue
        outcomes.add("truncated" if index.truncated else "read")
        assert (index.image_sizes_bytes >= 0).all()
        assert (index.image_offsets_bytes + index.image_sizes_bytes <= len(data)).all()
    assert outcomes == {"truncated", "read"}


def test_garbage_in_the_middle_counts_as_cut(
    list_tar: Callable[[Path], list[TarSample]],
    index_tar: Callable[[Path], ShardIndex],
    small_tar: Path,
) -> None:
    second = list_tar(small_tar)[2]
    data = bytearray(small_tar.read_bytes())
    header = second.members[0].offset_bytes - 512
    data[header : header + 512] = b"\xa5" * 512
    small_tar.write_bytes(data)
    index = index_tar(small_tar)
    assert index.truncated
    assert len(index) < 5


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b compressed", b"PK\x03\x04" * 400, b"a" * 5000])
def test_other_files_are_not_tars(
    index_tar: Callable[[Path], ShardIndex],
    list_tar: Callable[[Path], list[TarSample]],
    content: bytes,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(NoTarError, match=r"a\.tar must be an uncompressed tar file"):
        list_tar(path)
    index = index_tar(path)
    assert index.truncated
    assert index.faults.samples == 1


def test_empty_archive_is_whole(
    index_tar: Callable[[Path], ShardIndex], tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    index = index_tar(write_tar(tmp_path / "a.tar", []))
    assert len(index) == 0
    assert not index.truncated
    assert index.uids.shape == (0, 2)


@pytest.mark.parametrize("kind", b"0KMDxLS")
@pytest.mark.parametrize(
    "field", [b"\x80" + b"\xff" * 11, b"\x80" + b"\x00" * 3 + b"\x7f" * 8, b"\xff" * 12]
)
def test_sizes_beyond_all_files_count_as_cut(
    index_tar: Callable[[Path], ShardIndex], small_tar: Path, kind: int, field: bytes
) -> None:
    """As GNU tar writes numbers that octal digits have no room for."""
    data = bytearray(small_tar.read_bytes())
    at = 1536  # the header of the first caption
    data[at + 124 : at + 136], data[at + 156] = field, kind
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    small_tar.write_bytes(data)
    index = index_tar(small_tar)
    assert index.truncated or kind in b"KMDS"
    assert (index.image_offsets_bytes + index.image_sizes_bytes <= len(data)).all()
