"""What a step of in-loop selection chose: scores, overlap, coverage, kinds of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.index.uids import UidTable
from siftclip.datamodules.pool.metadata import read_labels
from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import InputError

QUANTILES = (10, 50, 90)  # percent
UNKNOWN = -1  # in clusters and kinds
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)


def score_quantiles(scores: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Compute quantiles of the scores of what was chosen and of what was rejected.

    Args:
        scores: float [B]; what is not finite is left out.
        kept: bool [B].

    Returns:
        `score_chosen_q10`, `_q50`, `_q90`, and the same for `score_rejected`; none where no sample
        has a finite score.
    """
    named = {}
    for name, mask in (("chosen", kept), ("rejected", ~kept)):
        values = scores[mask & np.isfinite(scores)]
        if len(values):
            quantiles = np.percentile(values.astype(np.float64), QUANTILES)
            for percent, value in zip(QUANTILES, quantiles, strict=True):
                named[f"score_{name}_q{percent}"] = float(value)
    return named


def offline_overlap(offline: np.ndarray, kept: np.ndarray) -> float | None:
    """Compute the share of the k chosen samples that is among the k best by the offline score.

    Equal scores at the edge count with the probability that a random order puts them among the k,
    so that the answer does not depend on the order of the samples.

    Args:
        offline: float [B]; NaN comes after all others.
        kept: bool [B].

    Returns:
        In [0, 1]; None where nothing was chosen or no sample has a score.
    """
    chosen = int(kept.sum())
    scored = ~np.isnan(offline)
    if not chosen or not scored.any():
        return None
    places = np.full(len(offline), -1, dtype=np.int64)  # -1: below all that have a score
    places[scored] = np.unique(offline[scored], return_inverse=True)[1].reshape(-1)
    edge = np.partition(places, -chosen)[-chosen]
    above, at_edge = places > edge, places == edge
    odds = (chosen - above.sum()) / at_edge.sum()
    return float(((kept & above).sum() + odds * (kept & at_edge).sum()) / chosen)


def cluster_entropy(clusters: np.ndarray, total_clusters: int) -> float | None:
    """Measure how evenly samples cover the clusters: entropy over its maximum, in [0, 1].

    Args:
        clusters: int [k], ids below `total_clusters` of what was chosen; -1, unknown, is left out.
        total_clusters: of the whole pool, so that fewer samples than clusters stay below 1.

    Returns:
        None where no cluster is known, or there are not two of them.
    """
    known = clusters[clusters >= 0]
    if not len(known) or total_clusters < 2:
        return None
    counts = np.bincount(known)
    shares = counts[counts > 0] / len(known)
    return float(-(shares * np.log(shares)).sum() / np.log(total_clusters)) + 0.0  # not -0.0


def kind_shares(kinds: np.ndarray, total_kinds: int) -> np.ndarray:
    """Compute the share of each kind among samples: float64 [total_kinds].

    Args:
        kinds: int [k], at least one; -1, unknown, counts as a sample without a kind.
        total_kinds: how many kinds there are.
    """
    return np.bincount(kinds[kinds >= 0], minlength=total_kinds) / len(kinds)


