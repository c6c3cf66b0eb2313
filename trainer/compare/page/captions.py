"""Captions of a pool as reports count and search them: many at once, faults left out."""

from __future__ import annotations

import numpy as np

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import BadSampleError, SampleReader, decode_caption
from siftclip.progress import show_progress

_CHUNK = 4096  # captions that are read at once


def read_captions(pool: Pool, rows: np.ndarray, *, progress: bool) -> list[str | None]:
    """Read captions of rows, int64 [k]; None of a sample that cannot be read.

    Args:
        pool: whose samples they are.
        rows: of it.
        progress: show a bar.
    """
    texts: list[str | None] = []
    reader = SampleReader(pool=pool, max_image_pixels=1)  # no image is read
    try:
        with show_progress(
            total=len(rows), label="captions", unit="caption", bar=progress, delay_seconds=1
        ) as bar:
            for start in range(0, len(rows), _CHUNK):
                part = rows[start : start + _CHUNK]
                texts += [
                    _text(raw, reader.max_caption_bytes) for raw in reader.read_captions(part)
                ]
                bar.update(len(part))
    finally:
        reader.close()
    return texts


def _text(raw: bytes | BadSampleError, most_bytes: int) -> str | None:
    try:
        return None if isinstance(raw, BadSampleError) else decode_caption(raw, most_bytes)
    except BadSampleError:
        return None
