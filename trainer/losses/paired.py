"""Log-sum-exps and expectations over rows and columns of a logit matrix that is never held whole.

Both directions of a contrastive loss use one matrix, image @ text.T, and its transpose. Here it is
made tile by tile, once in the forward and once more in the backward, and both directions are read
from the same tile: memory is linear in the number of samples, and there are four matrix products
of it in a step where the dense loss has six.

A logit scale is multiplied into one side before the call: it then gets its gradient from the
features', without the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from siftclip.trainer.losses.copies import LEFT_OUT, Copies, fill_pairs
from siftclip.trainer.losses.tiles import fits_one_tile, tile_shape, tiles

Tile = tuple[int, int]


def paired_log_sum_exp(
    image: Tensor,
    text: Tensor,
    *,
    skip_diagonal: int | None = None,
    copies: Copies | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the log-sum-exps of rows and columns of image @ text.T.

    Args:
        image: float [b, d].
        text: float [B, d].
        skip_diagonal: leave the logits (i, i + skip_diagonal) out; None takes all.
        copies: whose logits are left out as well.
        tile: rows and columns of a tile; by default those of the device.

    Returns:
        [b] over the columns of each row, and [B] over these rows of each column; -1e30 where no
        logit is left.
    """
    shape = tile or tile_shape(image.device)
    if fits_one_tile(len(image), len(text), shape):
        logits = image @ text.T
        everything = (slice(0, len(image)), slice(0, len(text)))
        _leave_out(logits, *everything, skip_diagonal, copies)
        return logits.logsumexp(1), logits.logsumexp(0)
    sums: tuple[Tensor, Tensor] = _PairedLogSumExp.apply(image, text, skip_diagonal, copies, shape)
    return sums


