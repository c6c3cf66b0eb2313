"""Reads samples of a pool from its tars: coalesced ranges, then decoding of what was selected."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from siftclip.datamodules.index.content import describe_content
from siftclip.datamodules.pool.image_formats import formats_for, is_usual
from siftclip.datamodules.pool.pool import MAX_CAPTION_BYTES, Pool
from siftclip.datamodules.storage.local import (
    ChangedError,
    ShardFile,
    Span,
    StorageError,
    changed_file_error,
)
from siftclip.errors import InputError

try:
    import simplejpeg
except ImportError:  # the extra `fast`
    simplejpeg = None

MAX_SPAN_BYTES = 8 << 20  # neighbours are joined up to this size
_LARGE_IMAGE = "with more bytes than max_image_pixels allows"
_LONG_CAPTION = "with a caption of more than max_caption_bytes"
# CLIP's tokenizer takes time in the square of such a run: 0.2 s for 1,000 letters, 10 s for 8,000.
MAX_WORD_LETTERS = 250
_LONG_WORD = re.compile(rf"[A-Za-z\u00c0-\u024f]{{{MAX_WORD_LETTERS + 1}}}")
_JPEG_COLORS = ("YCbCr", "Gray")  # simplejpeg's words for what nearly all JPEGs are


class BadSampleError(Exception):
    """A sample cannot be used; the message is the cause, worded to follow a count."""


class ChangedTarError(BadSampleError):
    """The tar of a sample has changed since the pool was opened, and with it all of its samples.

    No run should continue, whatever share of its samples that is: `stop` says why.
    """

    def __init__(self, cause: str, path: str) -> None:
        """Store the `path` of the tar."""
        super().__init__(cause)
        self.path = path

    def stop(self) -> InputError:
        """Return the error to end with."""
        return changed_file_error(self.path)


class RawSample(NamedTuple):
    """The bytes of a sample, as they are in the tar."""

    image: bytes
    caption: bytes


# (number of a range that was asked for, its first byte and the byte behind it inside a joined one)
Piece = tuple[int, int, int]


def coalesce(
    shards: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    *,
    max_gap_bytes: int,
    max_span_bytes: int = MAX_SPAN_BYTES,
) -> list[tuple[int, int, int, list[Piece]]]:
    """Join ranges of the same tar that are close to each other.

    Args:
        shards: int [n], the tar of each range.
        starts: int64 [n], its first byte.
        ends: int64 [n], the byte behind its last.
        max_gap_bytes: ranges are joined over gaps of at most this size.
        max_span_bytes: joined ranges do not grow beyond this; single ones may be larger.

    Returns:
        (tar, first byte, byte behind the last, pieces) by tar and place. Every range is in exactly
        one, also those that repeat or overlap.
    """
    spans: list[tuple[int, int, int, list[Piece]]] = []
    order = np.lexsort((ends, starts, shards)).tolist()
    columns = shards.tolist(), starts.tolist(), ends.tolist()
    shard, first, last, pieces = -1, 0, 0, list[Piece]()
    for index in order:
        here, start, end = columns[0][index], columns[1][index], columns[2][index]
        new_last = max(last, end)
        if here != shard or start > last + max_gap_bytes or new_last - first > max_span_bytes:
            if pieces:
                spans.append((shard, first, last, pieces))
            shard, first, new_last, pieces = here, start, end, []
        last = new_last
        pieces.append((index, start - first, end - first))
    if pieces:
        spans.append((shard, first, last, pieces))
    return spans


def read_ranges(
    pool: Pool, shards: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> Iterator[tuple[int, bytes | StorageError]]:
    """Read ranges of a pool's tars, neighbours together, in the order of their places.

    Those of neighbours that could not be read together are read again, each alone, at the end: what
    is bad must not depend on what is read with it.

    Args:
        pool: of the tars.
        shards: int [n], the tar of each range.
        starts: int64 [n], its first byte.
        sizes: int64 [n], its bytes.

    Yields:
        The number of a range with its bytes, fewer where the tar ends, or why there are none.
    """
    joined = coalesce(shards, starts, starts + sizes, max_gap_bytes=pool.storage.max_gap_bytes)
    spans = [Span(pool.shards[shard], start, end) for shard, start, end, _ in joined]
    alone: dict[int, Span] = {}
    for data, span, (_, _, _, pieces) in zip(pool.storage.read(spans), spans, joined, strict=True):
        for number, start, end in pieces:
            if not isinstance(data, StorageError):
                yield number, data[start:end]
            elif len(pieces) == 1 or isinstance(data, ChangedError):
                yield number, data
            else:
                at = span.start_bytes
                alone[number] = span._replace(start_bytes=at + start, end_bytes=at + end)
    if alone:
        yield from zip(alone, pool.storage.read(list(alone.values())), strict=True)


def bad_sample(error: StorageError, shard: ShardFile) -> BadSampleError:
    """Return the fault of a sample, one of whose ranges could not be read from its tar."""
    if isinstance(error, ChangedError):
        return ChangedTarError(str(error), shard.path)
    return BadSampleError(str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReader:
    """Reads captions and images of a pool by row. Picklable; a process opens its own files."""

    pool: Pool
    max_image_pixels: int

    def close(self) -> None:
        """Close what this process has open. Reading again opens it anew."""
        self.pool.storage.close()

    @property
    def max_member_bytes(self) -> int:
        """No image of `max_image_pixels` is larger: four bytes a pixel, and some description."""
        return 4 * self.max_image_pixels + (1 << 20)

    @property
    def max_caption_bytes(self) -> int:
        """Captions that are longer are bad samples, and not read."""
        return self.pool.options.max_caption_bytes

    def read(self, rows: np.ndarray) -> Iterator[tuple[int, RawSample | BadSampleError]]:
        """Read the samples of rows, int64 [n], as (position in `rows`, bytes or error).

        They come in the order of their places, not of `rows`, and one at a time: a cold disk reads
        on while the caller decodes.
        """
        pool, count = self.pool, len(rows)
        sizes = np.concatenate([pool.image_sizes_bytes[rows], pool.text_sizes_bytes[rows]])
        starts = np.concatenate([pool.image_offsets_bytes[rows], pool.text_offsets_bytes[rows]])
        first_parts: dict[
            int, bytes | BadSampleError
        ] = {}  # of samples whose other part is to come
        shards = np.tile(pool.shard_of_row[rows], 2)
        for number, part in self._read_ranges(shards, starts, sizes, images=count):
            is_caption, index = divmod(number, count)
            other = first_parts.pop(index, None)
            if other is None:
                first_parts[index] = part
            elif isinstance(part, BadSampleError):
                yield index, part
            elif isinstance(other, BadSampleError):
                yield index, other
            else:
                yield index, RawSample(other, part) if is_caption else RawSample(part, other)

    def read_captions(self, rows: np.ndarray) -> list[bytes | BadSampleError]:
        """Read the captions of rows, int64 [n], alone, in the order of `rows`."""
        pool = self.pool
        ranges = self._read_ranges(
            pool.shard_of_row[rows],
            pool.text_offsets_bytes[rows],
            pool.text_sizes_bytes[rows],
            images=0,
        )
        return [part for _, part in sorted(ranges, key=lambda numbered: numbered[0])]

    def _read_ranges(
        self, shards: np.ndarray, starts: np.ndarray, sizes: np.ndarray, *, images: int
    ) -> Iterator[tuple[int, bytes | BadSampleError]]:
        """Yield ranges of tars, in the order of their places, each with its number.

        The first `images` are those of images, the others those of captions.
        """
        is_image = np.arange(len(sizes)) < images
        too_large = sizes > np.where(is_image, self.max_member_bytes, self.max_caption_bytes)
        for number in np.flatnonzero(too_large).tolist():
            yield number, BadSampleError(_LARGE_IMAGE if is_image[number] else _LONG_CAPTION)
        sizes = np.where(too_large, 0, sizes)
        for number, part in read_ranges(self.pool, shards, starts, sizes):
            if too_large[number]:
                continue
            if isinstance(part, StorageError):
                yield number, bad_sample(part, self.pool.shards[shards[number]])
            elif len(part) < sizes[number]:
                yield number, BadSampleError("cut off by the end of their tar")
            else:
                yield number, part

    def read_one(self, row: int) -> RawSample:
        """Read the bytes of one row.

        Raises:
            BadSampleError: they cannot be read.
        """
        ((_, sample),) = self.read(np.asarray([row], dtype=np.int64))
        if isinstance(sample, BadSampleError):
            raise sample
        return sample

    def read_caption(self, row: int) -> str:
        """Read the caption of a row; see `decode_caption`."""
        (caption,) = self.read_captions(np.asarray([row], dtype=np.int64))
        if isinstance(caption, BadSampleError):
            raise caption
        return decode_caption(caption, self.max_caption_bytes)

    def read_image(self, row: int) -> Image.Image:
        """Read the image of a row; see `decode_image`."""
        return decode_image(self.read_one(row).image, self.max_image_pixels)


def decode_caption(data: bytes, max_bytes: int = MAX_CAPTION_BYTES) -> str:
    """Decode a caption, without surrounding white space.

    What would take a tokenizer seconds is refused, of which it would use the first tokens alone.

    Args:
        data: UTF-8.
        max_bytes: longer ones are refused before they are looked at.

    Raises:
        BadSampleError: it is too long, empty or not UTF-8, or has a word of more than
            `MAX_WORD_LETTERS` letters.
    """
    if len(data) > max_bytes:
        raise BadSampleError(_LONG_CAPTION)
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSampleError("with a caption that is not UTF-8") from None
    if not caption:
        raise BadSampleError("with an empty caption")
    if has_long_word(caption):
        raise BadSampleError(f"with a word of more than {MAX_WORD_LETTERS} letters in the caption")
    return caption


def has_long_word(text: str) -> bool:
    """Return whether a text has more than `MAX_WORD_LETTERS` letters in a row."""
    return len(text) > MAX_WORD_LETTERS and _LONG_WORD.search(text) is not None


def decode_image(data: bytes, max_image_pixels: int) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        BadSampleError: it cannot be decoded, or its header states more than `max_image_pixels`.
    """
    pixels = _decode_jpeg(data, max_image_pixels)
    return _decode_pillow(data, max_image_pixels) if pixels is None else Image.fromarray(pixels)


