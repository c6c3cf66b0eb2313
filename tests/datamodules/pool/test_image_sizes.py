"""Original sizes of images, from the metadata or from the samples' JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftclip.datamodules.pool.image_sizes import read_image_sizes
from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import InputError

Make = Callable[..., Any]


def test_metadata_counts(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]
) -> None:
    samples = make_samples(6)
    pool = load_pool(write_pool(samples, shards=2))
    folder = Path(pool.root) / "metadata"
    folder.mkdir()

    def table(name: str, numbers: list[int], widths: list[int | None]) -> None:
        uids = [samples[i].uid for i in numbers]
        columns = {"uid": uids, "original_width": widths, "original_height": [7] * len(uids)}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")

    table("a", [4, 0, 2], [40, None, 20])
    table("b", [1, 4], [10, 99])  # the first file with a uid counts
    sizes = read_image_sizes(pool, progress=False)
    assert sizes.tolist() == [[-1, 7], [10, 7], [20, 7], [-1, -1], [40, 7], [-1, -1]]
    pq.write_table(pa.table({"uid": [samples[0].uid]}), folder / "c.parquet")
    with pytest.raises(InputError, match=r"c.parquet must have the columns .*original_width"):
        read_image_sizes(pool, progress=False)


def test_json_of_the_samples_counts_without_metadata(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]
) -> None:
    samples = make_samples(6)
    samples[0].record = b'{"original_width": 640, "original_height": 480, "width": 256}'
    samples[1].record = b'{"width": 300, "height": 200}'
    samples[2].record = b'{"width": "300", "height": 200}'
    samples[3].record = b"{"
    samples[4].record = b"[1]"
    samples[5].record = None
    pool = load_pool(write_pool(samples, shards=2), max_bad_fraction=1.0)
    sizes = read_image_sizes(pool, progress=False)
    by_key = dict(zip([key.decode() for key in pool.keys], sizes.tolist(), strict=True))
    assert by_key[samples[0].key] == [640, 480]
    assert by_key[samples[1].key] == [300, 200]
    others = {key: size for key, size in by_key.items() if size != [-1, -1]}
    assert len(others) == 2
    assert np.array_equal(read_image_sizes(pool, progress=False), sizes)  # kept


def test_numbers_of_json_that_no_image_has(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]
) -> None:
    samples = make_samples(3)
    for sample, width in zip(samples, ("1" + "0" * 30, "true", '"x"'), strict=True):
        sample.record = f'{{"uid": "{sample.uid}", "width": {width}, "height": 5}}'.encode()
    pool = load_pool(write_pool(samples))
    sizes = read_image_sizes(pool, progress=False)
    assert sizes[0].tolist() == [2**31, 5]
    assert sizes[2].tolist() == [-1, -1]
    for damaged in (b"", b"x"):  # a cache is only a cache
        (pool.table_folder / "image_sizes.npy").write_bytes(damaged)
        assert np.array_equal(read_image_sizes(pool, progress=False), sizes)


@pytest.mark.parametrize("widths", [["a", "b"], [1.5, 2.0], [[1], [2]]])
def test_columns_that_are_no_whole_numbers(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], widths: list[Any]
) -> None:
    samples = make_samples(2)
    pool = load_pool(write_pool(samples))
    path = Path(pool.root) / "metadata" / "a.parquet"
    path.parent.mkdir()
    uids = [sample.uid for sample in samples]
    columns = {"uid": uids, "original_width": widths, "original_height": [7.0, None]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(
        InputError, match=r"a\.parquet: the column 'original_width' must hold whole"
    ):
        read_image_sizes(pool, progress=False)
