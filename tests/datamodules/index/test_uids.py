"""Uids: text, two uint64 columns, DataComp's structured array, and the look-up."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.datamodules.index.uids import (
    UidTable,
    derive_uid,
    distinct_uids,
    format_uid,
    from_structured,
    parse_uids,
    sort_uids,
    to_structured,
)
from siftclip.uid_texts import plain_uid

TEXT = st.text("0123456789abcdef", min_size=32, max_size=32)
# few distinct halves, so that equal high halves and repeated uids occur; 2**64 - 1 has all bits set
HALF = st.sampled_from([0, 1, 2, 2**63, 2**64 - 1])
PAIRS = st.lists(st.tuples(HALF, HALF), max_size=20)


def as_uids(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


@given(st.lists(TEXT, max_size=10))
def test_parse_and_format_are_inverse(texts: list[str]) -> None:
    uids = parse_uids(texts)
    assert uids.dtype == np.uint64
    assert uids.shape == (len(texts), 2)
    assert [format_uid(uid) for uid in uids] == texts


@given(TEXT)
def test_parse_splits_as_datacomp_does(text: str) -> None:
    (uid,) = parse_uids([text.upper()])
    assert uid.tolist() == [int(text[:16], 16), int(text[16:32], 16)]


@given(PAIRS)
def test_structured_array_is_datacomps(pairs: list[tuple[int, int]]) -> None:
    array = to_structured(as_uids(pairs))
    expected = np.array(pairs, dtype=np.dtype("u8,u8"))  # DataComp's own line
    assert array.dtype == expected.dtype
    assert array.tobytes() == expected.tobytes()
    assert np.array_equal(from_structured(array), as_uids(pairs))


@given(PAIRS)
def test_sorting_is_that_of_numbers(pairs: list[tuple[int, int]]) -> None:
    uids = as_uids(pairs)
    assert [tuple(uid.tolist()) for uid in uids[sort_uids(uids)]] == sorted(pairs)
    assert np.array_equal(np.sort(to_structured(uids)), to_structured(uids[sort_uids(uids)]))


@given(PAIRS)
def test_sorting_is_stable(pairs: list[tuple[int, int]]) -> None:
    uids = as_uids(pairs)
    assert np.array_equal(sort_uids(uids), np.lexsort((uids[:, 1], uids[:, 0])))


@given(PAIRS)
def test_distinct_uids_are_counted(pairs: list[tuple[int, int]]) -> None:
    uids, counts = distinct_uids(as_uids(pairs))
    counter = dict(sorted(Counter(pairs).items()))
    assert (uids.dtype, counts.dtype) == (np.uint64, np.int64)
    assert [tuple(uid) for uid in uids.tolist()] == list(counter)
    assert counts.tolist() == list(counter.values())


def test_a_million_uids_with_one_high_half_are_found() -> None:
    """Numbers as uids, which a pool may have: a loop over them would take minutes."""
    numbers = np.random.default_rng(0).permutation(2**20).astype(np.uint64)
    table = UidTable.build(np.stack([np.zeros_like(numbers), numbers], axis=1))
    asked = np.array([[0, 5], [0, 2**20], [1, 5]], dtype=np.uint64)
    rows = table.find(np.concatenate([table.sorted_uids, asked]))
    assert np.array_equal(numbers[rows[:-3]], np.arange(2**20))
    assert numbers[rows[-3]] == 5
    assert rows[-2:].tolist() == [-1, -1]


@given(PAIRS, PAIRS)
def test_find_equals_a_dictionary(
    pairs: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    first: dict[tuple[int, int], int] = {}
    for row, pair in enumerate(pairs):
        first.setdefault(pair, row)
    table = UidTable.build(as_uids(pairs))
    assert table.duplicates() == len(pairs) - len(first)
    found = table.find(as_uids(wanted + pairs))
    assert found.dtype == np.int64
    assert found.tolist() == [first.get(pair, -1) for pair in wanted + pairs]


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("0" * 32, True),
        ("0123456789abcdefABCDEF0123456789", True),
        ("0" * 31, False),
        ("0" * 33, False),
        ("g" + "0" * 31, False),
        (" " + "0" * 31, False),
        ("0x" + "0" * 30, False),
        ("٣" * 32, False),  # digits to int(), but not hexadecimal ones
        ("", False),
        (None, False),
        (0, False),
        (b"0" * 32, False),
        ("00000000-0000-4000-8000-00000000000A", True),
        ("00000000-0000-4000-8000-0000000000", False),
        ("0000-00000000-4000-8000-00000000000A", False),
    ],
)
def test_uid_is_32_hexadecimal_digits(text: object, valid: bool) -> None:
    assert (plain_uid(text) is not None) is valid


def test_derived_uid_is_md5_of_tar_and_key() -> None:
    expected = hashlib.md5(b"00000003.tar/000030007").hexdigest()
    assert derive_uid("00000003.tar", "000030007") == expected
    assert plain_uid(expected) == expected
    assert derive_uid("00000004.tar", "000030007") != expected
