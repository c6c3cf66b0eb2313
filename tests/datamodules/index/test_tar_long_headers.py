"""Long headers that are damaged end the walk, and none takes longer than its size allows."""

from __future__ import annotations

import io
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.datamodules.index.tar_index import MAX_KEY_BYTES, build_shard_index
from siftclip.datamodules.index.tar_walk import (
    LocalTar,
    TruncatedTarError,
    _find_key_end,
    walk_tar,
)

LONG = b"a.b/" + b"a/" * 200_000
RECORDS = {
    "no end": b"0 path=x\n",
    "no length": b"path=x\n" * 3,
    "length of twenty digits": b"99999999999999999999 path=x\n",
    "negative length": b"-5 path=x\n",
    "behind a good one": b"9 path=x\n" + b"xyz",
    "negative size": b"12 size=-10\n",
    "huge size": b"22 size=99999999999999\n",
    "size of thousands of digits": b"5013 size=" + b"9" * 5002 + b"\n",
}


def with_extended(kind: bytes, content: bytes) -> bytes:
    """A tar with a long header of some content, and a file behind it."""
    parts = []
    for name, type_, data in (("a", kind, content), ("b.jpg", b"0", b"image")):
        info = tarfile.TarInfo(name)
        info.size, info.type = len(data), type_
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % 512)]
    return b"".join([*parts, bytes(1024)])


@pytest.mark.parametrize("name", RECORDS)
def test_damaged_pax_records_end_the_walk(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(with_extended(b"x", RECORDS[name]))
    with LocalTar(path) as tar, pytest.raises(TruncatedTarError):
        list(walk_tar(tar))


def test_long_headers_take_a_time_in_proportion_to_their_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for kind, content in ((b"x", b"5 a=\n" * 400_000), (b"L", LONG), (b"L", b"a/" * 500_000)):
        path.write_bytes(with_extended(kind, content))
        start = time.monotonic()
        with LocalTar(path) as tar:
            list(walk_tar(tar))
        assert time.monotonic() - start < 10  # of squares: minutes


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(alphabet="a_./\n", max_size=12))
def test_keys_follow_webdatasets_expression(name: str) -> None:
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    end = _find_key_end(name)
    assert (name[:end], name[end + 1 :] if end else "") == (match.groups() if match else ("", ""))


def test_a_name_of_thousands_of_bytes_is_a_fault_of_its_sample(tmp_path: Path) -> None:
    """The array of a pool's keys is as wide as the longest of them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for key in ("a", "b" * 100_000, "c" * MAX_KEY_BYTES, "é" * MAX_KEY_BYTES):
            for suffix in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = 1
                archive.addfile(info, io.BytesIO(b"x"))
    path = tmp_path / "a.tar"
    path.write_bytes(buffer.getvalue())
    with LocalTar(path) as tar:
        index = build_shard_index(tar, "a.tar")
    assert index.keys.tolist() == [b"a", b"c" * MAX_KEY_BYTES]
    (cause,) = index.faults.counts
    assert cause == f"with a name of more than {MAX_KEY_BYTES} bytes"
    assert index.faults.counts[cause] == 2
    assert len(index.faults.summary()) < 1500
    assert index.uids.dtype == np.uint64
