"""Progress: a bar at a terminal, plain lines in a log.

A log file has no cursor: what a bar draws again and again would fill it with one long line. There,
and where bars are switched off, a line of the logger `siftclip.progress` says every 30 seconds how
far the work is:

    INFO index: 3.2 of 9.1 GB, 210 MB/s, 0:00:28 left
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol, TypeVar

from siftclip.first_rank import is_first_rank

T = TypeVar("T")

LINE_SECONDS = 30.0
# Both are read when tqdm and huggingface_hub are imported
_NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

log = logging.getLogger(__name__)


class Progress(Protocol):
    """How far a piece of work is."""

    def update(self, n: float = 1) -> object:
        """Advance by `n` units."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set what stands behind the numbers."""

    def close(self) -> None:
        """End it."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Lines:
    """Logs a line every 30 seconds, none for what takes less time."""

    def __init__(self, *, total: float | None, label: str, unit: str, initial: float = 0) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.n = initial
        self._postfix = ""
        self._line_n, self._line_time = initial, time.monotonic()

    def update(self, n: float = 1) -> None:
        """Advance by `n` units; log a line if it is time."""
        self.n += n
        now = time.monotonic()
        if now - self._line_time >= LINE_SECONDS:
            rate = (self.n - self._line_n) / (now - self._line_time)
            self._line_n, self._line_time = self.n, now
            done = amount(self.n, self.total, self.unit)
            left = None if self.total is None else self.total - self.n
            parts = (done, pace(rate, left, self.unit), self._postfix)
            log.info("%s: %s", self.label, ", ".join(filter(None, parts)))

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set what the next lines end with."""
        self._postfix = s

    def close(self) -> None:
        """End it; there is nothing to clear."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Nothing(Lines):
    """Says nothing, as the ranks do that do not speak."""

    def __init__(self) -> None:
        super().__init__(total=0, label="", unit="")

    def update(self, n: float = 1) -> None:
        return None


def draws_bars() -> bool:
    """Return whether standard error can show a bar: a terminal with a cursor, or a notebook."""
    if type(sys.stderr).__module__.startswith("ipykernel"):
        return True
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def hide_foreign_bars() -> None:
    """Hide the bars of other libraries where ours are lines; call it before they are imported."""
    if not draws_bars():
        for name, value in _NO_BARS.items():
            os.environ.setdefault(name, value)


def show_progress(
    *,
    total: float | None,
    label: str,
    unit: str,
    bar: bool = True,
    speaks: bool = True,
    initial: float = 0,
    delay_seconds: float = 0.0,
) -> Progress:
    """Open a bar, or lines where no bar can be drawn. It is a context manager.

    Args:
        total: units of the whole work; None if nobody knows.
        label: what is done, one word.
        unit: of `total`, such as "sample"; "B" for bytes.
        bar: False logs lines at a terminal, too.
        speaks: False shows nothing at all; other ranks of a launch than the first never speak.
        initial: units that are done already.
        delay_seconds: a bar appears only after so long.
    """
    if not (speaks and is_first_rank(os.environ)):
        return _Nothing()
    if not (bar and draws_bars()):
        return Lines(total=total, label=label, unit=unit, initial=initial)
    from tqdm import tqdm

    drawn: tqdm[Any] = tqdm(
        desc=label,
        total=total,
        initial=initial,
        unit=unit if unit == "B" else f" {unit}s",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        delay=delay_seconds,
        file=sys.stderr,
    )
    return drawn


def track(
    items: Iterable[T], *, total: int, label: str, unit: str, bar: bool = True
) -> Iterator[T]:
    """Yield items, with progress that counts them; parameters as for `show_progress`."""
    with show_progress(total=total, label=label, unit=unit, bar=bar) as progress:
        for item in items:
            yield item
            progress.update()


def amount(n: float, total: float | None, unit: str) -> str:
    """Say how much is done, as "120 of 2,000 samples" or "3.2 of 9.1 GB"."""
    if unit != "B":
        return f"{n:,.0f} {unit}s" if total is None else f"{n:,.0f} of {total:,.0f} {unit}s"
    scale, name = _bytes_scale(n if total is None else total)
    of = "" if total is None else f" of {total / scale:.1f}"
    return f"{n / scale:.1f}{of} {name}"


def pace(rate: float, left: float | None, unit: str) -> str:
    """Say how fast it goes, in units a second, and how long what is left will take."""
    if unit == "B":
        scale, name = _bytes_scale(rate)
        speed = f"{rate / scale:.0f} {name}/s"
    else:
        speed = f"{rate:,.0f} {unit}s/s" if rate >= 10 else f"{rate:.2g} {unit}s/s"
    return f"{speed}, {duration(left / rate)} left" if left is not None and rate > 0 else speed


def duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds, and days where there are any."""
    days, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def _bytes_scale(size_bytes: float) -> tuple[float, str]:
    for scale, name in ((1e9, "GB"), (1e6, "MB")):
        if size_bytes >= scale:
            return scale, name
    return 1e3, "kB"


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes log records; a bar that is drawn on the same terminal makes room for them.

    What is merely informative comes from the first rank of a launch alone.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if record.levelno < logging.WARNING and not is_first_rank(os.environ):
            return
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None or not draws_bars():
            super().emit(record)
            return
        # without tqdm's lock: a process that is forked while another thread holds it would wait
        with tqdm.external_write_mode(file=self.stream, nolock=True):
            super().emit(record)
