"""Memory for batches: in a loader process it is shared with the trainer, and nothing is copied."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate a tensor of this shape; its values are whatever was there."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # as torch's own collation does; `share_memory_` would copy what is not yet written
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]  # torch ships it without types
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
