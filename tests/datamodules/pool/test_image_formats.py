"""Images as strangers have them: open_clip's pixels, or a bad sample whose cause is named.

The rows of the table "What an image may be" in docs/pools.md.
"""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, _convert_to_rgb, image_transform_v2
from PIL import Image, ImageCms
from webdataset.autodecode import imagehandler

from siftclip.datamodules.index.content import describe_content
from siftclip.datamodules.pool import reader
from siftclip.datamodules.pool.image_formats import (
    RARE_FORMATS,
    describe_formats,
    rare_format,
)
from siftclip.datamodules.pool.reader import BadSampleError, decode_image, decode_pixels
from siftclip.datamodules.streaming.image_transform import ImageTransform

MAX_PIXELS = 10**6
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
UNDECODABLE = "whose image cannot be decoded"
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


def open_clips(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(_convert_to_rgb(Image.open(io.BytesIO(data))))


@pytest.fixture(params=["simplejpeg", "pillow"])
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pillow":
        monkeypatch.setattr(reader, "simplejpeg", None)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("name", DECODED)
def test_pixels_are_those_of_open_clip(name: str) -> None:
    data = DECODED[name]()
    expected = open_clips(data)
    assert np.array_equal(np.asarray(decode_image(data, MAX_PIXELS)), expected)
    assert np.array_equal(decode_pixels(data, MAX_PIXELS), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_its_pipeline = imagehandler("pilrgb")("sample.jpg", data)
    assert np.array_equal(np.asarray(in_its_pipeline), expected)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("name", DECODED)
def test_what_the_model_sees_is_that_of_open_clip(name: str) -> None:
    """To the bit, and with torch's resizing within one of 255."""
    data = DECODED[name]()
    transform: Any = image_transform_v2(PreprocessCfg(size=16), is_train=False)
    expected = transform(Image.fromarray(open_clips(data)))
    for resize, tolerance in (("pillow", 0.0), ("torch", 1.01 / 255 / 0.26)):
        images = ImageTransform(transform, resize)  # type: ignore[arg-type]
        prepared = images.prepare(images.decode(data, MAX_PIXELS))
        out = torch.empty(prepared.shape)
        images.finish(prepared, out)
        assert (out - expected).abs().max() <= tolerance


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("name", NOT_DECODED)
def test_cause_of_what_is_not_decoded_is_named(name: str) -> None:
    make, cause = NOT_DECODED[name]
    data = make()
    for decode in (decode_image, decode_pixels):
        with pytest.raises(BadSampleError) as caught:
            decode(data, MAX_PIXELS)  # type: ignore[operator]
        expected = UNDECODABLE if cause is None else f"{UNDECODABLE} (it is {cause})"
        assert str(caught.value) == expected


def test_no_decoder_starts_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where Pillow itself would: an EPS, also behind the beginning of another format."""
    import subprocess

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    for name in ("Popen", "run", "check_call", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    eps = encode(picture(), "EPS")
    for data in (eps, b"\xc5\xd0\xd3\xc6" + bytes(26) + eps):
        assert describe_content(data) == "an EPS file"
        with pytest.raises(BadSampleError, match=r"an EPS file"):
            decode_image(data, MAX_PIXELS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("AVIF", {})],
)
def test_limit_of_pixels_is_checked_in_every_format(kind: str, options: dict[str, Any]) -> None:
    data = encode(picture(width=64, height=50), kind, **options)
    for decode in (decode_image, decode_pixels):
        with pytest.raises(BadSampleError, match=r"^with more pixels than max_image_pixels$"):
            decode(data, 64 * 50 - 1)  # type: ignore[operator]
        decode(data, 64 * 50)  # type: ignore[operator]


def declared(kind: str, side: int) -> bytes:
    """A file of a few bytes that states side x side pixels."""
    size = struct.pack("<HH", side, side)
    if kind == "GIF":
        return b"GIF89a" + size + b"\0\0\0," + bytes(4) + size + b"\0\x02\x02D\x01\0;"
    if kind == "BMP":
        return (
            b"BM"
            + struct.pack("<IHHI", 58, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
        )
    return png_of(2, 8, np.zeros((1, 1, 3), np.uint8)).replace(
        struct.pack(">II", 1, 1), struct.pack(">II", side, side)
    )


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_decompression_bombs_are_refused_by_their_headers(kind: str) -> None:
    """65,000 x 65,000 pixels, or 12 GB: no memory is asked for them."""
    with pytest.raises(BadSampleError, match=r"^with more pixels than Pillow decodes$"):
        decode_image(declared(kind, 65_000), 178_956_970)
    with pytest.raises(BadSampleError, match=r"^with more pixels than max_image_pixels$"):
        decode_image(declared(kind, 13_000), 10**8)


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_long_images_are_trained_on_but_not_resized_as_a_whole(resize: Any) -> None:
    """1 x 100,000 pixels, whose shorter side would be made 224: 5 thousand million."""
    data = encode(picture(width=100_000, height=1), "PNG")
    whole = ImageTransform(image_transform_v2(PreprocessCfg(size=224), is_train=False), resize)
    with pytest.raises(BadSampleError, match=r"once its shorter side has 224"):
        whole.require_bounded(whole.decode(data, 10**8), 10**8)
    crops = ImageTransform(image_transform_v2(PreprocessCfg(size=224), is_train=True), resize)
    pixels = crops.decode(data, 10**8)
    crops.require_bounded(pixels, 10**8)
    assert crops.prepare(pixels).shape == (3, 224, 224)


def test_no_warnings_about_files_of_strangers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in DECODED.values():
            decode_image(make(), MAX_PIXELS)


def test_rare_formats_are_told_from_the_usual_ones() -> None:
    found = {name: rare_format(make()) for name, make in DECODED.items()}
    usual = ("JPEG", "MPO", "PNG", "APNG", "WEBP")
    for name, kind in found.items():
        first = name.partition(",")[0]
        assert kind == (None if first in usual else first)
    assert set(filter(None, found.values())) == set(RARE_FORMATS)
    counts = {"BMP": 1, "TIFF": 1, "GIF": 1}
    expected = "3 of 60 images are no JPEG, PNG or WEBP: 1 BMP, 1 GIF, 1 TIFF"
    assert describe_formats(counts, 60) == expected
