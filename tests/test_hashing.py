"""The order of uids: that of Python's tuples, whatever halves are equal."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from siftclip.hashing import uid_order

HALVES = st.integers(0, 3) | st.integers(0, 2**64 - 1)


@given(pairs=st.lists(st.tuples(HALVES, HALVES), max_size=40))
def test_the_order_is_that_of_pairs_and_then_of_places(pairs: list[tuple[int, int]]) -> None:
    uids = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    assert uid_order(uids).tolist() == sorted(range(len(pairs)), key=lambda at: pairs[at])
