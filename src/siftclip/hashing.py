"""Random numbers as hashes of uids: pure functions of (seed, uid), whatever the samples' order."""

from __future__ import annotations

import numpy as np

_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix64(values: np.ndarray) -> np.ndarray:
    """Mix each value by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): uint64 [n] -> uint64 [n]."""
    mixed: np.ndarray = values + np.uint64(_INCREMENT)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def split_seeds(start: np.uint64, positions: np.ndarray) -> np.ndarray:
    """Compute numbers at positions of SplitMix64's sequence from `start`: uint64 [n].

    Args:
        start: of the sequence.
        positions: int64 [n].
    """
    return mix64(start + positions.astype(np.uint64) * np.uint64(_INCREMENT))


def seed_state(seed: int) -> np.ndarray:
    """Return what a hash begins with: uint64 [1], from any integer."""
    return mix64(np.asarray([seed % 2**64], dtype=np.uint64))


def uid_hashes(uids: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Hash each uid, uint64 [n, 2] -> uint64 [n], as `state`, uint64 [1], decides."""
    return mix64(mix64(uids[:, 0] ^ state) ^ uids[:, 1])


def uniform_score(uids: np.ndarray, seed: int) -> np.ndarray:
    """Draw a number in [0, 1) for each sample, float32 [n], a pure function of (seed, uid).

    Args:
        uids: uint64 [n, 2].
        seed: any integer of at least 0.
    """
    bits = uid_hashes(uids, seed_state(seed))
    return ((bits >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def uid_order(uids: np.ndarray) -> np.ndarray:
    """Return the places of uids, uint64 [n, 2], in ascending order: int64 [n]; equal ones by place.

    Halves of uids are hardly ever equal, so that sorting the first ones is enough, which takes a
    small part of the time of sorting by both.
    """
    order = np.argsort(uids[:, 0])
    ascending = uids[order, 0]
    if (ascending[1:] == ascending[:-1]).any():
        return np.lexsort((uids[:, 1], uids[:, 0]))
    return order
