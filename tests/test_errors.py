"""What errors of parameters carry and say, and how calls by name are checked."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from siftclip.errors import (
    InputError,
    ParameterError,
    call_by_name,
    name_of,
    parameters_of,
    require_fraction,
)
from siftclip.selectors.methods.vas import Vas


class Base:
    def __init__(self, *, size: int, colour: str = "red") -> None:
        self.size, self.colour = size, colour


class Child(Base):
    def __init__(self, *, seed: int, **rest: Any) -> None:
        super().__init__(**rest)
        self.seed = seed


class Open:
    def __init__(self, **anything: Any) -> None:
        self.anything = anything


def test_an_error_carries_what_it_says() -> None:
    owner = Open()
    error = ParameterError(
        "must be one of a, b", owner=owner, parameter="mode", value="c", way_out="Take a."
    )
    assert isinstance(error, InputError)
    assert str(error) == "Open: mode must be one of a, b. Got 'c'. Take a."
    assert error.told_as("selector.mode") == "selector.mode must be one of a, b. Got 'c'. Take a."
    assert (error.owner, error.parameter, error.value) == (owner, "mode", "c")
    assert (error.rule, error.way_out) == ("must be one of a, b", "Take a.")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"parameter": "mode"}, "mode must be set."),
        ({"parameter": "mode", "value": None}, "mode must be set. Got None."),
        ({"parameter": "mode", "got": "null"}, "mode must be set. Got null."),
        ({"owner": Vas}, "Vas must be set."),
        ({"owner": "Vas", "parameter": "target"}, "Vas: target must be set."),
        ({"owner": require_fraction, "parameter": "x"}, "require_fraction: x must be set."),
    ],
)
def test_parts_may_be_left_out(parts: dict[str, Any], message: str) -> None:
    assert str(ParameterError("must be set", **parts)) == message


def test_an_error_goes_to_another_process_without_its_owner() -> None:
    error = ParameterError("must be set", owner=Open(), parameter="x", value=lambda: 0, got="a")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(again), str(again)) == (ParameterError, str(error))
    assert again.owner == "Open"


def test_a_checked_value_names_its_owner() -> None:
    with pytest.raises(ParameterError, match=r"^fraction must be a number .* Got 2\.$"):
        require_fraction("fraction", 2)
    with pytest.raises(ParameterError, match=r"^Child: fraction must be a number .* Got 2\.$"):
        require_fraction("fraction", 2, owner=Child(seed=0, size=1))


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        (Base, {"size": 1, "color": 2}, r"^Base: color is not .* of Base\. Did you mean colour\?$"),
        (Base, {"size": 1, "x": 2}, r"^Base: x is not .* Its parameters are size, colour\.$"),
        (Base, {"colour": "blue"}, r"^Base: size must be given: Base needs it\.$"),
        (Child, {"seed": 0, "size": 1, "color": 2}, r"^Child: color is .* Did you mean colour\?$"),
        (Child, {"size": 1}, r"^Child: seed must be given"),
        (name_of, {"owners": 1}, r"^name_of: owners is not .* Did you mean owner\?$"),
    ],
)
def test_wrong_names_are_told(target: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        call_by_name(target, given)


def test_calls_with_right_names_are_made() -> None:
    assert call_by_name(Child, {"seed": 0, "size": 1, "colour": "blue"}).colour == "blue"
    assert call_by_name(Open, {"x": 1}).anything == {"x": 1}
    assert call_by_name(dict, {"x": 1}) == {"x": 1}  # which is written in C
    assert call_by_name(Base, {"size": 1}, through=lambda **given: given) == {"size": 1}  # type: ignore[arg-type,return-value,comparison-overlap]
    with pytest.raises(TypeError, match="of its own"):
        call_by_name(_fails, {"size": 1})


def _fails(size: int) -> None:
    raise TypeError("of its own")


def test_parameters_are_those_of_the_base_class_too() -> None:
    assert parameters_of(Child) == ("seed", "size", "colour")
    assert parameters_of(Base) == ("size", "colour")
    assert parameters_of(Open) == ()
    assert {"fraction", "threshold", "rule", "of"} <= set(parameters_of(Vas))


def test_of_a_line_of_thousands_of_characters_the_middle_is_left_out() -> None:
    """Whatever a file or a server says is quoted to its end, and the way out stays."""
    long = "x" * 10**6
    error = InputError(f"begin {long} end.\nsecond line")
    assert str(error).startswith("begin xxx")
    assert str(error).endswith("xxx end.\nsecond line")
    assert "998,111 characters left out" in str(error)
    fault = ParameterError("must be short", parameter="name", value=long, way_out="Cut it.")
    assert len(str(fault)) < 2200
    assert str(fault).endswith("'. Cut it.")
    assert str(copy.copy(fault)) == str(fault)
    assert str(InputError("y" * 2000)) == "y" * 2000
