"""Guards as budgets: what a tar says may not make anyone read more than its share."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pools import changed_pool

from siftclip.datamodules.index.tar_index import SHARED_NAME, build_shard_index
from siftclip.datamodules.index.tar_walk import (
    BLOCK_BYTES,
    MAX_CONTENT_BYTES,
    TruncatedTarError,
    round_up,
    walk_tar,
)
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import (
    MAX_SPAN_BYTES,
    BadSampleError,
    RawSample,
    SampleReader,
    coalesce,
    read_ranges,
)
from siftclip.datamodules.storage.local import Span, StorageError

Make = Callable[..., Any]
MORE = 64 << 10  # windows and headers beside what a header may make us read


class SparseTar:
    """A tar whose members are zeros but for their headers, and who asked for how many bytes."""

    name = "sparse.tar"

    def __init__(self, members: Sequence[tuple[str, bytes, int]]) -> None:
        """`members` are names, kinds and sizes."""
        self.headers: dict[int, bytes] = {}
        position = 0
        for name, kind, size in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, size
            self.headers[position] = info.tobuf(tarfile.GNU_FORMAT)
            position += BLOCK_BYTES + round_up(size)
        self.size_bytes = position + 2 * BLOCK_BYTES
        self.asked: list[int] = []

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        self.asked.append(size_bytes)
        assert size_bytes <= MAX_CONTENT_BYTES + MORE, "more than a header may make us read"
        data = bytearray(max(0, min(size_bytes, self.size_bytes - offset_bytes)))
        for at, header in self.headers.items():
            if offset_bytes <= at < offset_bytes + len(data):
                start = at - offset_bytes
                data[start : start + BLOCK_BYTES] = header[: len(data) - start]
        return bytes(data)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [MAX_CONTENT_BYTES + 1, 1 << 30])
def test_long_header_does_not_choose_the_memory(kind: bytes, size: int) -> None:
    first = [("a.jpg", tarfile.REGTYPE, 10), ("a.txt", tarfile.REGTYPE, 10)]
    tar = SparseTar([*first, ("long", kind, size), ("b.jpg", tarfile.REGTYPE, 10)])
    with pytest.raises(TruncatedTarError, match="inside a long header"):
        list(walk_tar(tar))
    assert sum(tar.asked) < MORE
    assert build_shard_index(tar, tar.name).truncated


def test_long_header_of_the_largest_size_is_read() -> None:
    tar = SparseTar([("long", tarfile.XHDTYPE, MAX_CONTENT_BYTES), ("b.jpg", tarfile.REGTYPE, 10)])
    assert [sample.key for sample in walk_tar(tar)] == ["b"]
    assert MAX_CONTENT_BYTES <= sum(tar.asked) < MAX_CONTENT_BYTES + MORE


@pytest.mark.parametrize(
    ("size", "read"), [(MAX_CONTENT_BYTES, True), (MAX_CONTENT_BYTES + 1, False), (1 << 32, False)]
)
def test_json_does_not_choose_the_memory(size: int, read: bool) -> None:
    tar = SparseTar([("a.jpg", tarfile.REGTYPE, 10), ("a.json", tarfile.REGTYPE, size)])
    (sample,) = walk_tar(tar, content_of="json")
    record = sample.find("json")
    assert record is not None
    assert record.content == (bytes(size) if read else b"")
    assert (sum(tar.asked) > MORE) == read


@pytest.mark.parametrize(
    ("size", "alike"), [(MAX_CONTENT_BYTES, True), (MAX_CONTENT_BYTES + 1, False)]
)
def test_members_of_one_name_are_compared_up_to_a_size(size: int, alike: bool) -> None:
    """Beyond it they count as different, unread."""
    pair = [("k.jpg", tarfile.REGTYPE, size), ("k.txt", tarfile.REGTYPE, 10)]
    tar = SparseTar([*pair, *pair])
    index = build_shard_index(tar, tar.name)
    assert index.repeated == alike
    assert index.faults.counts == ({} if alike else {SHARED_NAME: 1})
    assert (sum(tar.asked) > MORE) == alike


RANGES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 300), st.integers(0, 60)), min_size=1, max_size=30
)


@given(RANGES, st.integers(0, 40), st.integers(1, 120))
def test_joined_ranges_stay_within_gap_and_size(
    ranges: list[tuple[int, int, int]], max_gap_bytes: int, max_span_bytes: int
) -> None:
    shards, starts, sizes = np.array(ranges).T
    spans = coalesce(
        shards,
        starts,
        starts + sizes,
        max_gap_bytes=max_gap_bytes,
        max_span_bytes=max_span_bytes,
    )
    found = sorted(number for *_, pieces in spans for number, _, _ in pieces)
    assert found == list(range(len(ranges)))
    for shard, first, last, pieces in spans:
        assert last - first <= max_span_bytes or len(pieces) == 1
        reached = first
        for number, start, end in pieces:
            assert (shard, first + start, end - start) == ranges[number]
            assert first + start <= reached + max_gap_bytes
            reached = max(reached, first + end)
        assert reached == last


class AskedStorage:
    """A storage that says what is asked of it."""

    def __init__(self, storage: Any) -> None:
        self._storage, self.spans = storage, list[Span]()
        self.max_gap_bytes = storage.max_gap_bytes

    def read(self, spans: Sequence[Span]) -> Iterator[bytes | StorageError]:
        self.spans += spans
        yield from self._storage.read(spans)

    def bytes_asked(self) -> list[int]:
        return [span.end_bytes - span.start_bytes for span in self.spans]


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: Make) -> Pool:
    opened: Pool = load_pool(write_pool(make_samples(8), shards=2))
    return changed_pool(opened, storage=AskedStorage(opened.storage))


def test_member_larger_than_any_picture_is_not_read(pool: Pool) -> None:
    """Neither as image nor as caption, and its neighbours are as before."""
    reader = SampleReader(pool=pool, max_image_pixels=10_000)
    rows = np.arange(8)
    expected = dict(reader.read(rows))
    limit = reader.max_member_bytes
    assert limit == 4 * 10_000 + (1 << 20)
    images, texts = pool.image_sizes_bytes.copy(), pool.text_sizes_bytes.copy()
    images[2], texts[5], images[6] = limit + 1, 1 << 40, limit
    lying = changed_pool(pool, image_sizes_bytes=images, text_sizes_bytes=texts)
    asked: AskedStorage = lying.storage  # type: ignore[assignment]
    asked.spans.clear()
    found = dict(SampleReader(pool=lying, max_image_pixels=10_000).read(rows))
    causes = {row: str(found[row]) for row in rows if isinstance(found[row], BadSampleError)}
    too_large = "with more bytes than max_image_pixels allows"
    too_long = "with a caption of more than max_caption_bytes"
    assert causes == {2: too_large, 5: too_long, 6: "cut off by the end of their tar"}
    assert max(asked.bytes_asked()) <= limit + MORE
    for row in set(rows.tolist()) - causes.keys():
        assert isinstance(found[row], RawSample)
        assert found[row] == expected[row]


def test_neighbours_are_read_in_pieces_of_a_bounded_size(pool: Pool) -> None:
    """64 images of a megabyte each, one behind the other: no piece is larger than the bound."""
    count, size = 64, 1 << 20
    starts = np.arange(count, dtype=np.int64) * size
    found = [
        number
        for number, _ in read_ranges(
            pool, np.zeros(count, dtype=np.int32), starts, np.full(count, size)
        )
    ]
    asked: AskedStorage = pool.storage  # type: ignore[assignment]
    assert sorted(found) == list(range(count))
    assert asked.bytes_asked() == [MAX_SPAN_BYTES] * (count * size // MAX_SPAN_BYTES)


def test_a_storage_that_answers_too_little_is_no_end_of_the_pool(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool.storage, "read", lambda spans: iter([b"a"]))
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        list(read_ranges(pool, np.array([0, 1]), np.array([0, 0]), np.array([9, 9])))
