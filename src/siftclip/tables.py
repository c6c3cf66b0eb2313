"""Tables for terminals and spreadsheets, which names and captions of strangers cannot harm."""

from __future__ import annotations

import csv
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from wcwidth import wcswidth

from siftclip.redaction import printable
from siftclip.writing import atomic_path

WIDTH = 100  # columns of a terminal that a table takes at most
LEAST_WIDTH = 72  # also in narrower terminals
NARROW = 92  # below this, tables leave columns out
NOTHING = "-"  # a cell without a value
_NAMES_SHOWN = 12  # in a sentence
_NAME_WIDTH = 40  # there
_LEAST_NAME = 12  # columns of the first column, also where a table gets wider
_INDENT, _GAP, _CUT = "  ", "  ", "..."
# The start of what a spreadsheet may take for a cell, also where it splits at another separator
# than the comma, and then what makes it a formula; the wide forms of = + - @ do so too.
_FORMULA = re.compile(
    r"((?:^|[;,|\t\r\n])[\s\x00-\x1f\u200b\ufeff]*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])"
)


def table_width() -> int:
    """Return the columns a table may take: the terminal's, from `LEAST_WIDTH` to `WIDTH`."""
    if not sys.stdout.isatty():
        return WIDTH
    return max(LEAST_WIDTH, min(WIDTH, shutil.get_terminal_size().columns))


def spreadsheet_safe(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would run as a formula.

    A cell that begins with = + - or @ is one (OWASP, "CSV Injection").
    """
    return _FORMULA.sub(r"\1'", text)


def write_csv_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records of equal keys, at least one, by `write_csv_rows`."""
    write_csv_rows(path, list(records[0]), [list(record.values()) for record in records])


def write_csv_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV in UTF-8, atomically.

    Texts and names of columns are made safe for spreadsheets; None and NaN are empty cells. Not by
    pandas, which turns whole numbers beside empty cells into floats and mends equal names.

    Args:
        path: the file.
        header: names of the columns, which may be equal.
        rows: texts, Python's numbers, and None.
    """
    with (
        atomic_path(path) as temporary,
        # errors: a folder's name need not be valid Unicode
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([_csv_cell(cell) for cell in row] for row in (header, *rows))


def _csv_cell(cell: Any) -> Any:
    if isinstance(cell, str):
        return spreadsheet_safe(cell)
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str] | str],
    *,
    right: Collection[int] = (),
    least: Sequence[int] = (),
) -> list[str]:
    """Align columns to lines of at most `table_width`: the first is cut if they do not fit.

    Args:
        header: of the columns, at least one.
        rows: cells of any text, or one text as a heading of the rows below it.
        right: columns whose cells are aligned to the right.
        least: widths that the first columns have at least, so that tables can be aligned.

    Example:
        >>> from siftclip.tables import text_table
        >>> rows = ["two seeds", ["clip_score", "0.31"], ["random", "0.25"]]
        >>> for line in text_table(["selector", "acc1"], rows, right=[1]):
        ...     print(line)
        selector      acc1
        two seeds
          clip_score  0.31
          random      0.25
    """
    cells = [[printable(cell) for cell in row] for row in rows if not isinstance(row, str)]
    for row in cells:
        row[0] = _INDENT + row[0]
    widths = [max(map(display_width, column)) for column in zip(header, *cells, strict=True)]
    for column, minimum in enumerate(least):
        widths[column] = max(widths[column], minimum)
    width = table_width()
    rest = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], max(_LEAST_NAME, width - rest))
    # blanks of the heading make a column as wide as it has to be at least
    blanks = [" " * (w - display_width(name)) for name, w in zip(header, widths, strict=True)]
    wide = [
        blank + name if column in right else name + blank
        for column, (name, blank) in enumerate(zip(header, blanks, strict=True))
    ]
    for row in (wide, *cells):
        row[0] = cut(row[0], widths[0])
    first, *others = _aligned([wide, *cells], right)
    following = iter(others)
    return [
        first,
        *(
            cut(printable(line), width) if isinstance(line, str) else next(following)
            for line in rows
        ),
    ]


def ruled_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns as wide as their cells, with a rule below the first row.

    The first column is aligned to the left, the others to the right.

    Args:
        rows: cells of any text; the header first.

    Example:
        >>> from siftclip.tables import ruled_table
        >>> print(ruled_table([["selector", "acc1"], ["clip_score", "0.31"], ["random", "0.25"]]))
        selector    acc1
        ----------  ----
        clip_score  0.31
        random      0.25
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    rule = ["-" * max(map(display_width, column)) for column in zip(*cells, strict=True)]
    return "\n".join(_aligned([cells[0], rule, *cells[1:]], range(1, len(rule))))


def _aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    """Return the lines of a table of printable cells."""
    table = tabulate(
        rows,  # headings too: tabulate makes columns wider than theirs
        tablefmt="plain",
        disable_numparse=True,
        preserve_whitespace=True,
        colalign=["right" if column in right else "left" for column in range(len(rows[0]))],
    )
    return [line.rstrip() for line in table.splitlines()]


def display_width(text: str) -> int:
    """Count the terminal columns of a printable text: Chinese characters two, accents none."""
    return wcswidth(text)


def cut(text: str, width: int) -> str:
    """Cut a text to at most `width` columns, at least 3: dots stand for the middle.

    Names are told apart by both of their ends.

    Example:
        >>> from siftclip.tables import cut
        >>> cut("negclip_normsim_target_seed_17", 20)
        'negclip_n..._seed_17'
    """
    if display_width(text) <= width:
        return text
    start, end = len(text) // 2, len(text) // 2
    while display_width(text[:start] + _CUT + text[end:]) > width:
        if start > len(text) - end:
            start -= 1
        else:
            end += 1
    return text[:start] + _CUT + text[end:]


def listed(names: Sequence[str]) -> str:
    """List names in a sentence, long ones cut; of more than twelve, the number of the others."""
    shown = ", ".join(cut(printable(name), _NAME_WIDTH) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def wrapped(text: str) -> list[str]:
    """Wrap to lines of at most `table_width`, all but the first indented; no word is split.

    So a long path can still be copied.
    """
    return textwrap.wrap(
        printable(text),
        table_width(),
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
