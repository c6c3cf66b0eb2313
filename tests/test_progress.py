"""Progress is a bar at a terminal, and plain lines anywhere else."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from siftclip import progress
from siftclip.progress import (
    ConsoleHandler,
    Lines,
    amount,
    draws_bars,
    duration,
    hide_foreign_bars,
    pace,
    show_progress,
    track,
)


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr("siftclip.progress.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    set_stderr(monkeypatch, stream)
    return stream


def set_stderr(patch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    """Set standard error for our module alone: pytest has its own use for that of Python."""
    patch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))


def test_a_line_every_thirty_seconds(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "siftclip")
    with show_progress(total=2000, label="embed", unit="sample") as lines:
        for _ in range(100):
            clock[0] += 1
            lines.update(10)
    assert [record.getMessage() for record in caplog.records] == [
        "embed: 300 of 2,000 samples, 10 samples/s, 0:02:50 left",
        "embed: 600 of 2,000 samples, 10 samples/s, 0:02:20 left",
        "embed: 900 of 2,000 samples, 10 samples/s, 0:01:50 left",
    ]


def test_a_line_counts_from_what_was_done_before(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "siftclip")
    lines = show_progress(total=9e9, label="compact", unit="B", initial=3e9)
    lines.set_postfix_str("12 tars")
    clock[0] += 40
    lines.update(2e9)
    (record,) = caplog.records
    assert record.getMessage() == "compact: 5.0 of 9.0 GB, 50 MB/s, 0:01:20 left, 12 tars"


def test_what_is_short_says_nothing(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "siftclip")
    assert list(track(range(5), total=5, label="x", unit="tar")) == [0, 1, 2, 3, 4]
    assert not caplog.records


def test_other_ranks_say_nothing(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "siftclip")
    quiet = [show_progress(total=2, label="x", unit="tar", speaks=False)]
    monkeypatch.setenv("LOCAL_RANK", "1")
    quiet.append(show_progress(total=2, label="x", unit="tar"))
    for lines in quiet:
        clock[0] += 31
        lines.update()
    assert not caplog.records


def test_a_terminal_gets_a_bar_that_leaves_nothing(terminal: Terminal) -> None:
    with show_progress(total=3, label="index", unit="tar") as bar:
        bar.update()
    drawn = terminal.getvalue()
    assert "\rindex:" in drawn
    assert drawn.endswith("\r")


def test_without_a_bar_a_terminal_gets_lines(terminal: Terminal) -> None:
    assert isinstance(show_progress(total=3, label="x", unit="tar", bar=False), Lines)
    assert terminal.getvalue() == ""


def test_a_terminal_without_a_cursor_gets_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draws_bars()
    monkeypatch.setenv("TERM", "dumb")
    assert not draws_bars()


def test_without_standard_error_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        set_stderr(monkeypatch, stream)
        assert not draws_bars()


def test_a_notebook_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    set_stderr(monkeypatch, stream())
    assert draws_bars()


def test_bars_of_other_libraries_are_hidden_in_a_log() -> None:
    code = (
        "from siftclip.progress import hide_foreign_bars; hide_foreign_bars()\n"
        "from tqdm import tqdm; list(tqdm(range(3)))\n"
        "from tqdm.auto import tqdm; list(tqdm(range(3)))\n"
        "from huggingface_hub.utils import tqdm; list(tqdm(range(3)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    shown = subprocess.run(  # what the test would not see if nothing ever drew
        [sys.executable, "-c", code.partition("\n")[2]], capture_output=True, text=True, check=True
    )
    assert shown.stderr.count("100%") == 3


def test_foreign_bars_stay_at_a_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    hide_foreign_bars()
    assert "TQDM_DISABLE" not in os.environ


def record(level: int) -> logging.LogRecord:
    return logging.LogRecord("siftclip", level, "", 0, "reused", None, None)


def test_a_log_line_does_not_break_a_bar(terminal: Terminal) -> None:
    with tqdm(total=2, desc="train", file=terminal, ncols=40) as bar:
        bar.update()
        ConsoleHandler(terminal).emit(record(logging.INFO))
    before, after = terminal.getvalue().split("reused\n")
    assert before.endswith(" \r")  # the bar is wiped
    assert after.startswith("\rtrain")  # and drawn again below the line


def test_one_rank_informs_and_all_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ConsoleHandler(stream).emit(record(logging.INFO))
        ConsoleHandler(stream).emit(record(logging.WARNING))
    assert stream.getvalue() == "reused\n" * 3


def test_words() -> None:
    assert amount(1500, 2500, "B") == "1.5 of 2.5 kB"
    assert pace(0.25, 10, "run") == "0.25 runs/s, 0:00:40 left"
    assert pace(0, 10, "run") == "0 runs/s"
    assert (amount(1500, None, "sample"), pace(20, None, "sample")) == (
        "1,500 samples",
        "20 samples/s",
    )
    assert amount(2.5e6, None, "B") == "2.5 MB"
    assert pace(5e6, 1e9, "B") == "5 MB/s, 0:03:20 left"
    assert duration(3 * 86_400 + 3661) == "3 d 1:01:01"
    assert progress.LINE_SECONDS == 30
