"""Pools that differ from others in some of their fields."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from siftclip.datamodules.pool.pool import Pool


def changed_pool(pool: Pool, **changes: Any) -> Pool:
    """The pool with other values of some fields."""
    values = {field.name: getattr(pool, field.name) for field in fields(pool)}
    return Pool.of_fields(**values | changes)
