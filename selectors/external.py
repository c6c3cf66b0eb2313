"""Scores and subsets made elsewhere (DFN, T-MARS, M-FLYT, a published subset, one's own table)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from siftclip.selectors.base import Chunk, ExternalColumn, Requirements, ScoreSelector
from siftclip.selectors.errors import InputError
from siftclip.selectors.rules import AsGiven


class External(ScoreSelector):
    """Select by a column of a parquet file keyed by uid, or take a DataComp subset as it is."""

    def __init__(
        self,
        *,
        path: str,
        column: str | None = None,
        fraction: float | None = None,
        threshold: float | None = None,
    ) -> None:
        """Name the file.

        Args:
            path: a `.parquet` file with `uid` and `column`, or a DataComp subset `.npy`, in which
                repeated uids mean repeated samples.
            column: the score to select by, higher is better; only with parquet.
            fraction: see `ScoreSelector`; only with parquet.
            threshold: see `ScoreSelector`; only with parquet.
        """
        is_subset = path.endswith(".npy")
        if not is_subset and not path.endswith(".parquet"):
            raise InputError(f"selector.path must end in .parquet or .npy. Got {path!r}.")
        if is_subset and (column, fraction, threshold) != (None, None, None):
            raise InputError(
                f"selector.path={path!r} is a finished subset, so selector.column, "
                f"selector.fraction and selector.threshold must be null. Got column={column!r}, "
                f"fraction={fraction!r}, threshold={threshold!r}."
            )
        if not is_subset and column is None:
            raise InputError(f"selector.column must name a column of {path!r}. Got null.")
        rule = AsGiven() if is_subset else None
        super().__init__(fraction=fraction, threshold=threshold, rule=rule)
        self.column = ExternalColumn(path=path, column=column)

    @property
    def requires(self) -> Requirements:
        return Requirements(column=self.column)

    def score(self, chunk: Chunk) -> Tensor:
        if chunk.column is None:
            raise ValueError("the chunk lacks the column that External.requires names")
        return torch.from_numpy(chunk.column.astype(np.float32))
