"""Autocast without its cache of weights, which can lose gradients.

Inside an autocast torch keeps the 16-bit copy of each weight that it has made. Up to torch 2.10 a
copy made under `no_grad` is kept as well: a later forward with gradients takes it, and the weight
gets no gradient. Lightning switches the cache off; so does whatever opens an autocast here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return an autocast to a 16-bit type, without the cache; None: one that casts nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


@contextmanager
def no_weight_cache() -> Iterator[None]:
    """Keep a forward without gradients out of the cache of an autocast that somebody else opened.

    The autocast itself stays in force.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
