"""Groups of entry points: what is found, and what is said of what is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from siftclip.errors import InputError
from siftclip.plugins import PluginGroup, check_numbers, installed_points

MODULE = """
class Shape:
    def __init__(self, sides=4):
        self.sides = sides

def triangle():
    return Shape(3)
"""
GROUPS = """
[siftclip.shapes]
shape = made_shapes:Shape
triangle = made_shapes:triangle
dictionary = builtins:dict
[siftclip_of_others]
stranger = made_shapes:Shape
"""


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginGroup[object]:
    """A group of which a distribution is installed."""
    info = tmp_path / "shapes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shapes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(GROUPS)
    (tmp_path / "made_shapes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_shapes", raising=False)
    import made_shapes  # type: ignore[import-not-found]

    return PluginGroup(name="siftclip.shapes", base=made_shapes.Shape, public_name="siftclip.Shape")


def test_classes_and_functions_are_built(shapes: PluginGroup[object]) -> None:
    assert sorted(shapes.find()) == ["dictionary", "shape", "triangle"]
    assert vars(shapes.build("shape", {"sides": 5})) == {"sides": 5}
    assert vars(shapes.build("triangle", {})) == {"sides": 3}
    assert shapes.load_class("shape") is shapes.base


def test_what_is_no_class_of_the_kind_is_refused(shapes: PluginGroup[object]) -> None:
    message = r"The plug-in '{}' \(.*\) must be a subclass of siftclip\.Shape\."
    for name in ("triangle", "dictionary"):
        with pytest.raises(InputError, match=message.format(name)):
            shapes.load_class(name)
    with pytest.raises(InputError, match=message.format("dictionary")):
        shapes.build("dictionary", {})
    with pytest.raises(InputError, match=r"^Shape: colour is not a parameter of Shape"):
        shapes.build("shape", {"colour": "red"})


def test_names_that_are_not_there(shapes: PluginGroup[object]) -> None:
    with pytest.raises(InputError, match=r"plugin must be one of \['dictionary', 'shape', 'tri"):
        shapes.load_class("circle")
    empty = PluginGroup(name="siftclip.none", base=object, public_name="object")
    message = r"^plugin must be an entry point of the group 'siftclip\.none', and none is installed"
    with pytest.raises(InputError, match=message):
        empty.build("circle", {})


def test_points_of_all_groups_are_those_of_siftclip(shapes: PluginGroup[object]) -> None:
    points = list(installed_points())
    assert {"shape", "triangle", "clip_score"} <= {point.name for point in points}
    assert all(point.group.startswith("siftclip.") for point in points)
    assert "stranger" not in {point.name for point in points}


class Measured:
    """With annotations of all kinds."""

    def __init__(
        self, number: float | None = None, flag: bool = False, text: str = "", open: object = None
    ) -> None:
        self.given = (number, flag, text, open)


def unknown_hint(value: "Nowhere" = 0) -> None:  # type: ignore[name-defined]  # noqa: F821, UP037
    """With an annotation that nobody can read."""


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"number": "abc"}, r"^Measured: number must be a number\. Got 'abc'\."),
        ({"flag": "no"}, r"^Measured: flag must be true or false\. Got 'no'\."),
    ],
)
def test_text_for_a_number_is_refused(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_numbers(Measured, parameters)


def test_what_annotations_do_not_tell_is_taken() -> None:
    check_numbers(Measured, {"number": None, "flag": 1, "text": "a", "open": "b", "other": "c"})
    check_numbers(Measured, {"number": 1})
    check_numbers(unknown_hint, {"value": "text"})
