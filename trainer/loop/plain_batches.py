"""Batches of other loaders, as the training module takes those of the stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from siftclip.datamodules.streaming.batches import Batch, StepBatch
from siftclip.datamodules.streaming.pixels import Normalization
from siftclip.errors import InputError

_NAMES = ("images", "tokens", "rows", "weights")
_WANTED = (
    "A batch must be a tuple (images, tokens), or a mapping with `images`, `tokens` and, if it has "
    "them, `rows` and `weights`"
)


def step_batch_of(batch: Any, normalization: Normalization | None = None) -> StepBatch:
    """Return the batch of one step on one rank.

    Args:
        batch: a `StepBatch`; or images, float [b, 3, h, w], and tokens, int64 [b, t], as a tuple or
            as a mapping, which may also have `rows`, int64 [b], by which copies of a sample are no
            negatives of each other, and `weights`, float32 [b], of the samples in the loss.
        normalization: by which images that are uint8 are finished, where it is known.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(batch, StepBatch):
        return batch
    values = _named(batch)
    if not all(isinstance(value, Tensor) for value in values.values()):
        kinds = {name: type(value).__name__ for name, value in values.items()}
        raise InputError(f"{_WANTED}, all tensors. Got {kinds}.")
    images, rows = values["images"], values.get("rows")
    pixels = images.dtype == torch.uint8
    if pixels and normalization is None:
        raise InputError(
            "The images of a batch must be floats, normalised. Got uint8, which only SelectedPairs "
            "says how to finish. Let the loader end its transform with ToTensor and Normalize."
        )
    unknown = images.new_full((len(images),), -1, dtype=torch.int64)
    part = Batch(
        images=images,
        tokens=values["tokens"],
        rows=unknown if rows is None else rows,
        valid=torch.ones_like(unknown, dtype=torch.bool),
        weights=values.get("weights"),
        copies=rows is not None,
        normalization=normalization if pixels else None,
    )
    return StepBatch([part])


def _named(batch: Any) -> dict[str, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return dict(zip(_NAMES, batch, strict=False))
    if isinstance(batch, Mapping) and {*_NAMES[:2]} <= batch.keys() <= {*_NAMES}:
        return dict(batch)
    if isinstance(batch, Mapping):
        got = f"a mapping with {sorted(map(str, batch))}"
    else:
        got = f"{type(batch).__name__}" + (
            f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        )
    raise InputError(f"{_WANTED}. Got {got}.")
