"""Sample identities: 128 bits, held as two uint64 columns (high, low), DataComp's `u8,u8`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
UID_DTYPE = np.dtype("<u8,<u8")


_NIBBLES = np.full(256, 255, dtype=np.uint8)
for _digit in HEX_DIGITS:
    _NIBBLES[ord(_digit)] = int(_digit, 16)


def parse_uids(texts: Sequence[str]) -> np.ndarray:
    """Convert n valid uids to uint64 [n, 2] (high, low). See `plain_uid`.

    Example:
        >>> from siftclip.datamodules.index.uids import parse_uids
        >>> parse_uids(["0000000000000001000000000000000a"])
        array([[ 1, 10]], dtype=uint64)
    """
    raw = bytes.fromhex("".join(texts))
    return np.frombuffer(raw, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def parse_uid_bytes(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert n texts of 32 bytes: uint64 [n, 2], and a bool [n] of which are uids.

    Args:
        data: uint8 [n, 32]. What is no hexadecimal digit counts as 0.
    """
    nibbles = _NIBBLES[data]
    valid = (nibbles < 16).all(axis=1)
    nibbles &= 15
    raw = (nibbles[:, 0::2] << 4) | nibbles[:, 1::2]
    return raw.view(">u8").astype(np.uint64), valid


def format_uid(uid: np.ndarray) -> str:
    """Format one uid, uint64 [2], as 32 hexadecimal digits.

    Example:
        >>> import numpy as np
        >>> from siftclip.datamodules.index.uids import format_uid
        >>> format_uid(np.array([1, 10], dtype=np.uint64))
        '0000000000000001000000000000000a'
    """
    return f"{int(uid[0]):016x}{int(uid[1]):016x}"


def format_uids(uids: np.ndarray) -> np.ndarray:
    """Format uids, uint64 [n, 2], as 32 hexadecimal digits each: str [n]."""
    return uid_digits(uids).view("S32").reshape(-1).astype("U32")


def uid_digits(uids: np.ndarray) -> np.ndarray:
    """Format uids, uint64 [n, 2], as 32 hexadecimal digits each: uint8 [n, 32], ASCII."""
    digits = np.ascontiguousarray(uids, dtype=">u8").tobytes().hex()
    return np.frombuffer(digits.encode(), dtype=np.uint8).reshape(-1, 32)


def derive_uid(shard_name: str, key: str) -> str:
    """Derive the uid of a sample without one: MD5 of `<tar file name>/<key>`, 32 hex digits.

    It depends on the name of the tar and the key inside it alone, not on where the pool lies.

    Example:
        >>> from siftclip.datamodules.index.uids import derive_uid
        >>> derive_uid("00000.tar", "000000007")
        '54b1cd3edf16e132a4ca56fa108bccc6'
    """
    return hashlib.md5(f"{shard_name}/{key}".encode(), usedforsecurity=False).hexdigest()


def sort_uids(uids: np.ndarray) -> np.ndarray:
    """Return the int64 permutation [n] that sorts uids, uint64 [n, 2], by (high, low); stable."""
    high = np.ascontiguousarray(uids[:, 0])
    order = np.argsort(high, kind="stable")  # of sorted runs, such as two selections, a merge
    tied = np.flatnonzero(_with_equal_neighbour(high[order]))  # rare, but legal
    if len(tied):
        among = order[tied]
        order[tied] = among[np.lexsort((uids[among, 1], uids[among, 0]))]
    return order


def _with_equal_neighbour(values: np.ndarray) -> np.ndarray:
    """Find the values, sorted [n], that the one before or behind equals: bool [n]."""
    equal = values[1:] == values[:-1]
    found = np.zeros(len(values), dtype=bool)
    found[1:] = equal
    found[:-1] |= equal
    return found


