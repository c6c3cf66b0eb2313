"""Units of a task, and outcomes of a model that is right or wrong on each."""

from __future__ import annotations

import numpy as np

from siftclip.eval.metrics.outcomes import Outcomes


def make_units(n: int, start: int = 0) -> np.ndarray:
    """Ids of units, uint64 [n]."""
    return np.arange(start, start + n, dtype=np.uint64)


def share(hits: np.ndarray) -> Outcomes:
    """Outcomes whose statistic is the share of hits, bool [n]."""
    return Outcomes(statistic="mean", arrays={"value": hits.astype(np.float32)})
