"""Random numbers that are pure functions of a seed, a draw and the uid of a sample."""

from __future__ import annotations

import numpy as np

from siftclip.hashing import mix64, seed_state, uid_hashes
from siftclip.purposes import HashPurpose

_FAR = 100.0  # between two logits: Gumbel noise of 52 bits is between -4 and 37


def noise_state(uids: np.ndarray, seed: int) -> np.ndarray:
    """Return what the noise of a sample begins with, uint64 [n], from uids uint64 [n, 2]."""
    return uid_hashes(uids, seed_state(seed ^ HashPurpose.NOISE))


def hashes(state: np.ndarray, draw: int) -> np.ndarray:
    """Compute independent random bits for a draw: uint64 [n]."""
    return mix64(state ^ seed_state(draw))


def noise(state: np.ndarray, draw: int) -> np.ndarray:
    """Draw independent uniform numbers in the open interval (0, 1): float64 [n]."""
    return ((hashes(state, draw) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel(state: np.ndarray, draw: int) -> np.ndarray:
    """Draw independent standard Gumbel numbers: float64 [n]."""
    numbers: np.ndarray = -np.log(-np.log(noise(state, draw)))
    return numbers


def bounded_logits(logits: np.ndarray, *, penalties: float = 0.0) -> np.ndarray:
    """Replace +inf by a finite number so far above all other logits that no noise makes up for it.

    So what has +inf is drawn first, and at random among its like, as in the limit of a large logit.

    Args:
        logits: float [n], above -inf.
        penalties: what one may lose on the way, at most.
    """
    best = np.isposinf(logits)
    top = logits[~best].max(initial=-np.inf) if not best.all() else 0.0
    return np.where(best, top + _FAR + penalties, logits).astype(np.float64)
