"""Every test that the page of promises names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "promises.md"
FILES = re.compile(r"\[\w+\.py\]\((?P<path>[^)]+)\): (?P<tests>[^;|]+)")


def promised() -> list[tuple[str, str]]:
    """The file and the name of each test on the page."""
    return [
        (match["path"], name)
        for match in FILES.finditer(PAGE.read_text(encoding="utf-8"))
        for name in re.findall(r"`(test_\w+)`", match["tests"])
    ]


def nightly_by_name(path: Path) -> dict[str, bool]:
    """The tests of a file, and whether each is a nightly one."""
    functions = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return {
        function.name: any("nightly" in ast.unparse(mark) for mark in function.decorator_list)
        for function in functions
    }


def test_every_promise_has_its_test() -> None:
    found = promised()
    assert len(found) >= 35
    for path, name in found:
        assert name in nightly_by_name(DOCS / path), f"{path}: {name}"


def test_what_is_nightly_is_said_to_be() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for path, name in promised():
        assert nightly_by_name(DOCS / path)[name] == (f"*nightly* `{name}`" in page), name


def test_every_row_names_a_test_or_a_page() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    for row in rows:
        assert FILES.search(row) or "conformance.md" in row or row == "| promise | test |", row
