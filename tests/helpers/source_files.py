"""The source of Siftclip, parsed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("selectors", "datamodules", "eval", "trainer")
MODES = set("rwaxbt+|:gz")  # of opening a file


def sources(*, but: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the name and the tree of each file, but of one, and of templates of packages."""
    paths = [*(ROOT / "src" / "siftclip").glob("*.py")]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        if name != but and "/templates/" not in name:
            yield name, ast.parse(path.read_text(encoding="utf-8"))
