"""The formats of images that are decoded.

A `.jpg` of a pool may hold whatever a server has sent. Pillow decides by the bytes, as in
open_clip, but only among formats that browsers and scanners use, whose decoders know from the
header alone how many pixels there will be and start no other program. So EPS, which Pillow hands to
Ghostscript, is never opened; nor are ICO and ICNS, which may hide a larger image, nor JPEG 2000,
which no server sends, as no browser shows it.
"""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

USUAL_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's names; pools are made of them
RARE_FORMATS = ("GIF", "BMP", "TIFF", "AVIF")  # decoded as well, and counted
_USUAL_BEGINNINGS = (b"\xff\xd8", b"\x89PNG", b"RIFF")
_PREFIX_BYTES = 16  # that Pillow looks at to tell formats apart


def is_usual(data: bytes) -> bool:
    """Return whether an image begins as JPEG, PNG and WEBP do."""
    return data.startswith(_USUAL_BEGINNINGS)


def formats_for(data: bytes) -> tuple[str, ...]:
    """Return the formats, by Pillow's names, among which it may choose for an image."""
    if is_usual(data):
        return USUAL_FORMATS
    Image.init()  # loads what is not there yet; an old Pillow has no AVIF
    return tuple(name for name in RARE_FORMATS if name in Image.OPEN)


def rare_format(data: bytes) -> str | None:
    """Return the format of a decoded image if it is none of the usual ones: Pillow's name."""
    if is_usual(data):
        return None
    prefix = data[:_PREFIX_BYTES]
    accepts = ((name, Image.OPEN[name][1]) for name in formats_for(data))
    return next((name for name, accept in accepts if accept and accept(prefix)), None)


def describe_formats(formats: Mapping[str, int], images: int) -> str:
    """Say how many of `images` that were decoded had a rare format.

    Example:
        >>> from siftclip.datamodules.pool.image_formats import describe_formats
        >>> describe_formats({"GIF": 2, "TIFF": 1}, 60)
        '3 of 60 images are no JPEG, PNG or WEBP: 2 GIF, 1 TIFF'
    """
    counted = sorted(formats.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {name}" for name, count in counted)
    return f"{sum(formats.values())} of {images} images are no JPEG, PNG or WEBP: {listed}"
