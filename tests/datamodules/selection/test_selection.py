"""Selections: files, identity, multiplicities, and the pool's rows."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.datamodules.index.uids import format_uid, parse_uids
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.columns import read_column
from siftclip.datamodules.selection.selection import (
    Selection,
    expand_rows,
    make_selection,
    read_selection,
    read_subset,
    row_weights,
    write_selection,
)
from siftclip.errors import InputError

Make = Callable[..., Any]
HALF = st.sampled_from([0, 1, 2**63, 2**64 - 1])
COUNTS = st.dictionaries(st.tuples(HALF, HALF), st.integers(0, 3), min_size=1)


def select(counts: dict[tuple[int, int], int], **manifest: Any) -> Selection:
    uids = np.array(list(counts), dtype=np.uint64).reshape(-1, 2)
    return make_selection(uids, np.array(list(counts.values()), dtype=np.int64), manifest)


@given(COUNTS.filter(lambda counts: any(counts.values())))
def test_subset_is_sorted_and_repeats(counts: dict[tuple[int, int], int]) -> None:
    selection = select(counts)
    repeated = [pair for pair, count in counts.items() for _ in range(count)]
    expected = np.array(repeated, dtype=np.dtype("u8,u8"))
    expected.sort()  # DataComp's own lines
    assert np.array_equal(selection.to_subset(), expected)
    assert selection.to_subset().dtype == expected.dtype
    assert len(selection) == len(repeated)


def test_round_trip_and_layout_on_disk(tmp_path: Path) -> None:
    selection = select({(2, 1): 1, (1, 9): 3, (1, 2): 1, (5, 5): 0}, selector="x", k=[1, None])
    folder = tmp_path / "deep" / "selection"
    write_selection(selection, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["selection.json", "selection.npy"]
    again = read_selection(folder)
    assert np.array_equal(again.uids, [[1, 2], [1, 9], [2, 1]])
    assert again.multiplicities.tolist() == [1, 3, 1]
    assert again.manifest == {"selector": "x", "k": [1, None]}
    assert again.digest == selection.digest


def test_subset_of_datacomp_reads_as_multiplicities(tmp_path: Path) -> None:
    path = tmp_path / "subset.npy"
    rows = [(1, 2), (1, 2), (3, 4), (2**64 - 1, 0), (2**64 - 1, 0), (2**64 - 1, 0)]
    np.save(path, np.array(rows, dtype=np.dtype("u8,u8")))
    uids, counts = read_subset(path)
    assert uids.dtype == np.uint64
    assert uids.tolist() == [[1, 2], [3, 4], [2**64 - 1, 0]]
    assert counts.dtype == np.int64
    assert counts.tolist() == [2, 1, 3]


def test_digest_is_that_of_the_files_content_and_stays() -> None:
    first = select({(1, 2): 1, (3, 4): 2})
    assert first.digest == select({(3, 4): 2, (1, 2): 1, (9, 9): 0}, other="manifest").digest
    assert first.digest != select({(1, 2): 2, (3, 4): 1}).digest
    assert first.digest != select({(1, 2): 1, (3, 4): 1}).digest
    # sha256 of 1 2 3 4 3 4 as little-endian u8; a change would orphan every stored selection
    known = "81bc32779afb24c632231054d922d5629b290cbe4bc44b0cfff9766068c2d7b4"
    assert first.digest == known


def test_selection_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"keeps none of 2 samples. Raise the selector's fraction"):
        select({(1, 2): 0, (3, 4): 0})
    with pytest.raises(
        InputError, match=r"none of 2 samples: each of them has no score \(NaN\) or"
    ):
        make_selection(
            np.arange(4, dtype=np.uint64).reshape(2, 2),
            np.zeros(2, dtype=np.int64),
            {},
            scores=np.array([-np.inf, np.nan]),
        )


@pytest.mark.parametrize("change", ["drop", "repeat", "other"])
def test_tampered_subset_is_refused(tmp_path: Path, change: str) -> None:
    write_selection(select({(1, 2): 1, (3, 4): 2}), tmp_path)
    subset = np.load(tmp_path / "selection.npy")
    if change == "drop":
        subset = subset[:-1]
    elif change == "repeat":
        subset = np.sort(np.append(subset, subset[:1]))
    else:
        subset["f1"][0] ^= 1
    np.save(tmp_path / "selection.npy", subset)
    with pytest.raises(
        InputError, match=r"selection.npy is not the subset that selection.json des"
    ):
        read_selection(tmp_path)


def test_a_manifest_is_an_object(tmp_path: Path) -> None:
    write_selection(select({(1, 2): 1}), tmp_path)
    (tmp_path / "selection.json").write_text("[]")
    with pytest.raises(InputError, match=r"selection\.json must be a JSON object\. Got \[\]"):
        read_selection(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"selection.json does not exist"):
        read_selection(tmp_path)
    write_selection(select({(1, 2): 1}), tmp_path)
    (tmp_path / "selection.npy").unlink()
    with pytest.raises(InputError, match=r"selection.npy does not exist"):
        read_selection(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, dtype=np.uint64),
        np.zeros((3, 2), dtype=np.uint64),
        np.zeros(3, dtype="u8,u8,u8"),
        np.zeros((3, 1), dtype="u8,u8"),
        np.zeros(3, dtype="i8,i8"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_other_arrays_are_no_subset(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=r"must be a DataComp subset.*It has dtype .* and shape"):
        read_subset(tmp_path / "a.npy")


class Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_files_that_are_no_npy(tmp_path: Path) -> None:
    path, proof = tmp_path / "a.npy", tmp_path / "proof"
    np.save(path, np.zeros(9, dtype="u8,u8"))
    whole = path.read_bytes()
    for content in (
        b"",
        b"text",
        whole[:50],
        whole[:-1],
        b"PK\x03\x04damaged",
        pickle.dumps(Intruder(proof)),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a.npy is not a readable npy file"):
            read_subset(path)
    np.save(path, np.array([Intruder(proof)], dtype=object))
    with pytest.raises(InputError, match=r"a.npy is not a readable npy file"):
        read_subset(path)
    assert not proof.exists()
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))
    with pytest.raises(InputError, match="It is an npz file"):
        read_subset(path)


def test_rows_of_a_selection(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]
) -> None:
    samples = make_samples(8)
    pool = load_pool(write_pool(samples[:6]))  # two of the selected uids are absent
    wanted = parse_uids([samples[i].uid for i in (5, 1, 7, 3, 6)])
    selection = make_selection(wanted, np.array([1, 3, 2, 1, 1]), {})
    rows, coverage = expand_rows(selection, pool)
    assert rows.dtype == np.int64
    assert rows.tolist() == [1, 1, 1, 3, 5]
    assert (coverage.named, coverage.present) == (8, 5)
    assert {format_uid(pool.uids[row]) for row in rows} == {samples[i].uid for i in (1, 3, 5)}


def test_selection_of_another_pool_is_refused(
    make_samples: Make, write_pool: Make, load_pool: Callable[..., Pool]
) -> None:
    pool = load_pool(write_pool(make_samples(4)))
    other = parse_uids([sample.uid for sample in make_samples(3, start=50)])
    selection = make_selection(other, np.ones(3, np.int64), {})
    with pytest.raises(InputError, match=r"None of the 3 selected uids is in the pool .*pool\."):
        expand_rows(selection, pool)


def weighed(weights: list[float] | None) -> Selection:
    uids = np.array([[2, 1], [1, 9], [1, 2], [5, 5]], dtype=np.uint64)
    counts = np.array([1, 3, 1, 0])
    given = None if weights is None else np.float32(weights)
    return make_selection(uids, counts, {"selector": "x"}, weights=given)


def test_weights_lie_beside_the_subset_and_belong_to_its_identity(tmp_path: Path) -> None:
    plain, selection = weighed(None), weighed([0.5, 2.0, 1.0, 7.0])
    assert selection.weights is not None
    assert selection.weights.tolist() == [1.0, 2.0, 0.5]  # by uid, of what is kept
    digests = {plain.digest, selection.digest, weighed([0.5, 2.0, 1.5, 7.0]).digest}
    assert len(digests) == 3
    assert weighed([0.5, 2.0, 1.0, 9.0]).digest == selection.digest
    write_selection(selection, tmp_path)
    assert np.array_equal(np.load(tmp_path / "selection.npy"), plain.to_subset())
    table = np.load(tmp_path / "weights.npy")
    assert table.dtype.names == ("f0", "f1", "weight")
    again = read_selection(tmp_path)
    assert again.weights is not None
    assert again.weights.dtype == np.float32
    assert np.array_equal(again.weights, selection.weights)
    assert again.digest == selection.digest
    write_selection(plain, tmp_path)  # another one in its place
    assert read_selection(tmp_path).weights is None


def test_lost_changed_or_foreign_weights_are_named(tmp_path: Path) -> None:
    write_selection(weighed([0.5, 2.0, 1.0, 7.0]), tmp_path)
    path = tmp_path / "weights.npy"
    table = np.load(path)
    path.unlink()
    with pytest.raises(InputError, match=r"is not the subset that selection\.json describes"):
        read_selection(tmp_path)
    changed = table.copy()
    changed["weight"][0] = 3
    np.save(path, changed)
    with pytest.raises(InputError, match="is not the subset"):
        read_selection(tmp_path)
    np.save(path, table[::-1])
    with pytest.raises(InputError, match="is about other samples than"):
        read_selection(tmp_path)
    np.save(path, np.ones(3, np.float32))
    with pytest.raises(InputError, match="is not a readable file of weights"):
        read_selection(tmp_path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="is not a readable file of weights"):
        read_selection(tmp_path)


def test_weights_by_row_are_read_as_weights_of_the_loss(
    load_pool: Callable[..., Pool],
    write_pool: Make,
    make_samples: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = load_pool(write_pool(make_samples(6)))
    weights = np.float32([1, 2, 3, 4, 5, 6])
    kept = np.array([1, 0, 2, 1, 0, 1])
    selection = make_selection(pool.uids, kept, {}, weights=weights)
    found = row_weights(selection, pool)
    assert found is not None
    assert found.tolist() == [1, 1, 3, 4, 1, 6]
    assert row_weights(make_selection(pool.uids, kept, {}), pool) is None
    write_selection(selection, tmp_path)
    assert read_column(pool, tmp_path / "selection.npy", None).tolist()[2] == 2
    assert "holds no weights; weights.npy, beside it, has those of its samples" in caplog.text
    column = read_column(pool, tmp_path / "weights.npy", "weight")
    assert np.array_equal(column, [1, np.nan, 3, 4, np.nan, 6], equal_nan=True)