def decode_pixels(data: bytes, max_image_pixels: int) -> np.ndarray:
    """Decode as `decode_image`, but to uint8 [h, w, 3]."""
    pixels = _decode_jpeg(data, max_image_pixels)
    return np.array(_decode_pillow(data, max_image_pixels)) if pixels is None else pixels


def _decode_jpeg(data: bytes, max_image_pixels: int) -> np.ndarray | None:
    """Decode a sound JPEG by simplejpeg, if installed: Pillow's pixels, in less time. Else None."""
    if simplejpeg is None or data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_image_pixels or colorspace not in _JPEG_COLORS:
            return None  # Pillow has the words for it, and other arithmetic for CMYK
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return pixels
    except ValueError:  # damaged or cut: Pillow decides
        return None


def _decode_pillow(data: bytes, max_image_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Of odd metadata and palettes with transparency. Pillow's own limit of pixels is a
            # warning, too; ours is checked on the header, before decoding
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats_for(data))
            if image.width * image.height > max_image_pixels:
                raise BadSampleError("with more pixels than max_image_pixels")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except BadSampleError:
        raise
    except Image.DecompressionBombError:
        raise BadSampleError("with more pixels than Pillow decodes") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error
        name = None if is_usual(data) else describe_content(data)
        found = "" if name is None else f" (it is {name})"
        raise BadSampleError(f"whose image cannot be decoded{found}") from error