class SeenRows:
    """Which rows of a pool of n samples were trained on: one bit each."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.count = 0  # of distinct rows
        self._bits = np.zeros(-(-samples // 8), dtype=np.uint8)

    def add(self, rows: np.ndarray) -> None:
        """Take note of rows, int64 [k], that may repeat."""
        rows = np.unique(rows)
        places, masks = rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8)
        new = (self._bits[places] & masks) == 0
        np.bitwise_or.at(self._bits, places[new], masks[new])
        self.count += int(new.sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bits, uint8 [ceil(n / 8)], for a checkpoint."""
        return {"seen": torch.from_numpy(self._bits.copy())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InputError: it belongs to a pool of another size.
        """
        bits = state["seen"].cpu().numpy()
        if bits.shape != self._bits.shape:
            raise InputError(
                f"The checkpoint's record of trained samples is for about {8 * len(bits)} samples, "
                f"the pool has {self.samples}. Resume with the pool that the run began with."
            )
        self._bits = bits.astype(np.uint8)  # a copy
        self.count = int(_BITS_OF_BYTE[self._bits].sum())


class Diagnostics:
    """Describes steps of a run. Arrays have one entry a row of the pool.

    Args:
        samples: rows of the pool.
        offline: float [n], a score that was made before training; NaN where there is none.
        clusters: int [n], any ids of at least 0, or -1 where unknown.
        kinds: int [n], indices into `kind_names`, or -1 where unknown.
        kind_names: of the kinds of a pool whose truth is known.

    Raises:
        ValueError: an array has another length than the pool.
    """

    def __init__(
        self,
        samples: int,
        *,
        offline: np.ndarray | None = None,
        clusters: np.ndarray | None = None,
        kinds: np.ndarray | None = None,
        kind_names: Sequence[str] = (),
    ) -> None:
        for name, array in (("offline", offline), ("clusters", clusters), ("kinds", kinds)):
            if array is not None and array.shape != (samples,):
                raise ValueError(f"{name} has the shape {array.shape}, not ({samples},)")
        self._seen = SeenRows(samples)
        self._offline, self._kinds, self._kind_names = offline, kinds, tuple(kind_names)
        self._clusters, self._total_clusters = None, 0
        if clusters is not None:
            self._clusters, self._total_clusters = _consecutive(clusters)

    def saw(self, rows: np.ndarray) -> None:
        """Take note of the rows trained on at a step, int64 [b]: every step, described or not."""
        self._seen.add(rows)

    def describe(
        self, scores: np.ndarray | None, kept: np.ndarray, rows: np.ndarray
    ) -> dict[str, float]:
        """Describe a step in numbers named `online/...`; those without a meaning are left out.

        Args:
            scores: float [B] of the super-batch; None for a choice without scores.
            kept: bool or int [B], what was chosen.
            rows: int64 [B], rows of the pool.
        """
        kept = kept.astype(bool)
        values: dict[str, float | None] = {"unique_samples": float(self._seen.count)}
        if scores is not None:
            values.update(score_quantiles(scores, kept))
        if self._offline is not None:
            values["offline_overlap"] = offline_overlap(self._offline[rows], kept)
        if self._clusters is not None:
            chosen = self._clusters[rows[kept]]
            values["cluster_entropy"] = cluster_entropy(chosen, self._total_clusters)
        if self._kinds is not None and kept.any():
            kinds = self._kinds[rows]
            for suffix, part in (("", kinds[kept]), ("_offered", kinds)):
                shares = kind_shares(part, len(self._kind_names)).tolist()
                for name, share in zip(self._kind_names, shares, strict=True):
                    values[f"share_{name}{suffix}"] = share
        return {f"online/{name}": value for name, value in values.items() if value is not None}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a continued run needs, for a checkpoint."""
        return self._seen.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._seen.load_state_dict(state)


def _consecutive(clusters: np.ndarray) -> tuple[np.ndarray, int]:
    """Map any ids to 0, 1, ..., with -1 unchanged: int32 [n], and count them."""
    known = clusters >= 0
    ids = np.full(len(clusters), UNKNOWN, dtype=np.int32)
    names, places = np.unique(clusters[known], return_inverse=True)
    ids[known] = places.reshape(-1)
    return ids, len(names)


def read_kinds(pool: Pool, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read what a truth file says of the samples of a pool.

    Args:
        pool: of n samples.
        path: a parquet file with the columns `uid` and `kind`. Rows without a valid uid are left
            out; of repeated uids the first counts.

    Returns:
        Indices into the names, int16 [n], -1 where the file says nothing; and the names, sorted.

    Raises:
        InputError: a column is missing, there are too many kinds, or no sample is found.
    """
    import pandas as pd

    uids, labels = read_labels(path, "kind")
    kinds = pd.Categorical(labels)
    if len(kinds.categories) > np.iinfo(np.int16).max:
        raise InputError(
            f"The column 'kind' of the truth file {path} has {len(kinds.categories)} different "
            f"values; at most {np.iinfo(np.int16).max} are described."
        )
    places = UidTable.build(uids).find(pool.uids)
    answer = np.full(len(pool), UNKNOWN, dtype=np.int16)
    answer[places >= 0] = kinds.codes[places[places >= 0]]
    if (answer == UNKNOWN).all():
        raise InputError(
            f"The truth file {path} names none of the {len(pool)} samples of the pool {pool.root}. "
            "Their uids must be those of the pool."
        )
    return answer, tuple(str(name) for name in kinds.categories)
