"""Features of a model on disk, by the contents of the images or texts that they are of."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np

from siftclip.errors import InputError
from siftclip.files import has_form, read_npz, write_npz
from siftclip.ranks import Ranks, sum_arrays
from siftclip.writing import WriteError

log = logging.getLogger(__name__)


class FeatureCache:
    """Features that a model has computed before.

    They are found by what an image contains and not by its file.

    Args:
        folder: of this model and kind of features alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for path in sorted(self.folder.glob("*.npz")):
            part = _read(path, parts[0][1].shape[1] if parts else None)
            parts += [] if part is None else [part]
        ids = [part[0] for part in parts] or [np.empty(0, dtype=np.uint64)]
        self._ids = np.concatenate(ids)
        self._features = np.concatenate([part[1] for part in parts]) if parts else None
        self._order = np.argsort(self._ids, kind="stable")
        self._ranked = self._ids[self._order]

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Find which images are known, bool [n], and the features of those, float32 [known, d].

        Args:
            ids: uint64 [n], see `images.content_id`.
        """
        if self._features is None:
            return np.zeros(len(ids), dtype=np.bool_), None
        at = np.minimum(np.searchsorted(self._ranked, ids), len(self._ranked) - 1)
        known = self._ranked[at] == ids
        return known, self._features[self._order[at[known]]]

    def add(self, ids: np.ndarray, features: np.ndarray) -> None:
        """Keep features, float32 [n, d], for later runs."""
        if len(ids):
            name = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
            try:
                write_npz(self.folder / f"{name}.npz", ids=ids, features=features)
            except WriteError as error:  # a full disk shall not cost the results
                log.warning("%s These features are not kept.", error)


class SharedCache:
    """The cache of the first rank, which all ranks ask together.

    Args:
        folder: of all models.
        model: `identities.model_identity` of this one: a changed checkpoint, or another precision,
            never finds the features of another.
        kind: of the features, a folder of its own.
        ranks: who asks.
    """

    def __init__(self, folder: Path, model: str, kind: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self._cache = FeatureCache(folder / model[:32] / kind) if ranks.rank == 0 else None

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Find which ids, uint64 [n], have features: bool [n]."""
        is_known = np.zeros(len(ids), dtype=np.int64)
        if self._cache is not None:
            is_known = self._cache.find(ids)[0].astype(np.int64)
        return sum_arrays(self.ranks, is_known).astype(np.bool_)

    def features(self, ids: np.ndarray) -> np.ndarray:
        """Return the features of known ids, float32 [n, d]; [0, 0] for none."""
        values = np.zeros((0, 0), dtype=np.float32)
        if self._cache is not None and len(ids):
            cached = self._cache.find(ids)[1]
            values = values if cached is None else cached
        shape = sum_arrays(self.ranks, np.asarray(values.shape))
        if self.ranks.rank > 0:
            values = np.zeros(shape.tolist(), dtype=np.float32)
        return sum_arrays(self.ranks, values)

    def add(self, ids: np.ndarray, features: np.ndarray) -> None:
        """Keep features that all ranks have, float32 [n, d]."""
        if self._cache is not None:
            self._cache.add(ids, features)


def _read(path: Path, width: int | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Read ids, uint64 [n], and features, float32 [n, d]; None for a file that is passed over."""
    try:
        ids, features = read_npz(path, ["ids", "features"])
        shape = (ids.size, features.shape[-1] if features.ndim else 0)
        if not has_form(ids, np.uint64, shape[:1]) or not has_form(features, np.float32, shape):
            raise InputError(
                f"{path} must hold ids, uint64 [n], and features, float32 [n, d]. It holds "
                f"{ids.dtype} {list(ids.shape)} and {features.dtype} {list(features.shape)}."
            )
        if width is not None and features.shape[1] != width:
            raise InputError(
                f"{path} holds features of {features.shape[1]} columns, and others of this model "
                f"have {width}."
            )
    except InputError as error:
        log.warning("%s It is passed over: its images are encoded again.", error)
        return None
    return ids, features
