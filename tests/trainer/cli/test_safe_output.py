"""What is printed cannot move a cursor, and parts of paths stay where they belong."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.datamodules.index.faults import FaultLog
from siftclip.errors import InputError
from siftclip.redaction import remember
from siftclip.trainer.cli.safe_output import SafeOutput, print_safely, safe_output

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\u202ec\x9bd\x00"
SHOWN = "a\\x1b[2J\\x1b]0;title\\x07b\\u202ec\\x9bd\\x00"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_a_terminal_obeys_is_shown(stream: io.StringIO) -> None:
    print(f"{HOSTILE}\tè 漢\r\n", file=SafeOutput(stream), end="")
    assert stream.getvalue() == f"{SHOWN}\tè 漢\r\n"


def test_bars_are_for_terminals() -> None:
    file, terminal, bar = io.StringIO(), Terminal(), "\x1b[A\x1b[1;31m50 %\x1b[0m\x1b[K"
    SafeOutput(file).write(bar)
    SafeOutput(terminal).write(bar)
    assert "\x1b" not in file.getvalue()
    assert terminal.getvalue() == bar


def test_streams_come_back_and_exceptions_are_printed_safely(
    capsys: pytest.CaptureFixture[str],
) -> None:
    remember("of-a-header")
    before = sys.stdout, sys.stderr
    with safe_output():
        print("of-a-header http://u:p@host/")
    assert (sys.stdout, sys.stderr) == before
    try:
        raise KeyError(HOSTILE + "of-a-header")
    except KeyError as error:
        print_safely(type(error), error, error.__traceback__)
    printed = capsys.readouterr()
    assert printed.out == "*** http://***@host/\n"
    assert "Traceback" in printed.err
    assert "of-a-header" not in printed.out + printed.err
    assert all(line.isprintable() for line in printed.err.split("\n"))


def test_names_of_strangers_in_counts_of_faults() -> None:
    faults = FaultLog()
    faults.add("without caption", f"0.tar:{HOSTILE}")
    assert faults.summary() == f"1 without caption (such as 0.tar:{SHOWN})"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("compare", "compare.name"),
        ("train", "features.name"),
        ("select", "selector.name"),
        ("target", "target.split"),
        ("eval", "eval.probe.train_split"),
    ],
)
@pytest.mark.parametrize("value", ["../../x", "/tmp/x", "a/../../b", ".", '"a\\u001b[2J"'])
def test_a_part_of_a_path_stays_in_its_folder(
    compose: Callable[..., Any], base: list[str], command: str, option: str, value: str
) -> None:
    value = value.replace("\\u001b", "\x1b")
    needs = ["target.root=x"] if command == "target" else []
    with pytest.raises(
        InputError, match=rf"{option} must be a name(,| that a folder can have,) with"
    ):
        compose(command, [*base, *needs, f"{option}={value}"])


def test_names_with_folders_inside_are_names(compose: Callable[..., Any], base: list[str]) -> None:
    settings = compose("compare", [*base, "compare.name=team/v1..2", "eval.root=x"])
    assert Path(settings.compare.name) == Path("team/v1..2")
