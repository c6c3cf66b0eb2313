from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.redaction import printable
from siftclip.tables import (
    LEAST_WIDTH,
    WIDTH,
    cut,
    display_width,
    ruled_table,
    spreadsheet_safe,
    table_width,
    text_table,
    wrapped,
    write_csv_records,
    write_csv_rows,
)


def test_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert table_width() == WIDTH  # no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert table_width() == 80
    monkeypatch.setenv("COLUMNS", "10")
    assert table_width() == LEAST_WIDTH
    monkeypatch.setenv("COLUMNS", "1000")
    assert table_width() == WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    lines = text_table(("a", "b"), [("x" * 90, "y" * 68)])
    assert display_width(lines[1]) == 12 + 2 + 68  # names are never cut to nothing
    assert max(map(len, wrapped("word " * 50))) <= 72


@given(st.text())
def test_printable_text_cannot_move_the_cursor(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert text != shown or text.isprintable()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größer 狗", "größer 狗"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\r", "a\\nb\\r"),
        ("\u202eevil", "\\u202eevil"),  # turns the direction
        ("half \udce9", "half \\udce9"),  # a folder's name that is not UTF-8
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-cat", "'-cat"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("  =1", "  '=1"),
        ("\t=1", "\t'=1"),
        ("\r\n=1", "\r\n'=1"),
        ("\ufeff=1", "\ufeff'=1"),
        ("\uff1d1", "'\uff1d1"),
        ("dog;=1", "dog;'=1"),  # where a semicolon ends a cell
        ("dog\n-1", "dog\n'-1"),
        ("a=b", "a=b"),
        ("blue-green", "blue-green"),
        ("me@home", "me@home"),
        ("", ""),
    ],
)
def test_formulas_are_defused(text: str, safe: str) -> None:
    assert spreadsheet_safe(text) == safe


def test_csv_round_trip(tmp_path: Path) -> None:
    records = [
        {"name": 'a "quoted", 狗\nname', "count": 3, "share": 0.1 + 0.2, "part": None},
        {"name": "=1+1", "count": None, "share": float("nan"), "part": None},
        {"name": "half \udce9", "count": 2**40, "share": 1.0, "part": None},
    ]
    path = tmp_path / "made" / "table.csv"
    write_csv_records(path, records)
    read = pd.read_csv(path, dtype={"count": "Int64"})
    assert read["name"].tolist() == ['a "quoted", 狗\nname', "'=1+1", "half \\udce9"]
    assert read["count"].tolist() == [3, pd.NA, 2**40]
    assert "3.0" not in path.read_text()
    assert "nan" not in path.read_text().lower()
    assert read["share"][0] == 0.1 + 0.2
    assert read["share"].isna().tolist() == [False, True, False]
    assert read["part"].isna().all()
    assert list(tmp_path.rglob("*.*")) == [path]  # no temporary file is left


def test_names_of_columns_are_defused_and_may_be_equal(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv_rows(path, ["=x", "crane", "crane"], [[1, None, 3.0]])
    assert path.read_text() == "'=x,crane,crane\n1,,3.0\n"


def test_tables_are_aligned() -> None:
    lines = text_table(
        ("task", "n", "text"), ["Pets", ("狗", "5", "a"), ("cat\n", "1,000", "b")], right=(1,)
    )
    assert lines == [
        "task         n  text",
        "Pets",
        "  狗         5  a",
        "  cat\\n  1,000  b",
    ]
    assert text_table(("task", "n"), [], least=(6, 3), right=(1,)) == ["task      n"]


def test_ruled_tables_are_as_wide_as_their_cells() -> None:
    rows = [("arm", "value"), ("狗" * 60, "0.1"), ("a\nb", "-")]
    assert ruled_table(rows).splitlines() == [
        f"arm{' ' * 117}  value",
        f"{'-' * 120}  -----",
        f"{'狗' * 60}    0.1",
        f"a\\nb{' ' * 116}      -",
    ]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("狗", 2),
        ("a\u0301", 1),
        ("ก\u0e35", 1),  # Thai vowels stand above
        ("שָ", 1),
        ("👩\u200d👧", 2),  # joined into one
        ("⚀", 1),
    ],
)
def test_columns_of_a_terminal(text: str, columns: int) -> None:
    assert display_width(text) == columns


names = st.text(max_size=150) | st.sampled_from(["狗" * 80, "a\u0301" * 90, "x" * 300])


@given(st.lists(names, min_size=1, max_size=4))
def test_no_table_is_wider_than_the_terminal(texts: list[str]) -> None:
    lines = text_table(
        ("task", "value"), [*texts, *((text, "0.1234") for text in texts)], right=(1,)
    )
    assert len(lines) == 1 + 2 * len(texts)
    assert max(map(display_width, lines)) <= WIDTH
    assert all(line.endswith("0.1234") for line in lines[-len(texts) :])


@given(names, st.integers(min_value=3, max_value=60))
def test_what_is_cut_keeps_both_ends(text: str, width: int) -> None:
    shown = cut(printable(text), width)
    assert display_width(shown) <= width
    if display_width(printable(text)) <= width:
        assert shown == printable(text)
    else:
        start, _, end = shown.partition("...")
        assert printable(text).startswith(start)
        assert printable(text).endswith(end)


def test_long_lines_are_wrapped_between_words() -> None:
    path = "/data/" + "x" * 120
    lines = wrapped(f"failed: fmow-wild: {path} is\x07 damaged " + "word-word " * 30)
    assert path in lines[1]
    assert all(line.startswith("  ") for line in lines[1:])
    assert all(len(line) <= WIDTH for line in lines if path not in line)
    assert "is\\x07" in " ".join(lines)
    assert "word- " not in " ".join(lines)
