"""Scores and subsets made elsewhere (DFN, T-MARS, M-FLYT, a published subset, one's own table)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import ParameterError, require_suffix
from siftclip.selectors.core.base import Chunk, ExternalColumn, Requirements, ScoreSelector
from siftclip.selectors.core.rules import AsGiven, Of, Rule


class External(ScoreSelector):
    """Select by a column of a file keyed by uid, or take a DataComp subset unchanged.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> selector = siftclip.selectors.External(path=None, column="my_score", threshold=0.5)
        >>> siftclip.select(column=np.array([0.9, 0.1, 0.5]), selector=selector).rows
        array([0, 2])
    """

    def __init__(
        self,
        *,
        path: str | None,
        column: str | None = None,
        fraction: float | None = None,
        threshold: float | None = None,
        rule: Rule | None = None,
        of: Of = "pool",
    ) -> None:
        """Name the file.

        Args:
            path: a `.parquet` file with `uid` and `column`; a structured `.npy` with the fields
                `f0` and `f1` (the uid, u8) and `column`; or a DataComp subset `.npy`, in which
                repeated uids mean repeated samples. None means the parquet files of the pool's own
                metadata, such as for the column `clip_l14_similarity_score`.
            column: the score to select by, higher is better, -inf for "never"; None for a subset.
            fraction: see `ScoreSelector`; only with a column.
            threshold: see `ScoreSelector`; only with a column.
            rule: see `ScoreSelector`; only with a column.
            of: see `ScoreSelector`.
        """
        require_suffix("path", path, (".parquet", ".npy"), owner=self)
        is_subset = path is not None and path.endswith(".npy") and column is None
        if is_subset and (fraction, threshold, rule) != (None, None, None):
            raise ParameterError(
                "is a finished subset without a column, so fraction, threshold and rule must be "
                "null",
                owner=self,
                parameter="path",
                value=path,
                got=f"{path!r}, fraction={fraction!r}, threshold={threshold!r}, rule={rule!r}",
            )
        if not is_subset and column is None:
            must = f"must name a column of {path or 'the metadata'}"
            raise ParameterError(must, owner=self, parameter="column", got="null")
        if is_subset:
            rule = AsGiven()
        super().__init__(fraction=fraction, threshold=threshold, rule=rule, of=of)
        self.column = ExternalColumn(path=path, column=column)

    @property
    def requires(self) -> Requirements:
        return Requirements(column=self.column)

    def score(self, chunk: Chunk) -> Tensor:
        if chunk.column is None:
            raise ValueError("the chunk lacks the column that External.requires names")
        # A number that float32 cannot hold is not infinite: it neither wins nor loses for ever.
        largest = np.finfo(np.float32).max
        finite = np.clip(chunk.column, -largest, largest)
        values = np.where(np.isinf(chunk.column), chunk.column, finite)
        return torch.from_numpy(values.astype(np.float32))
