"""Bad pools and what is said about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftclip.datamodules.pool.metadata import read_metadata_uids
from siftclip.datamodules.pool.pool import Pool, make_storage, metadata_coverage
from siftclip.errors import InputError

Make = Callable[..., Any]
Load = Callable[..., Pool]


def cut(path: Path, fraction: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])


def test_missing_folder(tmp_path: Path, load_pool: Load) -> None:
    with pytest.raises(
        InputError, match=r"root must be an existing folder or a URL. Got '.*nowhere'"
    ):
        load_pool(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"root must be an existing folder or a URL. Got '.*file'"):
        load_pool(tmp_path / "file")


def test_folder_without_tars(tmp_path: Path, load_pool: Load) -> None:
    (tmp_path / "shards").mkdir()
    with pytest.raises(InputError, match=r"must hold webdataset tars \(\*.tar\)"):
        load_pool(tmp_path)


@pytest.mark.parametrize(
    ("root", "options", "message"),
    [
        ("/data", {"anon": True}, r"options is for pools behind a URL"),
        (
            "nope://a/b",
            {},
            r"root cannot be read by fsspec: Protocol not known: nope. Got 'nope://a/b'",
        ),
        ("memory://nothing", {}, r"root must hold webdataset tars .* Got 'memory://nothing'"),
    ],
)
def test_url_that_is_no_pool(
    root: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        make_storage(root, cache_dir=tmp_path, options=options, shard_cache_gb=0).shards()


def test_pool_without_one_sample(write_tar: Make, tmp_path: Path, load_pool: Load) -> None:
    write_tar(tmp_path / "pool" / "0.tar", [])
    with pytest.raises(InputError, match=r"holds 1 tars without one sample"):
        load_pool(tmp_path / "pool")
    write_tar(tmp_path / "pool" / "1.tar", [("README", b"")])
    with pytest.raises(InputError, match=r"holds 2 tars without one sample"):
        load_pool(tmp_path / "pool", max_bad_fraction=1.0)


@pytest.mark.parametrize("content", [b"", b"not a tar" * 500])
def test_file_that_is_no_tar(
    content: bytes, make_samples: Make, write_pool: Make, load_pool: Load
) -> None:
    root = write_pool(make_samples(4))
    (root / "shards" / "00000001.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"2 of 4 samples are bad.* a tar that is .*00000001.tar"):
        load_pool(root)
    assert len(load_pool(root, max_bad_fraction=0.5)) == 2


def test_tar_that_cannot_be_opened(make_samples: Make, write_pool: Make, load_pool: Load) -> None:
    root = write_pool(make_samples(4))
    (root / "shards" / "2.tar").mkdir()
    with pytest.raises(InputError, match=r"2\.tar cannot be read: Is a directory"):
        load_pool(root)
    (root / "shards" / "2.tar").rmdir()
    (root / "shards" / "2.tar").symlink_to("nowhere.tar")
    with pytest.raises(InputError, match=r"2\.tar cannot be read: No such file"):
        load_pool(root)


def test_tar_cut_in_half_is_bounded_on_both_sides(
    make_samples: Make, write_pool: Make, load_pool: Load, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_pool(make_samples(40), shards=4)
    cut(root / "shards" / "00000002.tar")
    pool = load_pool(root, max_bad_fraction=0.5)
    left = len(pool.shard_rows(2))
    assert 3 <= left <= 6  # of the ten
    # what is lost is known from the size of the other shards: with `left` there are 40 again
    assert pool.faults.samples == 10 - left
    assert len(pool) + pool.faults.samples == 40
    assert "left out" in caplog.text
    assert "cut off with the end of their tar" in caplog.text

    fraction = (10 - left) / 40
    load_pool(root, max_bad_fraction=fraction)
    with pytest.raises(InputError) as caught:
        load_pool(root, max_bad_fraction=fraction - 0.01)
    assert f"{10 - left} of 40 samples are bad" in str(caught.value)
    assert "00000002.tar" in str(caught.value)
    assert "more than max_bad_fraction=" in str(caught.value)


def test_cut_that_loses_nothing_but_the_last_sample(
    make_samples: Make, write_pool: Make, load_pool: Load
) -> None:
    root = write_pool(make_samples(10), shards=2)
    tar = root / "shards" / "00000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: data.rindex(b'{"uid"')])
    pool = load_pool(root, max_bad_fraction=0.1)
    assert len(pool) == 9
    assert pool.faults.counts == {"cut off with the end of their tar (at least)": 1}
    assert "lost behind" not in pool.faults.summary()


def test_json_uid_that_is_not_hexadecimal(
    make_samples: Make, write_pool: Make, load_pool: Load
) -> None:
    samples = make_samples(10)
    samples[7].record = b'{"uid": "not-a-uid"}'
    root = write_pool(samples)
    with pytest.raises(
        InputError,
        match=r"1 of 10 samples are bad.*1 with a uid that is not 32 hexadecimal digits "
        r"\(such as 00000001.tar:000000007\)",
    ):
        load_pool(root, max_bad_fraction=0.05)
    pool = load_pool(root, max_bad_fraction=0.1)
    assert len(pool) == 9
    assert samples[7].key not in pool.keys


def test_missing_files_of_samples(make_samples: Make, write_pool: Make, load_pool: Load) -> None:
    samples = make_samples(10)
    samples[1].image = None
    samples[2].caption = None
    samples[3].image = samples[3].caption = None
    root = write_pool(samples)
    with pytest.raises(InputError, match=r"2 without image .*1 without caption"):
        load_pool(root)
    assert len(load_pool(root, max_bad_fraction=0.3)) == 7


def test_metadata_with_bad_uids(make_samples: Make, write_pool: Make, write_metadata: Make) -> None:
    uids: list[Any] = [sample.uid for sample in make_samples(4)]
    uids[1], uids[2] = "short", None
    folder = write_pool(make_samples(1)) / "metadata"
    write_metadata(folder, uids, parts=1)
    found, valid, faults = read_metadata_uids(next(folder.glob("*.parquet")))
    assert found.shape == (4, 2)
    assert valid.sum() == 2
    assert faults.counts == {"with a uid that is not 32 hexadecimal digits": 2}
    assert ".parquet, row " in faults.summary()


def test_metadata_that_is_no_parquet(make_samples: Make, write_pool: Make, load_pool: Load) -> None:
    root = write_pool(make_samples(2))
    parquet = root / "metadata" / "a.parquet"
    parquet.parent.mkdir()
    for content in (b"", b"not parquet"):
        parquet.write_bytes(content)
        with pytest.raises(
            InputError, match=r"a.parquet must be a parquet file with a column 'uid"
        ):
            metadata_coverage(load_pool(root))
    pq.write_table(pa.table({"url": ["x"]}), parquet)
    with pytest.raises(InputError, match=r"a.parquet must be a parquet file with a column 'uid"):
        metadata_coverage(load_pool(root))
