"""Reads single samples of a pool from its tars: positional reads, then decoding."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from siftclip.datamodules.pool import Pool

MAX_OPEN_FILES = 256  # tars a process keeps open; 1,024 is a usual limit of the system


class BadSampleError(Exception):
    """A sample cannot be used; the message is the cause, worded to follow a count."""


@dataclass(slots=True)
class SampleReader:
    """Reads captions and images of a pool by row. Picklable; a process opens its own files."""

    pool: Pool
    max_image_pixels: int
    _files: dict[int, int] = field(default_factory=dict, repr=False)
    _process: int = field(default=-1, repr=False)

    def __getstate__(self) -> tuple[Pool, int]:
        return self.pool, self.max_image_pixels

    def __setstate__(self, state: tuple[Pool, int]) -> None:
        self.pool, self.max_image_pixels = state
        self._files, self._process = {}, -1

    def close(self) -> None:
        """Close the files of this process. Reading again opens them anew."""
        if self._process == os.getpid():
            for file in self._files.values():
                os.close(file)
        self._files = {}

    def _read(self, row: int, offsets_bytes: np.ndarray, sizes_bytes: np.ndarray) -> bytes:
        shard, size_bytes = int(self.pool.shard_of_row[row]), int(sizes_bytes[row])
        if self._process != os.getpid():  # a forked worker must not share file descriptors
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))  # the one opened first
            try:
                self._files[shard] = os.open(self.pool.shards[shard], os.O_RDONLY)
            except OSError as error:
                raise BadSampleError(f"in a tar that cannot be opened ({error.strerror})") from None
        data = os.pread(self._files[shard], size_bytes, int(offsets_bytes[row]))
        if len(data) != size_bytes:
            raise BadSampleError("cut off by the end of their tar")
        return data

    def read_caption(self, row: int) -> str:
        """The caption of a row, without surrounding white space.

        Raises:
            BadSampleError: it is empty or not UTF-8.
        """
        data = self._read(row, self.pool.text_offsets_bytes, self.pool.text_sizes_bytes)
        try:
            caption = data.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise BadSampleError("with a caption that is not UTF-8") from None
        if not caption:
            raise BadSampleError("with an empty caption")
        return caption

    def read_image(self, row: int) -> Image.Image:
        """The image of a row, decoded to RGB.

        Raises:
            BadSampleError: it cannot be decoded, or has more pixels than `max_image_pixels`.
        """
        data = self._read(row, self.pool.image_offsets_bytes, self.pool.image_sizes_bytes)
        try:
            with warnings.catch_warnings():
                # Pillow's own limit is a warning; ours is checked on the header, before decoding
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > self.max_image_pixels:
                raise BadSampleError("with more pixels than data.max_image_pixels")
            return image.convert("RGB")
        except BadSampleError:
            raise
        except Image.DecompressionBombError:
            raise BadSampleError("with more pixels than Pillow decodes") from None
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error
            raise BadSampleError("whose image cannot be decoded") from error