def distinct_uids(uids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count uids, uint64 [n, 2]: the distinct ones, [m, 2], ascending, and how often, int64 [m].

    Example:
        >>> import numpy as np
        >>> from siftclip.datamodules.index.uids import distinct_uids
        >>> distinct_uids(np.array([[1, 10], [0, 3], [1, 10]], dtype=np.uint64))
        (array([[ 0,  3],
               [ 1, 10]], dtype=uint64), array([1, 2]))
    """
    ordered = uids[sort_uids(uids)]
    starts = np.flatnonzero(_differs_from_last(ordered))
    return ordered[starts], np.diff(np.append(starts, len(uids)))


def group_uids(uids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the distinct uids among uids, uint64 [n, 2], and which of them each is.

    Returns:
        The distinct ones, uint64 [m, 2], ascending, and of each row which of them it is, int64 [n].
    """
    order = sort_uids(uids)
    ordered = uids[order]
    is_first = _differs_from_last(ordered)
    groups = np.empty(len(uids), dtype=np.int64)
    groups[order] = np.cumsum(is_first) - 1
    return ordered[is_first], groups


def _differs_from_last(uids: np.ndarray) -> np.ndarray:
    """Find the uids, sorted [n, 2], that the one before does not equal: bool [n]."""
    differs = np.ones(len(uids), dtype=bool)
    differs[1:] = (uids[1:] != uids[:-1]).any(axis=1)
    return differs


def to_structured(uids: np.ndarray) -> np.ndarray:
    """View uint64 [n, 2] as DataComp's structured `u8,u8` [n]."""
    return np.ascontiguousarray(uids, dtype="<u8").view(UID_DTYPE).reshape(-1)


def from_structured(array: np.ndarray) -> np.ndarray:
    """Invert `to_structured`."""
    return np.stack([array["f0"], array["f1"]], axis=1).astype(np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class UidTable:
    """Looks up rows by uid. Built once a pool; a look-up is a binary search."""

    sorted_uids: np.ndarray  # uint64 [n, 2], ascending by (high, low)
    rows: np.ndarray  # int64 [n], the row of each sorted uid

    @classmethod
    def build(cls, uids: np.ndarray) -> UidTable:
        """Index uids, uint64 [n, 2]. Of equal uids, the first row is the one found."""
        order = sort_uids(uids)
        return cls(sorted_uids=uids[order], rows=order.astype(np.int64))

    def duplicates(self) -> int:
        """Count the rows that repeat the uid of an earlier row."""
        return int((~_differs_from_last(self.sorted_uids)).sum())

    def find(self, uids: np.ndarray) -> np.ndarray:
        """Find the rows of uids, uint64 [m, 2], as int64 [m]; -1 where a uid is absent."""
        high, low = self.sorted_uids[:, 0], self.sorted_uids[:, 1]
        start = np.searchsorted(high, uids[:, 0], side="left")
        end = np.searchsorted(high, uids[:, 0], side="right")
        matched = np.full(len(uids), -1, dtype=np.int64)
        single = end - start == 1
        hit = np.flatnonzero(single)
        hit = hit[low[start[hit]] == uids[hit, 1]]
        matched[hit] = self.rows[start[hit]]
        several = np.flatnonzero(end - start > 1)  # equal high halves: rare, but legal
        if len(several):
            matched[several] = self._find_among_equal(uids[several])
        return matched

    def _find_among_equal(self, uids: np.ndarray) -> np.ndarray:
        """Find rows as `find`, of uids whose high halves several rows have, by merging."""
        several = _with_equal_neighbour(self.sorted_uids[:, 0])
        places = np.flatnonzero(several & _differs_from_last(self.sorted_uids))
        both = np.concatenate([self.sorted_uids[places], uids])
        order = sort_uids(both)  # of equal ones, that of the table is the first
        is_ours = order < len(places)
        before = np.maximum.accumulate(np.where(is_ours, np.arange(len(order)), -1))
        asked = ~is_ours & (before >= 0)
        ours, theirs = order[before[asked]], order[asked]
        same = (both[ours] == both[theirs]).all(axis=1)
        matched = np.full(len(uids), -1, dtype=np.int64)
        matched[theirs[same] - len(places)] = self.rows[places[ours[same]]]
        return matched
