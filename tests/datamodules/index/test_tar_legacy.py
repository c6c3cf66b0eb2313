"""Tars of old and unusual writers, as Python's tarfile reads them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from siftclip.datamodules.index.tar_walk import BLOCK_BYTES, TarSample, TruncatedTarError, _number

Walk = Callable[[Path], list[TarSample]]
NAMES = ("é1.jpg", "é1.txt", "b.jpg")  # bytes above 127, which signed sums count below zero


def as_tarfile_sees(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as archive:
        return [
            (member.name, member.offset_data, member.size)
            for member in archive.getmembers()
            if member.isreg()
        ]


def as_we_see(samples: list[TarSample]) -> list[tuple[str, int, int]]:
    return [
        (f"{sample.key}.{member.suffix}", member.offset_bytes, member.size_bytes)
        for sample in samples
        for member in sample.members
    ]


def pax(kind: bytes, **fields: object) -> bytes:
    """A header of kind x (the next file) or g (all that follow) with its records."""
    text = b""
    for name, value in fields.items():
        body = f" {name}={value}\n"
        length = len(body) + 1
        while len(f"{length}{body}") != length:
            length += 1
        text += f"{length}{body}".encode()
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(text)
    return info.tobuf(tarfile.USTAR_FORMAT) + text.ljust(BLOCK_BYTES, b"\0")


def file(name: str, size: int, *, stated: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size if stated is None else stated
    blocks = -(-size // BLOCK_BYTES) * BLOCK_BYTES
    return info.tobuf(tarfile.USTAR_FORMAT) + (b"x" * size).ljust(blocks, b"\0")


END = bytes(2 * BLOCK_BYTES)


def with_signed_sums(data: bytes, *, off_by: int = 0) -> bytes:
    """The headers' sums as writers made them whose `char` is signed."""
    changed = bytearray(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        starts = [member.offset_data - BLOCK_BYTES for member in archive.getmembers()]
    for start in starts:
        header = changed[start : start + BLOCK_BYTES]
        header[148:156] = b" " * 8
        total = sum(byte - 256 if byte > 127 else byte for byte in header)
        changed[start + 148 : start + 156] = b"%06o\0 " % (total + off_by)
    return bytes(changed)


def test_signed_checksums_are_those_of_old_writers(
    tmp_path: Path, write_tar: Callable[..., Path], list_tar: Walk
) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"content") for name in NAMES])
    data = path.read_bytes()
    path.write_bytes(with_signed_sums(data))
    assert path.read_bytes() != data
    assert as_we_see(list_tar(path)) == as_tarfile_sees(path)
    assert [sample.key for sample in list_tar(path)] == ["é1", "b"]


@pytest.mark.parametrize("off_by", [-1, 1])
def test_signed_checksum_that_is_off_by_one_is_damage(
    off_by: int, tmp_path: Path, write_tar: Callable[..., Path], list_tar: Walk
) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"i"), (NAMES[0], b"content")])
    data = path.read_bytes()
    start = 2 * BLOCK_BYTES
    path.write_bytes(data[:start] + with_signed_sums(data[start:], off_by=off_by))
    with pytest.raises(TruncatedTarError, match="damaged header"):
        list_tar(path)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        # a field of all files that follow
        ([pax(b"g", size=700), file("a.jpg", 700, stated=0)], [("a.jpg", 700)]),
        # and one of the next file, which is nearer: it wins in either order
        (
            [pax(b"g", size=3), pax(b"x", size=700), file("a.jpg", 700, stated=0)],
            [("a.jpg", 700)],
        ),
        (
            [pax(b"x", size=700), pax(b"g", size=3), file("a.jpg", 700, stated=0)],
            [("a.jpg", 700)],
        ),
        # of one file only, then that of all holds again
        (
            [
                pax(b"g", size=600),
                pax(b"x", size=700),
                file("a.jpg", 700, stated=0),
                file("b.jpg", 600, stated=0),
            ],
            [("a.jpg", 700), ("b.jpg", 600)],
        ),
        # a later field of all files replaces an earlier one
        ([pax(b"g", path="c.txt"), pax(b"g", path="d.txt"), file("a.jpg", 5)], [("d.txt", 5)]),
        ([pax(b"g", path="c.txt"), pax(b"x", path="d.txt"), file("a.jpg", 5)], [("d.txt", 5)]),
        ([pax(b"g", path="c.txt"), file("a.jpg", 5)], [("c.txt", 5)]),
    ],
)
def test_fields_of_the_next_file_win_over_those_of_all(
    parts: list[bytes], expected: list[tuple[str, int]], tmp_path: Path, list_tar: Walk
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(parts) + END)
    found = as_we_see(list_tar(path))
    assert [(name, size) for name, _, size in found] == expected
    assert found == as_tarfile_sees(path)


@pytest.mark.parametrize(
    ("field", "number"),
    [
        (b"00000000012\0", 10),
        (b"        12 \0", 10),
        (b"12\0garbage..", 10),
        (b"\0" * 12, 0),
        (b" " * 12, 0),
        (b"00000000019\0", -1),
        (b"\x80" + b"\0" * 10 + b"\x0a", 10),
        (b"\xff" * 11 + b"\xf6", -10),
    ],
)
def test_numbers_of_all_writers(field: bytes, number: int) -> None:
    assert _number(field) == number
