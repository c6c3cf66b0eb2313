"""Records in JSON that have another shape are one line with the place, the rule and the value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import NotRequired, TypedDict

from siftclip.errors import InputError
from siftclip.records import Count, Number, Text, checked, read_record


class Inner(TypedDict):
    counts: dict[Text, Count]


class Outer(TypedDict):
    name: Text
    inner: Inner
    values: list[Number]
    later: NotRequired[bool]


RIGHT: dict[str, Any] = {"name": "a", "inner": {"counts": {"x": 1}}, "values": [1, 2.5]}


def test_what_fits_is_returned_as_it_is() -> None:
    record = {**RIGHT, "added by a later version": [1]}
    assert checked(record, Outer, owner="a.json") is record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, r"a\.json: name must be a text\. Got 3\."),
        ({"name": "\ud800"}, r"a\.json: name must be text of whole characters"),
        ({"inner": []}, r"a\.json: inner must be an object\. Got \[\]\."),
        ({"inner": {}}, r"a\.json lacks 'inner\.counts'\."),
        ({"inner": {"counts": {"x": -1}}}, r"inner\.counts\.x must be greater than or equal to 0"),
        ({"inner": {"counts": {"x": True}}}, r"inner\.counts\.x must be a whole number\. Got True"),
        ({"inner": {"counts": {"x": 1.0}}}, r"inner\.counts\.x must be a whole number\. Got 1\.0"),
        ({"inner": {"counts": {"x": 10**400}}}, r"counts\.x must be less than or equal to"),
        ({"values": [1, math.nan]}, r"values\.1 must be finite, and at most 1e100\. Got nan"),
        ({"values": [math.inf]}, r"values\.0 must be finite, and at most 1e100\. Got inf"),
        ({"values": "x" * 1000}, r"values must be a list\. Got 'x+\.\.\.x+'\.$"),
        ({"later": 1}, r"later must be true or false\. Got 1\."),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked({**RIGHT, **changes}, Outer, owner="a.json")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RIGHT))
    assert read_record(path, Outer) == RIGHT
    for text in ("[]", "3", "null", "{", "[" * 100_000, '{"name": 1, "name": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"a\.json .*\. Delete it\.$"):
            read_record(path, Outer, way_out="Delete it.")
