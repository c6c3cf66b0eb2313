"""Lists of tars: what webdataset reads from them is what is selected."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from webdataset.shardlists import expand_urls

from siftclip.datamodules.index.uids import format_uids, sort_uids
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.selection.shard_lists import list_of_tars, listed_tars, samples_of_tars
from siftclip.datamodules.selection.subset_files import read_subset_file, write_subset_file
from siftclip.errors import InputError, ParameterError

Make = Callable[..., Any]
TARS = 12


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]) -> Pool:
    """Thirty samples in twelve tars of two or three."""
    return load_pool(write_pool(make_samples(30), shards=TARS))


def of_tars(pool: Pool, counts: dict[int, int]) -> CountedUids:
    """All samples of some tars, sample by sample."""
    kept = [(row, counts.get(int(pool.shard_of_row[row]), 0)) for row in range(len(pool))]
    rows = np.array([row for row, count in kept if count])
    multiplicities = np.array([count for _, count in kept if count])
    order = sort_uids(pool.uids[rows])
    return CountedUids(pool.uids[rows][order], multiplicities[order])


def keys_of_webdataset(path: Path) -> Counter[str]:
    """The uids of what webdataset reads from a list."""
    urls = [url for line in path.read_text().splitlines() for url in expand_urls(line)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        return Counter(json.loads(sample["json"])["uid"] for sample in dataset)


COUNTS = [
    dict.fromkeys(range(TARS), 1),
    {0: 1, 1: 1, 2: 1, 5: 1, 8: 1, 9: 1, 10: 1, 11: 1},
    {3: 1, 4: 2, 5: 2, 6: 1, 7: 3},
]


@pytest.mark.parametrize("counts", COUNTS, ids=["all", "gaps", "copies"])
def test_webdataset_reads_what_is_selected(
    counts: dict[int, int], pool: Pool, tmp_path: Path
) -> None:
    subset = of_tars(pool, counts)
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    write_subset_file(paths[0], "shards", subset, pool=pool)
    uids = format_uids(subset.uids).tolist()
    assert keys_of_webdataset(paths[0]) == Counter(
        dict(zip(uids, subset.multiplicities.tolist(), strict=True))
    )
    file = read_subset_file(paths[0], pool=pool)
    assert file.format == "shards"
    assert all(np.array_equal(x, y) for x, y in zip(file.counted, subset, strict=True))
    write_subset_file(paths[1], "shards", file.counted, pool=pool)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_following_numbers_have_braces(pool: Pool, tmp_path: Path) -> None:
    write_subset_file(tmp_path / "a", "shards", of_tars(pool, COUNTS[1]), pool=pool)
    place = f"{pool.root}/shards/"
    assert (tmp_path / "a").read_text().splitlines() == [
        f"{place}{{00000000..00000002}}.tar",
        f"{place}00000005.tar",
        f"{place}{{00000008..00000011}}.tar",
    ]


@pytest.mark.parametrize(
    "paths",
    [
        ["/p{1}/008.tar", "/p{1}/009.tar"],
        ["/p,q/8.tar", "/p,q/9.tar", "/p,q/10.tar"],
        ["/a\\b/x.tar", "/2/99.tar", "/2/100.tar", "/2/1.5.tar"],
        [f"/data/{number:03d}-{number % 3}.tar" for number in range(20)],
    ],
)
def test_lists_expand_as_webdataset_does(paths: list[str]) -> None:
    lines = list_of_tars(dict.fromkeys(paths, 1))
    assert [url for line in lines for url in expand_urls(line)] == paths


@pytest.mark.parametrize("path", ["/a::b/1.tar", "/a\nb/1.tar", "/a/1.tar "])
def test_paths_that_a_list_would_part_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="cannot stand in a list"):
        list_of_tars({path: 1})


@pytest.mark.parametrize(
    ("text", "tars"),
    [
        ("/x/{000..002}.tar\n", ["000.tar", "001.tar", "002.tar"]),
        ("a.tar::b.tar\n\nhttps://u:p@h/c.tar?sig=1\n", ["a.tar", "b.tar", "c.tar"]),
        ("pipe:aws s3 cp s3://bucket/{7..8}.tar - || true", ["7.tar", "8.tar"]),
        ("{a,b}/{1..2}.tar", ["1.tar", "2.tar", "1.tar", "2.tar"]),
        ("\ufeffx/9.tar\r\n", ["9.tar"]),
    ],
)
def test_lists_of_others_are_read(text: str, tars: list[str], tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text, newline="")
    assert listed_tars(tmp_path / "list") == Counter(tars)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "names no tars"),
        ("x.zip\n", "line 1, must name a tar"),
        ("a.tar\n{1..3.tar\n", "line 2, has braces that do not close"),
        ("{1..999999999999}.tar", "stands for more than 1,000,000 tars"),
        ("{0..9999}{0..9999}{0..9999}.tar", "stands for more than"),
        ("{" + ",".join("ab" * 600_000) + "}.tar", "stands for more than"),
        ("{0..999999}.tar\n" * 2, "names more than 1,000,000 tars"),
        ("\x1b[2J.zip\n", r"x1b\[2J"),
    ],
    ids=["blank", "zip", "open", "huge", "product", "commas", "sum", "escape"],
)
def test_bad_lists_are_refused_in_bounded_time(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(InputError, match=message):
        listed_tars(tmp_path / "list")


def test_tars_of_another_pool_are_named(pool: Pool) -> None:
    with pytest.raises(InputError, match=r"1 of 2 tars of the list are not in the pool.*z\.tar"):
        samples_of_tars(pool, Counter(["00000000.tar", "z.tar"]))


def test_a_list_needs_its_pool(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("a.tar\n")
    with pytest.raises(ParameterError, match="pool must be given to read"):
        read_subset_file(tmp_path / "list")


def test_parts_of_tars_are_no_list(pool: Pool, tmp_path: Path) -> None:
    whole = of_tars(pool, {0: 1, 1: 1})
    path = tmp_path / "list"
    missing_one = CountedUids(whole.uids[:-1], whole.multiplicities[:-1])
    with pytest.raises(InputError, match=r"of 1 of 12 tars: of 0000000[01]\.tar it has \d of 3 .*"):
        write_subset_file(path, "shards", missing_one, pool=pool)
    unequal = whole.multiplicities.copy()
    unequal[0] += 1
    with pytest.raises(InputError, match=r"repeats some samples of .* siftclip data compact"):
        write_subset_file(path, "shards", CountedUids(whole.uids, unequal), pool=pool)
    strange = CountedUids(np.array([[1, 2]], dtype=np.uint64), np.array([1]))
    with pytest.raises(InputError, match="1 of 1 selected uids are not in the pool"):
        write_subset_file(path, "shards", strange, pool=pool)
    assert not path.exists()


def test_samples_that_the_pool_leaves_out_are_told(
    make_samples: Make,
    write_pool: Make,
    load_pool: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = make_samples(6)
    samples[1].caption = None
    pool = load_pool(write_pool(samples, shards=2), max_bad_fraction=0.5)
    write_subset_file(tmp_path / "list", "shards", of_tars(pool, {0: 1}), pool=pool)
    assert "hold 1 more samples, which the pool leaves out" in caplog.text


def test_a_tar_without_samples_is_in_no_list(
    make_samples: Make, write_pool: Make, load_pool: Make, write_tar: Make, tmp_path: Path
) -> None:
    root = write_pool(make_samples(4), shards=2)
    write_tar(root / "shards" / "00000000a.tar", [("readme.md", b"x")])
    pool = load_pool(root, max_bad_fraction=0.5)
    write_subset_file(tmp_path / "list", "shards", of_tars(pool, {0: 1, 2: 1}), pool=pool)
    assert listed_tars(tmp_path / "list") == Counter(["00000000.tar", "00000001.tar"])
    with pytest.raises(InputError, match="hold no sample"):
        samples_of_tars(pool, Counter(["00000000a.tar"]))
