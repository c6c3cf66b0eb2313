"""docs/pools.md: its table of images is that of the tests, and its programs run."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from strange_images import DECODED, NOT_DECODED

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader

GUIDE = (Path(__file__).parents[3] / "docs" / "pools.md").read_text(encoding="utf-8")

# A row of the table, by how it begins, and the cases that stand for it; without: tests of their own
ROWS: dict[str, list[str]] = {
    "JPEG: baseline": ["JPEG", "JPEG, progressive", "JPEG, arithmetic", "JPEG, grey"],
    "JPEG of CMYK": ["JPEG, CMYK", "JPEG, RGB inside"],
    "MPO": ["MPO"],
    "EXIF rotation": ["JPEG, EXIF rotation"],
    "ICC profile": [
        "JPEG, wrong ICC profile",
        "JPEG, profile that is none",
        "PNG, wrong ICC profile",
    ],
    "bytes behind": ["JPEG, trailing garbage", "PNG, trailing garbage"],
    "PNG of 1 bit": ["PNG", "PNG, 1 bit", "PNG, grey", "PNG, palette"],
    "grey PNG of 16 bits": ["PNG, 16 bit, dark", "PNG, 16 bit"],
    "coloured PNG of 16 bits": ["PNG, 16 bit in colour"],
    "alpha": [
        *("PNG, LA", "PNG, RGBA", "WEBP, alpha", "AVIF, alpha", "GIF, transparent"),
        *("PNG, palette, transparency", "PNG, palette, one colour transparent"),
    ],
    "APNG": ["APNG", "GIF, animated", "WEBP, animated", "TIFF, pages"],
    "GIF, BMP, TIFF, AVIF": [
        *("GIF", "BMP", "BMP, palette", "TIFF", "TIFF, LZW", "TIFF, JPEG inside", "TIFF, CMYK"),
        *("AVIF", "WEBP"),
    ],
    "TIFF of 16 bits": ["TIFF, 16 bit", "TIFF, numbers"],
    "1 x 1": ["JPEG, 1 x 1", "PNG, 1 x 1"],
    "more pixels than": [],
    "1 x 100,000": [],
    "0 bytes": [
        *("0 bytes", "random bytes", "text"),
        *(f"{kind}, truncated" for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")),
    ],
    "JPEG 2000": ["JPEG 2000", "ICO", "PPM"],
    "EPS": ["EPS"],
    "HEIC": ["HEIC", "HEIC, mif1", "SVG", "SVG with a declaration", "PDF"],
    "a web page": ["a web page", "JSON", "Git LFS", "MP4"],
}


def test_each_row_of_the_table_is_a_test() -> None:
    table = GUIDE[GUIDE.index("| image | Siftclip |") :].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert len(rows) == len(ROWS)
    for row, begins in zip(rows, ROWS, strict=True):
        assert row.startswith(begins)
    cases = [case for cases in ROWS.values() for case in cases]
    assert sorted(cases) == sorted([*DECODED, *NOT_DECODED])


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)
    return str(found)


def image(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def captions_of(folder: Path) -> list[str]:
    pool = Pool(folder, max_bad_fraction=0, progress=False)
    reader = SampleReader(pool=pool, max_image_pixels=100)
    assert [reader.read_image(row).getpixel((0, 0)) for row in range(len(pool))] == [
        (row, 0, 0) for row in range(len(pool))
    ]
    return [reader.read_caption(row) for row in range(len(pool))]


def test_captions_are_taken_from_the_json(
    tmp_path: Path, write_tar: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = []
    for number in range(3):
        members.append((f"{number}.jpg", image(number)))
        members.append((f"{number}.json", b'{"caption": "number %d"}' % number))
    write_tar(tmp_path / "pool" / "0.tar", members)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["bash", "-ec", block("bash")], check=True, cwd=tmp_path)
    assert captions_of(tmp_path / "new") == ["number 0", "number 1", "number 2"]


def test_parquet_becomes_tars(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": image(n), "path": None}, "text": f"number {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    (tmp_path / "new").mkdir()
    (tmp_path / "program.py").write_text(block("python"))
    command = [sys.executable, "program.py", "new", "train-0.parquet"]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert captions_of(tmp_path / "new") == ["number 0", "number 1", "number 2"]
