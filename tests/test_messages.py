"""What the three lower floors say makes sense in plain Python: it names no option of a command.

Options are told by the trainer, which knows the configuration, see `siftclip.trainer.build`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from siftclip.trainer.settings.read_command import groups, top_level

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("selectors", "datamodules", "eval")
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))

# Every name at the top of a command's configuration, such as selector and pool.
NODES = sorted(
    {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    | {"hydra", *groups(), *top_level()}
)
OPTION = re.compile(rf"(?<![\w./])(?:{'|'.join(map(re.escape, NODES))})\.[a-z_]+")
# `word=word`, as on a command line; a value that is put in (`{}`) is of Python, too
ASSIGNMENT = re.compile(r"(?<![\w.&?-])[a-z_][\w.]*=[\w\[.]")

# Texts that look like options and are none.
ALLOWED = {
    "compact.json": "the name of a file",
    "features.json": "the name of a file",
    "reused %s of %s (%s); reuse=false computes again": "of this name in Python and on the line",
    "model.text.": "a prefix of names of weights, for torch",
    "bytes={}-{}": "a header of HTTP",
}


def texts(source: str) -> Iterator[tuple[int, str]]:
    """The string literals of a module but docstrings, with `{}` for each value of an f-string."""
    tree = ast.parse(source)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            if isinstance(first, ast.Expr):
                skipped.add(id(first.value))
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}"
                    for part in node.values
                ),
            )
            skipped.update(map(id, node.values))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            yield node.lineno, node.value


def faults(source: str) -> list[str]:
    """The texts of a module that speak of options."""
    return [
        f"line {line}: {text!r}"
        for line, text in texts(source)
        if text not in ALLOWED and (OPTION.search(text) or ASSIGNMENT.search(text))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_message_of_the_lower_floors_names_an_option(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        'raise InputError("selector.fraction must be in (0, 1].")',
        'raise InputError(f"pool.root={root!r} is no folder.")',
        'hint = "use" f" online.schedule.{name}"',
        'log.info("reused; reuse=false computes again")',
        'say("Take eval.tasks=[a]")',
        'say("model=open_clip")',
    ],
)
def test_the_search_finds_options(source: str) -> None:
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""selector.fraction of a docstring."""',
        'say(f"fraction must be in (0, 1]. Got fraction={fraction!r}.")',
        'say("a subclass of siftclip.selectors.core.base.Selector")',
        'say("they belong to another model. Take the same.")',
        "call(seed=0)",
    ],
)
def test_the_search_passes_what_is_no_option(source: str) -> None:
    assert not faults(source)


def test_what_is_allowed_is_still_there() -> None:
    there = {text for path in FILES for _, text in texts(path.read_text(encoding="utf-8"))}
    assert set(ALLOWED) <= there
