"""Tables as files: CSV, parquet and JSON have the same numbers, to the bit."""

from __future__ import annotations

import json
import math
from csv import DictReader
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from siftclip.trainer.compare.frames import write_frame

CELLS: dict[str, st.SearchStrategy[Any]] = {
    "number": st.floats(allow_infinity=False),
    "count": st.integers(-(2**53), 2**53),
    "text": st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1),
    "gap": st.none() | st.integers(0, 9) | st.floats(0, 1),
    "note": st.none() | st.text("ab<>|", min_size=1),
    "truth": st.booleans(),
    "mixed": st.none() | st.booleans() | st.sampled_from(["x", 3, 0.5]),
    "nothing": st.none(),
}


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


@given(st.lists(st.fixed_dictionaries(CELLS), min_size=1, max_size=5))
def test_all_three_hold_the_same(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("frames")
    frame = pd.DataFrame(rows)
    write_frame(folder / "table", frame)
    assert {path.name for path in folder.iterdir()} == {
        f"table.{s}" for s in ("csv", "json", "parquet")
    }
    records = json.loads((folder / "table.json").read_text())
    parquet = pd.read_parquet(folder / "table.parquet").to_dict("records")
    for wanted, record, other in zip(rows, records, parquet, strict=True):
        assert list(record) == list(other) == list(frame.columns)
        for name, value in wanted.items():
            if missing(value):
                assert record[name] is None
                assert missing(other[name])
            elif name == "mixed":  # one kind in parquet: numbers, truth values or texts
                assert record[name] == value
                assert other[name] in (value, str(value))
            else:
                assert record[name] == other[name] == value
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        cells = [row["number"] for row in DictReader(file)]
    assert [None if not cell else float(cell) for cell in cells] == [
        None if missing(row["number"]) else row["number"] for row in rows
    ]


def test_what_is_no_number_and_no_text_is_written_as_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [{"b": 1}, float("inf")], "c": [np.float32(0.5), np.int64(2)]})
    write_frame(tmp_path / "more" / "table", frame)
    first, second = json.loads((tmp_path / "more" / "table.json").read_text())
    assert first == {"a": "{'b': 1}", "c": 0.5}
    assert second == {"a": None, "c": 2}
    write_frame(tmp_path / "empty", pd.DataFrame())
    assert json.loads((tmp_path / "empty.json").read_text()) == []
    assert pd.read_parquet(tmp_path / "empty.parquet").empty
