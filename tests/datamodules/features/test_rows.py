"""Features by row are those of the files, mapped or not, and travel with the batches."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.datamodules.features.rows import RowFeatures, map_npz_array
from siftclip.datamodules.features.store import open_features
from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.streaming.batches import SampleDataset
from siftclip.errors import InputError

Make = Callable[..., Any]
KEYS = ("l14_img", "l14_txt")


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: Make) -> Pool:
    return load_pool(write_pool(make_samples(30), shards=3))


def build(pool: Pool) -> RowFeatures:
    store = open_features(pool, folder=None, keys=KEYS, max_bad_fraction=0)
    return RowFeatures.build(store, KEYS, len(pool))


@pytest.mark.parametrize("compressed", [False, True])
def test_any_rows_in_any_order(pool: Pool, write_metadata: Make, compressed: bool) -> None:
    uids = [format_uid(uid) for uid in pool.uids]
    truth = write_metadata(Path(pool.root) / "metadata", uids[:27], parts=4)
    if compressed:
        for path in (Path(pool.root) / "metadata").glob("*.npz"):
            arrays = dict(np.load(path))
            np.savez_compressed(path, **arrays)
    features = pickle.loads(pickle.dumps(build(pool)))  # noqa: S301 - our own bytes
    rows = np.array([5, 0, 5, 28, 26, 13, 29, 1])
    found = features.gather(rows)
    assert set(found) == set(KEYS)
    for key, values in found.items():
        assert values.dtype == torch.float16
        for row, value in zip(rows, values.numpy(), strict=True):
            if row >= 27:
                assert np.isnan(value).all()
            else:
                assert np.array_equal(value, truth[key][uids[row]])
    nothing = features.gather(np.array([28, 29]))
    assert nothing["l14_img"].shape == (2, 8)
    assert nothing["l14_img"].isnan().all()


def test_uncompressed_arrays_are_mapped(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((100, 16)).astype(np.float16)
    np.savez(
        tmp_path / "a.npz", first=np.zeros(3), values=values, fortran=np.asfortranarray(values)
    )
    for key in ("values", "fortran"):
        mapped = map_npz_array(tmp_path / "a.npz", key)
        assert np.array_equal(mapped, values)
        base: Any = mapped
        while not isinstance(base, np.memmap):
            base = base.base
            assert base is not None, "read into memory"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, values=np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"a.npz must hold the array 'other'"):
        map_npz_array(path, "other")
    np.savez(path, values=np.array([{}, {}], dtype=object))
    with pytest.raises(InputError, match=r"a.npz is not a readable npz file: object arrays"):
        map_npz_array(path, "values")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"a.npz is not a readable npz file"):
        map_npz_array(path, "values")


def test_batches_carry_the_features_of_the_rows_they_hold(
    make_samples: Make,
    write_pool: Make,
    load_pool: Make,
    write_metadata: Make,
    make_dataset: Callable[..., SampleDataset],
) -> None:
    samples = make_samples(12)
    samples[4].image = b"no image"
    pool = load_pool(write_pool(samples))
    truth = write_metadata(Path(pool.root) / "metadata", [sample.uid for sample in samples])
    dataset = make_dataset(pool)
    dataset.references = [build(pool)]
    batch = dataset.__getitems__([(0, 3), (1, 4), (2, 5)])
    rows = batch.rows.tolist()
    assert rows[1] != 4  # replaced, and the features are the substitute's
    for key in KEYS:
        expected = np.stack([truth[key][samples[row].uid] for row in rows])
        assert np.array_equal(batch.references[key].numpy(), expected)
    assert batch.to("meta").references["l14_img"].device.type == "meta"
