"""Tables of numbers as files: CSV for people, parquet and JSON for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from siftclip.files import write_json
from siftclip.writing import atomic_path


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as PATH.csv, PATH.parquet and PATH.json, each atomically.

    JSON is a list of objects, one per row. What has no value is an empty cell, a null.

    Args:
        path: of the files, without a suffix.
        frame: of numbers, truth values and texts.
    """
    with atomic_path(path.with_name(f"{path.name}.csv")) as temporary:
        frame.to_csv(temporary, index=False)
    with atomic_path(path.with_name(f"{path.name}.parquet")) as temporary:
        _of_one_kind(frame).to_parquet(temporary, index=False)
    records = [
        {str(name): _plain(value) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]
    write_json(path.with_name(f"{path.name}.json"), records)


def _of_one_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """Make the values of each column one kind, as parquet wants them: numbers, or else texts."""
    columns = {str(name): values for name, values in frame.items()}
    for name, values in columns.items():
        if values.dtype != object:
            continue
        plain = [_plain(value) for value in values]
        kinds = {type(value) for value in plain if value is not None}
        if kinds <= {int, float}:
            columns[name] = pd.Series(plain, dtype=np.float64)
        elif len(kinds) > 1:
            columns[name] = pd.Series([None if each is None else str(each) for each in plain])
        else:
            columns[name] = pd.Series(plain, dtype=object)
    return pd.DataFrame(columns)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: None for NaN and infinity, Python's numbers, else texts."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
