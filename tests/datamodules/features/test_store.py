"""Features on disk, joined with a pool by uid."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.features.store import FeatureStore, open_features
from siftclip.datamodules.index.uids import format_uid, parse_uids
from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import InputError
from siftclip.files import write_npz

Make = Callable[..., Any]
KEYS = ("l14_img", "l14_txt")


@pytest.fixture
def pool(make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]) -> Pool:
    return load_pool(write_pool(make_samples(12)))


def open_store(pool: Pool, **options: Any) -> FeatureStore:
    return open_features(pool, **{"folder": None, "keys": KEYS, "max_bad_fraction": 0.0, **options})


def read_all(
    store: FeatureStore, pool: Pool, key: str, chunk_samples: int
) -> dict[str, np.ndarray]:
    """Features by uid; a uid that comes twice is an error."""
    found: dict[str, np.ndarray] = {}
    features = RowFeatures.build(store, KEYS, len(pool))
    for part in store.parts:
        for start in range(0, len(part.rows), chunk_samples):
            rows = part.rows[start : start + chunk_samples]
            for row, values in zip(rows, features.gather(rows)[key].numpy(), strict=True):
                uid = format_uid(pool.uids[row])
                assert uid not in found
                found[uid] = values
    return found


@pytest.mark.parametrize("chunk_samples", [1, 5, 1000])
def test_shuffled_metadata_is_joined_by_uid(
    pool: Pool, make_samples: Make, write_metadata: Make, chunk_samples: int
) -> None:
    uids = [sample.uid for sample in make_samples(20)]  # more than the shards hold
    truth = write_metadata(Path(pool.root) / "metadata", uids[2:], parts=3)
    store = open_store(pool)
    assert (store.pool_coverage.present, store.pool_coverage.named) == (10, 12)
    assert (store.metadata_coverage.present, store.metadata_coverage.named) == (10, 18)
    for key in KEYS:
        found = read_all(store, pool, key, chunk_samples)
        assert set(found) == set(uids[2:12])
        for uid, values in found.items():
            assert values.dtype == np.float16
            assert np.array_equal(values, truth[key][uid])


def test_first_of_repeated_rows_counts(pool: Pool, tmp_path: Path) -> None:
    """Within one part, and from one part to the next."""
    uids = pool.uids
    first = np.arange(5, dtype=np.float16)[:, None]
    write_npz(tmp_path / "a.npz", uids=uids[[3, 1, 3, 3, 0]], l14_img=first, l14_txt=first)
    second = first + 10
    write_npz(tmp_path / "b.npz", uids=uids[[2, 3, 2, 1, 4]], l14_img=second, l14_txt=second)
    store = open_store(pool, folder=tmp_path)
    found = read_all(store, pool, "l14_img", 100)
    assert {uid: value.item() for uid, value in found.items()} == {
        format_uid(uids[3]): 0,
        format_uid(uids[1]): 1,
        format_uid(uids[0]): 4,
        format_uid(uids[2]): 10,
        format_uid(uids[4]): 14,
    }
    assert store.pool_coverage.present == 5
    assert [part.rows.tolist() for part in store.parts] == [[3, 1, 0], [2, 4]]


def test_own_features_carry_their_uids(pool: Pool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((12, 4)).astype(np.float16)
    write_npz(tmp_path / "0.npz", uids=pool.uids, l14_img=values, l14_txt=values)
    store = open_store(pool, folder=tmp_path)
    assert store.pool_coverage.fraction == 1.0
    found = RowFeatures.build(store, ("l14_txt",), len(pool)).gather(np.arange(12))
    assert np.array_equal(found["l14_txt"].numpy(), values)


def test_fingerprint_changes_with_the_files(
    pool: Pool, write_metadata: Make, tmp_path: Path
) -> None:
    uids = [format_uid(uid) for uid in pool.uids]
    write_metadata(tmp_path / "f", uids)
    first = open_store(pool, folder=tmp_path / "f").fingerprint
    assert open_store(pool, folder=tmp_path / "f").fingerprint == first
    found = {first}
    for path in (tmp_path / "f").iterdir():  # npz and parquet, all matter
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        found.add(open_store(pool, folder=tmp_path / "f").fingerprint)
    assert len(found) == 5


def test_no_features(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No features \(\*.npz\) in .*shards. Make them with"):
        open_store(pool)
    with pytest.raises(InputError, match=r"No features \(\*.npz\) in .*nowhere"):
        open_store(pool, folder=tmp_path / "nowhere")


def test_features_of_another_pool(pool: Pool, make_samples: Make, write_metadata: Make) -> None:
    uids = [sample.uid for sample in make_samples(5, start=100)]
    write_metadata(Path(pool.root) / "metadata", uids)
    with pytest.raises(InputError, match=r"No sample of the pool .* is among the 5 rows"):
        open_store(pool)


def test_missing_key_lists_those_there(pool: Pool, write_metadata: Make) -> None:
    uids = [format_uid(uid) for uid in pool.uids]
    write_metadata(Path(pool.root) / "metadata", uids, keys=("b32_img",))
    with pytest.raises(InputError, match=r"lacks the array 'l14_img'.*holds \['b32_img'\]"):
        open_store(pool)


def change_npz(folder: Path, key: str, array: np.ndarray) -> Path:
    path = sorted(folder.glob("*.npz"))[0]
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **{**arrays, key: array})
    return path


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 8), np.float16), r"one row for each of the 6 uids in \w+\.parquet.*\(5, 8\)"),
        (np.zeros((7, 8), np.float16), r"one row for each of the 6 uids in \w+\.parquet.*\(7, 8\)"),
        (np.zeros(6, np.float16), r"one row for each of the 6 uids"),
        (np.zeros((6, 8), np.int64), r"hold floats. Its dtype is int64"),
        (np.full((6, 8), "x"), r"hold floats. Its dtype is <U1"),
    ],
)
def test_arrays_that_do_not_fit(
    pool: Pool, write_metadata: Make, array: np.ndarray, message: str
) -> None:
    write_metadata(Path(pool.root) / "metadata", [format_uid(uid) for uid in pool.uids])
    path = change_npz(Path(pool.root) / "metadata", "l14_txt", array)
    with pytest.raises(InputError, match=f"{path.name}: the array 'l14_txt' must .*{message}"):
        open_store(pool)


class Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_pickled_features_are_refused_and_not_run(
    pool: Pool, write_metadata: Make, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    write_metadata(Path(pool.root) / "metadata", [format_uid(uid) for uid in pool.uids])
    array = np.empty((6, 8), dtype=object)
    array[:] = Intruder(proof)
    path = change_npz(Path(pool.root) / "metadata", "l14_img", array)
    with pytest.raises(InputError, match=r"'l14_img' must hold floats. Its dtype is object"):
        open_store(pool)
    path.write_bytes(pickle.dumps(array))
    with pytest.raises(InputError, match="is not a readable npz file"):
        open_store(pool)
    assert not proof.exists()


@pytest.mark.parametrize("keep", [0, 50, 500])
def test_damaged_npz(pool: Pool, write_metadata: Make, keep: int) -> None:
    write_metadata(Path(pool.root) / "metadata", [format_uid(uid) for uid in pool.uids])
    path = sorted((Path(pool.root) / "metadata").glob("*.npz"))[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=f"{path.name} is not a readable npz file"):
        open_store(pool)


def test_damaged_array_is_noticed_when_it_is_read(pool: Pool, write_metadata: Make) -> None:
    """By its checksum, where it is compressed; the rows of others are read one by one."""
    uids = [format_uid(uid) for uid in pool.uids]
    truth = write_metadata(Path(pool.root) / "metadata", uids, parts=1, dim=2000)
    (path,) = (Path(pool.root) / "metadata").glob("*.npz")
    last_row = list(truth["l14_txt"].values())[-1].tobytes()
    with np.load(path) as arrays:
        np.savez_compressed(path, **dict(arrays))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("l14_txt.npy")
    data[place.header_offset + place.compress_size - len(last_row) // 2] ^= 1
    path.write_bytes(data)
    features = RowFeatures.build(open_store(pool), KEYS, len(pool))
    with pytest.raises(InputError, match=r"is not a readable npz file"):
        features.gather(np.arange(12))


@pytest.mark.parametrize(
    "uids", [np.zeros((3, 2), np.int64), np.zeros(3, np.uint64), np.zeros((3, 3), np.uint64)]
)
def test_own_uids_of_another_kind(pool: Pool, tmp_path: Path, uids: np.ndarray) -> None:
    values = np.zeros((3, 4), np.float16)
    write_npz(tmp_path / "0.npz", uids=uids, l14_img=values, l14_txt=values)
    with pytest.raises(InputError, match=r"the array 'uids' must be uint64 \[n, 2\]. Got"):
        open_store(pool, folder=tmp_path)


def test_own_rows_that_do_not_match(pool: Pool, tmp_path: Path) -> None:
    values = np.zeros((3, 4), np.float16)
    write_npz(tmp_path / "0.npz", uids=pool.uids[:4], l14_img=values, l14_txt=values)
    with pytest.raises(InputError, match=r"one row for each of the 4 uids in it. Its shape"):
        open_store(pool, folder=tmp_path)
    write_npz(tmp_path / "0.npz", l14_img=values, l14_txt=values)
    with pytest.raises(InputError, match=r"must hold the array 'uids'"):
        open_store(pool, folder=tmp_path)


def test_bad_uids_in_parquet_are_bounded(pool: Pool, write_metadata: Make) -> None:
    uids = [format_uid(uid) for uid in pool.uids]
    uids[0] = "0" * 31
    write_metadata(Path(pool.root) / "metadata", uids)
    with pytest.raises(InputError, match=r"features .*: 1 of 12 samples are bad"):
        open_store(pool)
    store = open_store(pool, max_bad_fraction=0.1)
    assert store.pool_coverage.present == 11
    # a row without a valid uid must not stand for the uid 0
    assert (parse_uids(["0" * 32]) == pool.uids).all(axis=1).sum() == 0


def test_row_with_bad_uid_is_not_the_uid_zero(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool], write_metadata: Make
) -> None:
    samples = make_samples(3)
    samples[0].record = b'{"uid": "%s"}' % (b"0" * 32)
    pool = load_pool(write_pool(samples))
    write_metadata(Path(pool.root) / "metadata", ["no uid", samples[1].uid, samples[2].uid])
    store = open_store(pool, max_bad_fraction=0.5)
    assert sorted(row for part in store.parts for row in part.rows) == [1, 2]


def test_features_without_columns(pool: Pool, write_metadata: Make) -> None:
    folder = Path(pool.root) / "metadata"
    write_metadata(folder, [format_uid(uid) for uid in pool.uids])
    change_npz(folder, "l14_img", np.zeros((6, 0), np.float16))
    with pytest.raises(InputError, match=r"the array 'l14_img' has no columns"):
        open_store(pool)


def test_widths_must_agree(pool: Pool, write_metadata: Make) -> None:
    folder = Path(pool.root) / "metadata"
    uids = [format_uid(uid) for uid in pool.uids]
    write_metadata(folder, uids)
    path = change_npz(folder, "l14_img", np.zeros((6, 5), np.float16))
    with pytest.raises(
        InputError, match=r"'l14_txt' has 8 columns, and 'l14_img' of .* has 5"
    ) as e:
        open_store(pool)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("dtype", [">f4", "g"])
def test_floats_that_torch_does_not_know(pool: Pool, write_metadata: Make, dtype: str) -> None:
    folder = Path(pool.root) / "metadata"
    write_metadata(folder, [format_uid(uid) for uid in pool.uids])
    change_npz(folder, "l14_img", np.zeros((6, 8), dtype))
    with pytest.raises(InputError, match=r"'l14_img' must hold floats of 16, 32 or 64 bits"):
        open_store(pool)
