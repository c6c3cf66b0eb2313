"""Output of a command in which nothing secret stands, and nothing that a terminal obeys.

Names of samples, captions and other people's messages are printed in many places, and by packages
that know nothing of Siftclip. What all of them print passes through here.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from siftclip.redaction import printable, redact, shown

# What bars are drawn with: a colour, another line, what is behind the cursor deleted
_OF_BARS = r"\x1b\[(?:[0-9;]*m|[0-9]*[ABK]|\?25[lh])"
_LAYOUT = re.compile(r"([\n\r\t])")
_LAYOUT_OR_BAR = re.compile(rf"([\n\r\t]|{_OF_BARS})")


class SafeOutput:
    """A text stream in front of another one, see above. A terminal may get colours and bars."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._kept = _LAYOUT_OR_BAR if stream.isatty() else _LAYOUT

    def write(self, text: str) -> int:
        """Write a text as it may be shown."""
        # every second part is one of those that stay
        parts = self._kept.split(redact(text))
        parts[::2] = map(printable, parts[::2])
        self._stream.write("".join(parts))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_output() -> Iterator[None]:
    """Let all that Python prints in the block pass through `SafeOutput`."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(SafeOutput, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def print_safely(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an exception that nothing has caught, as Python does, see `sys.excepthook`."""
    print(shown("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


class SafeFormatter(logging.Formatter):
    """Formats records of logs without what a terminal obeys; see `configs/siftclip.yaml`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return shown(super().format(record))
