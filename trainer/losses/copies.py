"""Copies of a sample in one batch: pairs that are no negatives, and so left out of the losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from siftclip.trainer.losses.collectives import gather_features
from siftclip.trainer.losses.inputs import LossInputs
from siftclip.trainer.losses.tiles import tile_shape, tiles

# In place of a logit that is left out. Finite, so that a row without any other has gradients of
# zero rather than NaN, and far below every logit, so that its exponential is zero beside any.
LEFT_OUT = -1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Where images and texts of one sample meet that are not its own pair (i, i + offset).

    A loss with logits [b, B] of its own leaves them out so:

        copies = Copies.of(inputs)
        if copies is not None:
            everything = slice(0, len(logits)), slice(0, logits.shape[1])
            logits = logits.masked_fill(copies.mask(*everything), -1e30)

    Attributes:
        rows: int64 [b], the rows of the pool that this rank's images are of.
        all_rows: int64 [B], of all texts, those of all ranks.
        offset: where this rank's texts begin among all.
    """

    rows: Tensor
    all_rows: Tensor
    offset: int

    @classmethod
    def of(cls, inputs: LossInputs) -> Copies | None:
        """Return the copies of a batch that may hold a sample twice; None for other batches."""
        if not inputs.copies or inputs.rows is None:
            return None
        return cls(
            rows=inputs.rows,
            all_rows=gather_features(inputs.rows, rank=inputs.rank, world_size=inputs.world_size),
            offset=inputs.rank * len(inputs.rows),
        )

    def mask(self, rows: slice, columns: slice) -> Tensor:
        """Return which logits of a tile are of copies, bool [rows, columns] of [b, B]."""
        is_copy = self.rows[rows, None] == self.all_rows[columns]
        fill_pairs(is_copy, rows, columns, self.offset, value=False)
        return is_copy

    def others(self) -> Tensor:
        """Count the other samples that each of this rank is compared with, int64 [b]."""
        ranked = self.all_rows.sort().values
        first = torch.searchsorted(ranked, self.rows)
        last = torch.searchsorted(ranked, self.rows, right=True)
        return len(ranked) - (last - first)


def fill_pairs(
    tile: Tensor, rows: slice, columns: slice, offset: int, *, value: float | bool
) -> None:
    """Fill, in place, what a tile of a matrix [b, B] holds at the places (i, i + offset)."""
    first_column = rows.start + offset - columns.start
    if -len(tile) < first_column < tile.shape[1]:
        tile.diagonal(first_column).fill_(value)


def copies_softplus(image: Tensor, all_text: Tensor, bias: Tensor, copies: Copies) -> Tensor:
    """Sum softplus(logit) over the pairs of copies, tile by tile, to a scalar.

    Args:
        image: float [b, d], times the logit scale.
        all_text: float [B, d].
        bias: scalar, added to each logit.
        copies: of the batch.
    """

    def of_tile(image: Tensor, text: Tensor, bias: Tensor, rows: slice, columns: slice) -> Tensor:
        logits = image @ text.T + bias
        return F.softplus(logits).masked_fill(~copies.mask(rows, columns), 0).sum()

    total = image.new_zeros(())
    for rows, columns in tiles(len(image), len(all_text), tile_shape(image.device)):
        part = (image[rows], all_text[columns], bias, rows, columns)
        total = total + checkpoint(of_tile, *part, use_reentrant=False)
    return total
