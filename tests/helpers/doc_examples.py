"""Examples of the documentation, for tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def python_blocks(page: str) -> list[str]:
    """Return the Python blocks of a page in docs, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def bash_commands(page: str) -> list[list[str]]:
    """Return the commands of the bash blocks of a page in docs, split into words."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_code(code: str, names: dict[str, Any]) -> None:
    """Run Python code that may use the names, and adds to them."""
    exec(code, names)  # noqa: S102 - from our own documentation
