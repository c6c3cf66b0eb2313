"""What Ctrl-C and SIGTERM do to a command: one line and an end, at any moment.

Python's own answer to Ctrl-C is an exception, which an import of a large library turns into
another one or prints as a traceback. So a command that imports, begins or ends leaves at once.
While it works, Ctrl-C is the exception as ever, so that temporary files and locks are cleaned up,
and SIGTERM ends the process without asking Python, which may wait for another rank.

`siftclip/__init__.py` calls this before anything else is imported: only what Python itself starts
with is imported here. `signal`, for one, takes 10 ms, in which Python's own answer would hold.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the built-in part of `signal`
import itertools
import os
import sys

from siftclip.first_rank import is_first_rank

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

_MODULE = "siftclip.trainer.cli"
_SCRIPT = "siftclip"
_IMPORT = "<frozen importlib._bootstrap>"
_INT, _TERM = int(_signal.SIGINT), int(_signal.SIGTERM)
_WORDS = {_INT: "interrupted", _TERM: "terminated"}

_process = 0  # that answers
_works = False


def answer_if_command() -> None:
    """Answer signals from now on, if this process was started as a command of Siftclip."""
    words = sys.orig_argv[1:]
    of_module = any(pair == ("-m", _MODULE) for pair in itertools.pairwise(words))
    if of_module or any(word.rpartition("/")[2] == _SCRIPT for word in words[:1]):
        answer()


def answer() -> None:
    """Answer signals from now on. Those that whoever started the command ignores stay ignored."""
    global _process
    if _process == os.getpid():
        return
    _process = os.getpid()
    for number in _WORDS:
        if _signal.getsignal(number) in (_signal.SIG_DFL, _signal.default_int_handler):
            _signal.signal(number, _leave)
    sys.unraisablehook = _leave_or_say


def begin_work() -> None:
    """Say that the command itself works from here on."""
    _set_works(True)


def end_work() -> None:
    """Say that the command has done its work."""
    _set_works(False)


def _set_works(works: bool) -> None:
    global _works
    before, after = (_leave, _signal.SIG_DFL) if works else (_signal.SIG_DFL, _leave)
    if _process == os.getpid() and _signal.getsignal(_TERM) == before:
        _signal.signal(_TERM, after)
    _works = works


def _leave(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _process:  # a forked process, which has inherited this
        _as_python_does(number)
    elif _works and number == _INT and not _imports(frame):
        raise KeyboardInterrupt
    else:
        _end(number)


def _as_python_does(number: int) -> None:
    if number == _INT:
        raise KeyboardInterrupt
    _signal.signal(number, _signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _imports(frame: FrameType | None) -> bool:
    """Tell whether a module is being imported: many cannot be interrupted by an exception."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False


def _end(number: int) -> None:
    if is_first_rank(os.environ):
        try:  # noqa: SIM105 - contextlib is not imported yet
            os.write(2, f"\nsiftclip{_command()}: {_WORDS[number]}\n".encode())
        except OSError:  # nobody reads it
            pass
    os._exit(128 + number)


def _command() -> str:
    """Return the command, as it was typed, with a blank in front of it."""
    words = sys.argv[1:3]
    plain = [word for word in words if word.isalpha()]
    return f" {plain[0]}" if plain[:1] == words[:1] and plain else ""


def _leave_or_say(fault: Any) -> None:
    """End the process for an interrupt that Python would print and forget, as in a destructor."""
    if os.getpid() == _process and fault.exc_type is KeyboardInterrupt:
        _end(_INT)
    sys.__unraisablehook__(fault)