def paired_expectation(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    *,
    copies: Copies | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the means of the logits image @ text.T under the softmaxes of a teacher's.

    Args:
        image: float [b, d].
        text: float [B, d].
        teacher_image: float [b, e]; no gradient flows to the teacher.
        teacher_text: float [B, e].
        row_lse: float [b], of the rows of the teacher's logits.
        column_lse: float [B], of the whole columns of the teacher's logits, over all ranks.
        copies: that the teacher's logits leave out.
        tile: rows and columns of a tile; by default those of the device.

    Returns:
        [b] sums over the columns of softmax_row * logit, and [B] sums over these rows of
        softmax_column * logit.
    """
    shape = tile or tile_shape(image.device)
    teacher = (teacher_image, teacher_text, row_lse, column_lse)
    if fits_one_tile(len(image), len(text), shape):
        with torch.no_grad():
            teacher_logits = teacher_image @ teacher_text.T
            everything = (slice(0, len(image)), slice(0, len(text)))
            _leave_out(teacher_logits, *everything, None, copies)
            by_row = (teacher_logits - row_lse[:, None]).exp_()
            by_column = teacher_logits.sub_(column_lse).exp_()
        logits = image @ text.T
        return (by_row * logits).sum(1), (by_column * logits).sum(0)
    means: tuple[Tensor, Tensor] = _PairedExpectation.apply(image, text, *teacher, copies, shape)
    return means


class _PairedLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        skip_diagonal: int | None,
        copies: Copies | None,
        tile: Tile,
    ) -> tuple[Tensor, Tensor]:
        row_lse = image.new_full((len(image),), -torch.inf)
        column_lse = image.new_full((len(text),), -torch.inf)
        scratch = _scratch(image, tile)
        for rows, columns in tiles(len(image), len(text), tile):
            logits = _tile_logits(image, text, rows, columns, scratch)
            _leave_out(logits, rows, columns, skip_diagonal, copies)
            row_lse[rows] = torch.logaddexp(row_lse[rows], logits.logsumexp(1))
            column_lse[columns] = torch.logaddexp(column_lse[columns], logits.logsumexp(0))
        ctx.save_for_backward(image, text, row_lse, column_lse)
        ctx.left_out, ctx.tile = (skip_diagonal, copies), tile
        return row_lse, column_lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, text, row_lse, column_lse = ctx.saved_tensors
        softmaxes = (image, text, row_lse, column_lse)
        return *_pull_back(ctx, image, text, softmaxes, gradients), *[None] * 3


class _PairedExpectation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        row_lse: Tensor,
        column_lse: Tensor,
        copies: Copies | None,
        tile: Tile,
    ) -> tuple[Tensor, Tensor]:
        row_mean = image.new_zeros(len(image))
        column_mean = image.new_zeros(len(text))
        scratch, teacher_scratch, product = (_scratch(image, tile) for _ in range(3))
        for rows, columns in tiles(len(image), len(text), tile):
            logits = _tile_logits(image, text, rows, columns, scratch)
            teacher = _tile_logits(teacher_image, teacher_text, rows, columns, teacher_scratch)
            _leave_out(teacher, rows, columns, None, copies)
            by_row = torch.sub(teacher, row_lse[rows, None], out=_part(product, teacher.shape))
            row_mean[rows] += by_row.exp_().mul_(logits).sum(1)
            column_mean[columns] += teacher.sub_(column_lse[columns]).exp_().mul_(logits).sum(0)
        ctx.save_for_backward(image, text, teacher_image, teacher_text, row_lse, column_lse)
        ctx.left_out, ctx.tile = (None, copies), tile
        return row_mean, column_mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, text, *softmaxes = ctx.saved_tensors
        return *_pull_back(ctx, image, text, softmaxes, gradients), *[None] * 6


def _pull_back(
    ctx: Any,
    image: Tensor,
    text: Tensor,
    softmaxes: Any,
    gradients: tuple[Tensor, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Compute gradients of image and text, where that of logit (i, j) is a sum of two softmaxes.

    The softmaxes are those of the rows and of the columns of first @ second.T; each row of the one
    and column of the other is multiplied by its gradient.
    """
    first, second, row_lse, column_lse = softmaxes
    row_gradient, column_gradient = gradients
    image_gradient = torch.zeros_like(image) if ctx.needs_input_grad[0] else None
    text_gradient = torch.zeros_like(text) if ctx.needs_input_grad[1] else None
    scratch, by_column_scratch = _scratch(image, ctx.tile), _scratch(image, ctx.tile)
    for rows, columns in tiles(len(image), len(text), ctx.tile):
        by_row = _tile_logits(first, second, rows, columns, scratch)
        _leave_out(by_row, rows, columns, *ctx.left_out)
        by_column = torch.sub(
            by_row, column_lse[columns], out=_part(by_column_scratch, by_row.shape)
        )
        by_column.exp_().mul_(column_gradient[columns])
        by_row.sub_(row_lse[rows, None]).exp_().mul_(row_gradient[rows, None])
        gradient = by_row.add_(by_column)
        if image_gradient is not None:
            image_gradient[rows].addmm_(gradient, text[columns])
        if text_gradient is not None:
            text_gradient[columns].addmm_(gradient.T, image[rows])
    return image_gradient, text_gradient


def _tile_logits(
    image: Tensor,
    text: Tensor,
    rows: slice,
    columns: slice,
    scratch: Tensor,
) -> Tensor:
    shape = torch.Size((rows.stop - rows.start, columns.stop - columns.start))
    return torch.mm(image[rows], text[columns].T, out=_part(scratch, shape))


def _leave_out(
    logits: Tensor, rows: slice, columns: slice, skip_diagonal: int | None, copies: Copies | None
) -> None:
    if skip_diagonal is not None:
        fill_pairs(logits, rows, columns, skip_diagonal, value=LEFT_OUT)
    if copies is not None:
        logits.masked_fill_(copies.mask(rows, columns), LEFT_OUT)


def _scratch(like: Tensor, tile: Tile) -> Tensor:
    return like.new_empty(tile[0] * tile[1])


def _part(scratch: Tensor, shape: torch.Size) -> Tensor:
    """View the beginning of a scratch as a matrix; so one buffer serves tiles of all shapes."""
    return scratch[: shape.numel()].view(shape)
