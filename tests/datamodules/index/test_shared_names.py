"""Members under one key that are several samples: counted, told apart by an option, never lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.datamodules.index.tar_index import (
    DOTTED_NAMES,
    SHARED_NAME,
    ShardIndex,
    build_shard_index,
)
from siftclip.datamodules.index.tar_walk import KeySplit, LocalTar
from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.pool.image_sizes import read_image_sizes
from siftclip.datamodules.pool.pool import open_pool
from siftclip.datamodules.pool.reader import RawSample, SampleReader
from siftclip.datamodules.selection.compaction import compact_pool
from siftclip.datamodules.selection.selection import make_selection
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.errors import InputError

Make = Callable[..., Any]
Member = tuple[str, bytes]
APART = "whose image and caption do not follow each other in their tar"
UIDS = ["0123456789abcdef" * 2, "fedcba9876543210" * 2]


@pytest.fixture
def index(tmp_path: Path, write_tar: Make) -> Callable[..., tuple[ShardIndex, list[Any]]]:
    """`index("a.jpg", ("a.txt", b"text"))`: the index, and image and caption of each sample.

    A name alone is the content of its member.
    """

    def build(
        *members: str | Member, key_split: KeySplit = "first_dot"
    ) -> tuple[ShardIndex, list[Any]]:
        path = write_tar(
            tmp_path / "s.tar", [(m, m.encode()) if isinstance(m, str) else m for m in members]
        )
        with LocalTar(path) as tar:
            index = build_shard_index(tar, path.name, key_split)
        return index, contents(index, path)

    return build


def contents(index: ShardIndex, path: Path) -> list[tuple[bytes, bytes]]:
    data = path.read_bytes()
    parts = [
        [data[at : at + size] for at, size in zip(starts, sizes, strict=True)]
        for starts, sizes in (
            (index.image_offsets_bytes, index.image_sizes_bytes),
            (index.text_offsets_bytes, index.text_sizes_bytes),
        )
    ]
    return list(zip(*parts, strict=True))


def pair(key: str) -> tuple[str, str]:
    return f"{key}.jpg", f"{key}.txt"


# ---- dots in names ----------------------------------------------------------------------------


def test_pairs_that_differ_behind_the_first_dot_are_each_counted(index: Make) -> None:
    members = [name for n in range(60) for name in pair(f"movie.{n:04d}")]
    built, read = index(*members, *pair("other"))
    assert read == [(b"other.jpg", b"other.txt")]
    assert built.faults.counts == {DOTTED_NAMES: 60}
    (place,) = built.faults.examples[DOTTED_NAMES]
    assert place == ("s.tar:movie [movie.0000.jpg, movie.0000.txt, movie.0001.jpg and 117 more]")
    assert "last_dot as the key split" in DOTTED_NAMES


def test_last_dot_makes_samples_of_them(index: Make) -> None:
    members = [name for n in range(3) for name in pair(f"a.b/movie.{n}")]
    skipped = ["a.b/none", "a.b/.hidden.jpg", "._movie.0.jpg", "__meta__/a.b.jpg"]
    built, read = index(*members, *skipped, "x.JPG", "x.TXT", key_split="last_dot")
    assert built.keys.tolist() == [b"a.b/movie.0", b"a.b/movie.1", b"a.b/movie.2", b"x"]
    assert read[1] == (b"a.b/movie.1.jpg", b"a.b/movie.1.txt")
    assert built.faults.samples == built.hidden.samples == 0


@pytest.mark.parametrize(
    "beside",
    [
        ["0001.seg.png", "0001.mask.png"],
        ["0001.input.jpg", "0001.output.jpg"],
        ["0001.input.jpg", "0001.outputs.txt"],
        ["0001.caption.txt"],
        ["0001.cls", "0001.depth.npy"],
    ],
)
def test_members_beside_a_picture_change_nothing(index: Make, beside: list[str]) -> None:
    for members in ([*pair("0001"), *beside], [*beside, *pair("0001")]):
        built, read = index(*members)
        assert read == [(b"0001.jpg", b"0001.txt")]
        assert built.faults.samples == built.hidden.samples == built.repeated == 0


def test_pairs_beside_a_picture_are_pointed_out(
    tmp_path: Path, write_tar: Make, caplog: pytest.LogCaptureFixture
) -> None:
    members = [*pair("movie"), *pair("movie.0001"), *pair("movie.0002"), *pair("other")]
    write_tar(tmp_path / "pool" / "s.tar", [(name, name.encode()) for name in members])
    storage = LocalStorage(str(tmp_path / "pool"))
    for key_split, samples in (("first_dot", 2), ("last_dot", 4), ("first_dot", 2)):
        caplog.clear()
        pool = open_pool(
            storage,
            cache_dir=tmp_path / "cache",
            max_bad_fraction=0,
            key_split=key_split,  # type: ignore[arg-type]  # one of them
            progress=False,
        )
        assert (len(pool), pool.key_split) == (samples, key_split)
        assert ("2 pairs (such as s.tar:movie [movie.jpg" in caplog.text) == (samples == 2)
        assert ("last_dot as the key split" in caplog.text) == (samples == 2)


def test_rule_for_keys_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^key_split must be one of first_dot, last_dot\."):
        open_pool(
            LocalStorage(str(tmp_path)),
            cache_dir=tmp_path,
            max_bad_fraction=0,
            key_split="middle",  # type: ignore[arg-type]  # what a user may write
        )


def test_members_are_named_where_nothing_is_usable(
    tmp_path: Path, write_tar: Make, load_pool: Make
) -> None:
    root = tmp_path / "pool"
    write_tar(root / "a.tar", [("s1.input.jpg", b"i"), ("s1.outputs.txt", b"t")])
    with pytest.raises(InputError, match=r"1 without image .*\[s1\.input\.jpg, s1\.outputs\.txt\]"):
        load_pool(root)
    with pytest.raises(InputError, match=r"without one sample\. Left out: 1 without image"):
        load_pool(root, max_bad_fraction=1.0)
    write_tar(root / "a.tar", [("s1.jpg", b"i"), ("s1.json", b"{}")])
    with pytest.raises(InputError, match=r"1 without caption .*\[s1\.jpg, s1\.json\]"):
        load_pool(root)


# ---- one name for several samples -------------------------------------------------------------


def test_pairs_under_one_name_are_counted_as_samples(index: Make) -> None:
    members = [("k.jpg", b"image %d" % n) for n in range(40)]
    texts = [("k.txt", b"text %d" % n) for n in range(40)]
    in_turn = [member for both in zip(members, texts, strict=True) for member in both]
    built, read = index(*in_turn, *pair("z"))
    assert read == [(b"image 0", b"text 0"), (b"z.jpg", b"z.txt")]
    assert built.faults.counts == {SHARED_NAME: 39}
    assert "[k.jpg, k.txt, k.jpg and 77 more]" in built.faults.examples[SHARED_NAME][0]
    built, read = index(*members, *texts)  # whose caption is whose is anyone's guess
    assert read == []
    assert built.faults.counts == {SHARED_NAME: 40}


@pytest.mark.parametrize(
    ("members", "lost"),
    [
        (["k.jpg", "k.txt", ("k.JPG", b"other")], 1),  # suffixes are read in lower case
        (["k.jpg", "k.txt", "k.json", ("k.json", b"[1]")], 1),
        (["k.jpg", "k.txt", "k.seg.png", ("k.seg.png", b"other")], 1),
        (["k.jpg", ("k.jpg", b"other"), "k.txt"], 2),
        ([*pair("k"), *pair("m"), ("k.jpg", b"other"), "k.txt"], 1),  # not next to each other
        ([*pair("k"), *pair("m"), "k.jpg", ("k.txt", b"other")], 1),
    ],
)
def test_members_of_one_suffix_are_a_fault(
    index: Make, members: list[str | Member], lost: int
) -> None:
    members = [("k.json", b"{}") if member == "k.json" else member for member in members]
    built, read = index(*members)
    assert built.faults.counts == {SHARED_NAME: lost}
    assert built.repeated == 0
    if lost == 1:
        assert read[0] == (b"k.jpg", b"k.txt")


@pytest.mark.parametrize("between", [(), pair("m")])
def test_sample_that_was_written_twice_is_a_repeat(index: Make, between: tuple[str, ...]) -> None:
    built, read = index(*pair("k"), *between, *pair("k"), *pair("z"))
    assert built.repeated == 1
    assert built.faults.samples == 0
    assert read[0] == (b"k.jpg", b"k.txt")
    assert len(read) == 2 + bool(between)


def test_names_of_their_own_uids_may_come_twice(index: Make) -> None:
    members: list[str | Member] = []
    for number, uid in enumerate(UIDS):
        members += [*pair("k"), ("k.json", b'{"uid": "%s"}' % uid.encode()), *pair(f"m{number}")]
    built, _ = index(*members)
    assert built.keys.tolist() == [b"k", b"m0", b"k", b"m1"]
    assert [format_uid(built.uids[row]) for row in (0, 2)] == UIDS
    assert built.faults.samples == built.repeated == 0


def test_parts_that_stand_apart_are_one_fault_a_sample(index: Make) -> None:
    keys = [f"{n}" for n in range(5)]
    built, read = index(*(f"{k}.jpg" for k in keys), *(f"{k}.txt" for k in keys), "lone.jpg")
    assert read == []
    assert built.faults.counts == {APART: 5, "without caption": 1}


def test_preferred_image_counts_in_any_order(index: Make) -> None:
    for members in (["k.webp", "k.png", "k.jpg", "k.txt"], ["k.jpg", "k.txt", "k.jpeg", "k.png"]):
        assert index(*members)[1] == [(b"k.jpg", b"k.txt")]
    assert index("k.webp", "k.jpeg", "k.png", "k.txt")[1] == [(b"k.png", b"k.txt")]


@pytest.mark.parametrize(
    ("record", "uid", "cause"),
    [
        (b'{"uid": "%s", "uid": "%s"}', None, "with more than one uid in their JSON"),
        (b'{"a": {"uid": "%s"}, "uid": "%s"}', UIDS[1], None),
        (b'{"uid": "%s", "a": [{"uid": "%s"}]}', UIDS[0], None),
        (b'{"uid": null, "uid": null, "a": "%s%s"}', None, "with more than one uid in their JSON"),
    ],
)
def test_json_with_two_uids(index: Make, record: bytes, uid: str | None, cause: str | None) -> None:
    data = record % tuple(uid.encode() for uid in UIDS)
    built, _ = index(*pair("k"), ("k.json", data))
    assert [format_uid(row) for row in built.uids] == ([] if uid is None else [uid])
    assert list(built.faults.counts) == ([] if cause is None else [cause])


WRITTEN = st.lists(
    st.tuples(st.sampled_from(["a", "b", "a.1", "a.2", "b.1"]), st.integers(0, 1)), max_size=12
)


@pytest.mark.parametrize("key_split", ["first_dot", "last_dot"])
@given(written=WRITTEN)
def test_no_pair_is_lost_without_a_word(
    key_split: KeySplit,
    written: list[tuple[str, int]],
    tmp_path_factory: pytest.TempPathFactory,
    write_tar: Make,
) -> None:
    """Each pair is a sample, a fault, a repeat, or pointed out; and no pair is a mixture."""
    members = [(name, b"%s %d" % (key.encode(), n)) for key, n in written for name in pair(key)]
    path = write_tar(tmp_path_factory.mktemp("pool") / "s.tar", members)
    with LocalTar(path) as tar:
        built = build_shard_index(tar, path.name, key_split) if members else None
    if built is None:
        return
    counted = len(built) + built.repeated + built.faults.samples + built.hidden.samples
    assert counted == len(written)
    assert all(image == text for image, text in contents(built, path))
    if key_split == "last_dot":
        assert built.hidden.samples == 0
        assert len(built) == len({key for key, _ in written})


# ---- what reads the tars of such a pool again --------------------------------------------------


def test_copy_and_image_sizes_of_a_pool_split_at_the_last_dot(
    tmp_path: Path, make_samples: Make, write_tar: Make, load_pool: Make
) -> None:
    samples = make_samples(6)
    for number, sample in enumerate(samples):
        sample.key = f"movie.{number // 2}" if number % 2 else f"movie{number}"
        sample.record = sample.record.replace(b"40}", b'40, "height": %d}' % number)
    root = tmp_path / "pool"
    write_tar(root / "s.tar", [member for sample in samples for member in sample.members()])
    pool = open_pool(
        LocalStorage(str(root)),
        cache_dir=tmp_path / "cache",
        max_bad_fraction=0,
        key_split="last_dot",
        progress=False,
    )
    assert [key.decode() for key in pool.keys] == [sample.key for sample in samples]
    assert read_image_sizes(pool, progress=False).tolist() == [[40, n] for n in range(6)]
    ones = np.ones(6, dtype=np.int64)
    compact_pool(
        pool,
        make_selection(pool.uids, ones, {}),
        tmp_path / "copy",
        shard_samples=10,
        max_bad_fraction=0,
        progress=False,
    )
    copy = load_pool(tmp_path / "copy")  # by webdataset's rule
    raw = dict(SampleReader(pool=copy, max_image_pixels=10_000).read(np.arange(6)))
    assert np.array_equal(copy.uids, pool.uids)
    assert [raw[n] for n in range(6)] == [RawSample(s.image, s.caption) for s in samples]


def test_copy_of_the_first_of_one_name_has_no_others(
    tmp_path: Path, make_samples: Make, write_tar: Make, load_pool: Make
) -> None:
    first, second, third = make_samples(3)
    second.key = first.key
    members = [member for sample in (first, second, third) for member in sample.members()]
    write_tar(tmp_path / "pool" / "s.tar", members)
    pool = load_pool(tmp_path / "pool", max_bad_fraction=0.5)
    assert len(pool) == 2
    compact_pool(
        pool,
        make_selection(pool.uids, np.ones(2, dtype=np.int64), {}),
        tmp_path / "copy",
        shard_samples=10,
        max_bad_fraction=0,
        progress=False,
    )
    copy = load_pool(tmp_path / "copy")
    assert np.array_equal(copy.uids, pool.uids)
