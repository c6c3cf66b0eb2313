"""No number of an option can make a command hang or fill the memory before it says a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from siftclip.cores import memory_bytes
from siftclip.errors import InputError, ParameterError, require_int
from siftclip.selectors import ClipScore, NegCLIPLoss, NormSimD
from siftclip.trainer.runtime.launch import resolve_devices
from siftclip.trainer.runtime.memory import require_room_for_batch
from siftclip.trainer.settings.commands import COMMANDS
from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.data import ScaleSettings
from siftclip.trainer.settings.evaluation import ProbeSettings
from siftclip.trainer.settings.fields.rules import alternatives, faults, hints, words

# Checked elsewhere, since they need to know more
LATER = {"trainer.devices", "trainer.num_nodes", "compare.seeds", "scale.samples_seen"}


def numbers(kind_of_number: type) -> Iterator[tuple[str, Any]]:
    """Yield each option that takes integers, or floats, with its annotation."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, hint in hints(kind).items():
            option = f"{prefix}{name}"
            for part in alternatives(hint):
                inner = [*alternatives(get_args(part.plain)[0])] if part.origin is tuple else [part]
                if part.is_group and hasattr(part.plain, "PLACE"):
                    yield from walk(part.plain, f"{part.plain.PLACE or name}.")
                elif any(one.plain is kind_of_number for one in inner):
                    yield option, hint

    for kind in COMMANDS.values():
        yield from walk(kind, "")


OPTIONS = {option: hint for option, hint in numbers(int) if option not in LATER}


def test_there_are_options() -> None:
    assert len(OPTIONS) > 35


@pytest.mark.parametrize("option", OPTIONS)
def test_numbers_that_would_overflow_are_refused(option: str) -> None:
    hint = OPTIONS[option]
    for value in (2**63, [2**63], -1):
        assert next(faults(hint, value, option), None) is not None, value


FLOATS = dict(numbers(float))


def test_whole_numbers_that_no_float_can_hold_are_refused() -> None:
    assert len(FLOATS) > 30
    for option, hint in FLOATS.items():
        for value in (10**400, [10**400]):
            (found,) = list(faults(hint, value, option))[:1]
            assert str(found).startswith(option)
    for parameters in ({"fraction": 10**400}, {"threshold": 10**400}):
        with pytest.raises(InputError, match=f"{next(iter(parameters))} must be a"):
            ClipScore(**parameters)


def test_the_message_says_the_bound_and_no_list_does() -> None:
    with pytest.raises(InputError, match=r"^scale\.global_batch_size must be at most 4,194,304\."):
        ScaleSettings(samples_seen=10, global_batch_size=99_999_999)
    with pytest.raises(InputError, match=r"must be at most 4,294,967,295, each\. Got \[0, 429"):
        ProbeSettings(seeds=(0, 2**32))
    with pytest.raises(InputError, match="an integer of at least 0"):
        CommonSettings(seed=-1)
    assert words(hints(CommonSettings)["seed"]) == "an integer of at least 0"


@pytest.mark.parametrize("value", [2**31, 2**63, "99999999"])
def test_devices_that_would_start_processes_without_end(value: int | str) -> None:
    with pytest.raises(InputError, match=r"trainer\.devices must be at most 1,024"):
        resolve_devices(value, 1, {})
    with pytest.raises(InputError, match=r"trainer\.num_nodes must be at most 100,000"):
        resolve_devices(1, int(value), {})


def test_a_batch_must_fit_into_the_memory() -> None:
    side = 224
    fitting = memory_bytes() // (3 * 4 * side * side)
    require_room_for_batch(fitting, world_size=1, image_size=side)
    require_room_for_batch(4 * fitting, world_size=4, image_size=(side, side))
    with pytest.raises(InputError, match=r"images of 224 x 224 pixels .* need .* GB, and this"):
        require_room_for_batch(fitting + 1, world_size=1, image_size=side)


def test_selectors_do_not_loop_without_end() -> None:
    with pytest.raises(ParameterError, match=r"^NegCLIPLoss: passes must be at most 10,000\."):
        NegCLIPLoss(fraction=0.3, passes=10**6)
    with pytest.raises(ParameterError, match=r"steps must be at most 1,000,000\. Got 2147483648"):
        NormSimD(fraction=0.3, steps=2**31, seed=0)
    assert require_int("a", 3, minimum=1, maximum=3) == 3
