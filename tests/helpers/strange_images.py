"""Images as strangers have them, as bytes: those that are decoded, and those that are not."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# 16 x 16 pixels by libjpeg-turbo 2.1.5 with `arith_code`; Pillow writes no such file
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNyws"
    "QFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT0//yQARCAAQABADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AGjg"
    "q2TNH0nHsmzwr8WpLH9YZ72CWWeMmxxQ/9k="
)


def picture(mode: str = "RGB", *, seed: int = 0, width: int = 23, height: int = 17) -> Image.Image:
    """Smooth enough that JPEG keeps its colours, with sides that no block size divides."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (3, 4, 4), dtype=np.uint8)
    image = Image.fromarray(small, "RGBA").resize((width, height))
    return image.convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_16_bit(*, bright: bool) -> bytes:
    values = np.arange(17 * 23, dtype=np.uint16).reshape(17, 23)
    return encode(Image.fromarray(values * (160 if bright else 1)), "PNG")


def png_of(color: int, depth: int, values: np.ndarray) -> bytes:
    """A PNG of a kind that Pillow does not write: values [h, w, channels], big-endian."""

    def block(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + block(b"IHDR", header)
        + block(b"IDAT", zlib.compress(rows))
        + block(b"IEND", b"")
    )


def color_16_bit() -> bytes:
    return png_of(2, 16, np.random.default_rng(0).integers(0, 65536, (17, 23, 3)).astype(">u2"))


def palette(**options: Any) -> bytes:
    return encode(picture().quantize(16), "PNG", **options)


def frames(kind: str, **options: Any) -> bytes:
    more = [picture(seed=seed) for seed in (1, 2)]
    return encode(picture(), kind, save_all=True, append_images=more, **options)


def with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return encode(picture(), "JPEG", exif=exif)


def wrong_profile(kind: str) -> bytes:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    return encode(picture(), kind, icc_profile=lab)


def adobe_rgb_jpeg() -> bytes:
    """A JPEG of RGB without transform: Adobe's marker says so."""
    return encode(picture(), "JPEG", keep_rgb=True)


DECODED: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encode(picture(), "JPEG"),
    "JPEG, progressive": lambda: encode(picture(), "JPEG", progressive=True),
    "JPEG, arithmetic": lambda: ARITHMETIC,
    "JPEG, grey": lambda: encode(picture("L"), "JPEG"),
    "JPEG, CMYK": lambda: encode(picture("CMYK"), "JPEG"),
    "JPEG, RGB inside": adobe_rgb_jpeg,
    "JPEG, EXIF rotation": with_exif,
    "JPEG, wrong ICC profile": lambda: wrong_profile("JPEG"),
    "JPEG, profile that is none": lambda: encode(picture(), "JPEG", icc_profile=b"no profile"),
    "JPEG, trailing garbage": lambda: encode(picture(), "JPEG") + b"garbage" * 99,
    "JPEG, 1 x 1": lambda: encode(picture(width=1, height=1), "JPEG"),
    "MPO": lambda: frames("MPO"),
    "PNG": lambda: encode(picture(), "PNG"),
    "PNG, 1 bit": lambda: encode(picture("1"), "PNG"),
    "PNG, grey": lambda: encode(picture("L"), "PNG"),
    "PNG, 16 bit, dark": lambda: grey_16_bit(bright=False),
    "PNG, 16 bit": lambda: grey_16_bit(bright=True),
    "PNG, 16 bit in colour": color_16_bit,
    "PNG, palette": palette,
    "PNG, palette, one colour transparent": lambda: palette(transparency=3),
    "PNG, palette, transparency": lambda: palette(transparency=bytes([0, 128, 255])),
    "PNG, LA": lambda: encode(picture("LA"), "PNG"),
    "PNG, RGBA": lambda: encode(picture("RGBA"), "PNG"),
    "PNG, wrong ICC profile": lambda: wrong_profile("PNG"),
    "PNG, trailing garbage": lambda: encode(picture(), "PNG") + b"garbage" * 99,
    "PNG, 1 x 1": lambda: encode(picture(width=1, height=1), "PNG"),
    "APNG": lambda: frames("PNG"),
    "WEBP": lambda: encode(picture(), "WEBP"),
    "WEBP, alpha": lambda: encode(picture("RGBA"), "WEBP", lossless=True),
    "WEBP, animated": lambda: frames("WEBP"),
    "GIF": lambda: encode(picture(), "GIF"),
    "GIF, animated": lambda: frames("GIF"),
    "GIF, transparent": lambda: encode(picture().quantize(8), "GIF", transparency=2),
    "BMP": lambda: encode(picture(), "BMP"),
    "BMP, palette": lambda: encode(picture().quantize(8), "BMP"),
    "TIFF": lambda: encode(picture(), "TIFF"),
    "TIFF, LZW": lambda: encode(picture(), "TIFF", compression="tiff_lzw"),
    "TIFF, JPEG inside": lambda: encode(picture(), "TIFF", compression="jpeg"),
    "TIFF, CMYK": lambda: encode(picture("CMYK"), "TIFF"),
    "TIFF, 16 bit": lambda: encode(Image.fromarray(np.full((5, 7), 300, np.uint16)), "TIFF"),
    "TIFF, numbers": lambda: encode(Image.fromarray(np.full((5, 7), 99.5, np.float32)), "TIFF"),
    "TIFF, pages": lambda: frames("TIFF"),
    "AVIF": lambda: encode(picture(), "AVIF"),
    "AVIF, alpha": lambda: encode(picture("RGBA"), "AVIF"),
}
NOT_DECODED: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "0 bytes": (lambda: b"", None),
    "text": (lambda: b"404: this image is gone", "a text"),
    "random bytes": (lambda: np.random.default_rng(0).bytes(999), None),
    "JPEG, truncated": (lambda: encode(picture(), "JPEG")[:-150], None),
    "PNG, truncated": (lambda: encode(picture(), "PNG")[:-150], None),
    "WEBP, truncated": (lambda: encode(picture(), "WEBP")[:-50], None),
    "GIF, truncated": (lambda: encode(picture(), "GIF")[:-150], None),
    "BMP, truncated": (lambda: encode(picture(), "BMP")[:-150], None),
    "TIFF, truncated": (
        lambda: encode(picture(), "TIFF", compression="tiff_lzw")[:-350],
        None,
    ),
    "AVIF, truncated": (lambda: encode(picture(), "AVIF")[:-150], None),
    "EPS": (lambda: encode(picture(), "EPS"), "an EPS file"),
    "PDF": (lambda: encode(picture(), "PDF"), "a PDF file"),
    "JPEG 2000": (lambda: encode(picture(), "JPEG2000"), "a JPEG 2000 image"),
    "ICO": (lambda: encode(picture(width=64, height=64), "ICO"), "an icon (ICO)"),
    "PPM": (lambda: encode(picture(), "PPM"), "a PNM image"),
    "HEIC": (
        lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99,
        "a HEIC image",
    ),
    "HEIC, mif1": (
        lambda: b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 99,
        "a HEIC image",
    ),
    "MP4": (lambda: b"\0\0\0\x18ftypisom\0\0\0\0isomavc1" + b"\0" * 99, "a video"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG image"),
    "SVG with a declaration": (
        lambda: b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- by hand -->\n<svg width="1"></svg>',
        "an SVG image",
    ),
    "a web page": (
        lambda: b"<!DOCTYPE html>\n<html><svg></svg>404 Not Found</html>",
        "a web page",
    ),
    "JSON": (lambda: b'{"error": "gone"}', "JSON"),
    "Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a pointer of Git LFS in the place of the file",
    ),
}
