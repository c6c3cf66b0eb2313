"""Python examples of the documentation, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def python_blocks(page: str) -> list[str]:
    """Return the Python blocks of a page in docs, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_code(code: str, names: dict[str, Any]) -> None:
    """Run Python code that may use the names, and adds to them."""
    exec(code, names)  # noqa: S102 - from our own documentation
