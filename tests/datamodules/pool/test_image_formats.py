"""Images as strangers have them: open_clip's pixels, or a bad sample whose cause is named.

The rows of the table "What an image may be" in docs/pools.md.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg, _convert_to_rgb, image_transform_v2
from PIL import Image
from strange_images import DECODED, NOT_DECODED, encode, picture, png_of
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
UNDECODABLE = "whose image cannot be decoded"


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
        (out,) = images.empty_batch(1, prepared, finished=True)
        images.put(prepared, out)
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
