"""A tiny task of the kind that `siftclip new task` writes, which can be evaluated at once."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from siftclip.files import write_tar, write_text

_SIDE_PIXELS = 64
_DOT_PIXELS = 12
_MOST_DOTS = 4


def write_example_task(kind: str, folder: Path) -> tuple[Path, ...]:
    """Write a task with images of 1 to 4 dots, and labels such as {"thing": "dots", "count": 3}.

    Args:
        kind: its name, for `dataset_type.txt`.
        folder: of the task.

    Returns:
        The files.
    """
    texts = {"dataset_type.txt": kind, "test/nshards.txt": "1"}  # one tar
    for name, text in texts.items():
        write_text(folder / name, f"{text}\n")
    write_tar(folder / "test" / "0.tar", _members())
    return tuple(folder / name for name in (*texts, "test/0.tar"))


def _members() -> Iterator[tuple[str, bytes]]:
    """Yield an image and its label for each number of dots."""
    for count in range(1, _MOST_DOTS + 1):
        yield f"s{count}.png", _draw_dots(count)
        yield f"s{count}.json", json.dumps({"thing": "dots", "count": count}).encode()


def _draw_dots(count: int) -> bytes:
    """Draw dots in a row, as a PNG."""
    image = Image.new("RGB", (_SIDE_PIXELS, _SIDE_PIXELS), "white")
    draw = ImageDraw.Draw(image)
    for number in range(count):
        left, top = number * _SIDE_PIXELS // _MOST_DOTS, (_SIDE_PIXELS - _DOT_PIXELS) // 2
        draw.ellipse((left, top, left + _DOT_PIXELS, top + _DOT_PIXELS), fill="black")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
