"""How a matrix of logits is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Rows and columns of a tile: 2 MiB of float32, of which up to three exist at a time. Medians of
# forward and backward of 4,096 samples of dim 512 (2 shared cores of an EPYC with 1 MiB of L2 cache
# each, torch 2.15), in seconds with one thread and two: 512x512 .96 .48, 1024x256 1.00 .53,
# 1024x512 .96 .45, 1024x1024 1.05 .46, 2048x2048 1.62 .57; the dense loss takes 1.56 .87.
CPU_TILE = (1024, 512)
# 64 MiB of float32, enough for products that fill a GPU. Not measured on one.
GPU_TILE = (4096, 4096)


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Return rows and columns of a tile on this kind of device."""
    return CPU_TILE if device.type == "cpu" else GPU_TILE


def fits_one_tile(rows: int, columns: int, tile: tuple[int, int]) -> bool:
    """Return whether a matrix is no larger than a tile, whatever its shape."""
    return rows * columns <= tile[0] * tile[1]


def tiles(rows: int, columns: int, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield row and column slices that cover a matrix; the last of each side may be smaller."""
    for top in range(0, rows, tile[0]):
        for left in range(0, columns, tile[1]):
            yield (
                slice(top, min(top + tile[0], rows)),
                slice(left, min(left + tile[1], columns)),
            )
