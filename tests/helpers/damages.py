"""What a full disk, a power cut, a copy or a person may leave under the name of a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _cut(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def _folder(path: Path, content: bytes) -> None:
    path.mkdir()
    (path / "a file").write_bytes(content)


def _loop(path: Path, content: bytes) -> None:
    path.symlink_to(path.name)


DAMAGES: dict[str, Callable[[Path, bytes], Any]] = {
    "empty": lambda path, content: path.touch(),
    "cut": _cut,
    "zeros": lambda path, content: path.write_bytes(bytes(len(content))),
    "list": lambda path, content: path.write_bytes(b"[1]\n"),
    "folder": _folder,
    "pipe": lambda path, content: os.mkfifo(path),
    "loop": _loop,
}
