"""What a file really is, by its first bytes, where it is not what its name says."""

from __future__ import annotations

import re

LOOKED_AT_BYTES = 1024  # of a file: before `<svg` or `<html` comments may stand
_TEXT = rb"(?:\xef\xbb\xbf)?\s*"  # what may stand before any text

# What servers, copies and mistakes put in the place of a tar or an image; the first that fits
_KINDS: tuple[tuple[bytes, str], ...] = (
    (rb"\0{512}", "zeros"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "an EPS file"),
    (rb"%PDF", "a PDF file"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image"),
    (rb"....ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)", "a HEIC image"),
    (rb"....ftyp(?!avi[fs])|\x1a\x45\xdf\xa3", "a video"),
    (rb"\0\0[\1\2]\0", "an icon (ICO)"),
    (rb"icns", "an icon (ICNS)"),
    (rb"8BPS", "a Photoshop file"),
    (rb"P[1-7]\s", "a PNM image"),
    (rb"\x1f\x8b", "compressed by gzip"),
    (rb"BZh", "compressed by bzip2"),
    (rb"\xfd7zXZ", "compressed by xz"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (rb"PK\x03\x04", "a zip file"),
    (rb"PAR1", "a parquet file"),
    (rb"version https://git-lfs", "a pointer of Git LFS in the place of the file"),
    (_TEXT + rb"(?:<!--.*?-->\s*)?<(?i:!doctype html|html|head|body)", "a web page"),
    (_TEXT + rb"<(?:[?!].*<)?svg\b", "an SVG image"),
    (_TEXT + rb"<\?xml", "an XML file"),
    (_TEXT + rb'[{\[]\s*["{\[]', "JSON"),
)
_PATTERNS = [(re.compile(pattern, re.DOTALL), name) for pattern, name in _KINDS]
_PLAIN_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{16,}\Z")


def describe_content(data: bytes) -> str | None:
    """Return what bytes are, to follow "it is", such as "a HEIC image"; None if unknown.

    Example:
        >>> from siftclip.datamodules.index.content import describe_content
        >>> describe_content(b"<!DOCTYPE html><html><title>404 Not Found</title></html>")
        'a web page'
    """
    beginning = data[:LOOKED_AT_BYTES]
    for pattern, name in _PATTERNS:
        if pattern.match(beginning):
            return name
    return "a text" if _PLAIN_TEXT.match(beginning) else None
