"""How a command ends when it does not end well: one line on the terminal, and an exit status.

    0    done
    1    an internal error: a fault of Siftclip or of a library, with a log of it
    2    a fault of the input, or of what it is run on
    130  Ctrl-C (SIGINT)
    143  SIGTERM
    129  SIGHUP

Python callers get the exceptions themselves.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn

from siftclip.errors import InputError
from siftclip.first_rank import is_first_rank
from siftclip.reading import in_one_line, reason_of
from siftclip.writing import WriteError

if TYPE_CHECKING:
    from siftclip.trainer.runtime.launch import TrainingStopped

INTERNAL = 1
FAILURE = 2
INTERRUPTED = 128 + signal.SIGINT

FULL_ERROR = "HYDRA_FULL_ERROR"  # if 1, nothing here takes the place of an exception

# Options that say where something is written
_OUTPUTS = (
    *("output_dir", "run_dir", "pool.cache_dir", "features.root", "eval.cache_dir"),
    *("target.folder", "compact.output", "diff.output", "download.folder", "export.path"),
    "subset_export.path",
)
# Files, beside which temporary ones and locks are written
_FILES = ("export.path", "diff.output", "subset_export.path")
_CACHE_OPTION = "pool.cache_dir"
# What the operating system says of a name, and not of a machine that fails
_OF_NAMES = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    *(errno.EACCES, errno.EPERM),
)
# Parameters of the lower floors, which know no options, and what these are called
_OF_POOL = re.compile(r"(?<![\w.])(max_bad_fraction|max_caption_bytes)(?!\w)")
_LONGEST = 500  # characters of an exception's text
_LOOP = "Symlink loop from"  # what pathlib says of links that lead in a circle


def end(message: str, status: int) -> NoReturn:
    """Print why the command ends, if there is something to say, and end it."""
    if message:
        print(message, file=sys.stderr, flush=True)
    if "SUBMITIT_EXECUTOR" in os.environ:
        from hydra.errors import CompactHydraException

        # Its jobs tell the command that waits for them of exceptions only, and Hydra prints this
        # kind without a traceback.
        raise CompactHydraException(message) from None
    raise SystemExit(status) from None


def end_faulty(command: str, fault: str, *, quiet: bool = False) -> NoReturn:
    """End the process for a fault of the user; with `quiet` the first rank alone says it."""
    quiet = quiet and not is_first_rank(os.environ)
    end("" if quiet else f"siftclip {command}: error: {fault}", FAILURE)


def end_internal(command: str, error: BaseException, folder: Path | None) -> NoReturn:
    """End the process for an exception that nobody foresaw. Its traceback goes into a log.

    Args:
        command: as it is typed; "" if it is not known.
        error: as it was caught.
        folder: for the log, if it is there.
    """
    # Here, since its imports take a moment, which a command that ends well need not cost.
    from siftclip.trainer.runtime.fault_log import write_fault_log

    log = write_fault_log(error, folder)
    name = f"siftclip {command}".strip()
    at = f"log {log}" if log else f"traceback, which {FULL_ERROR}=1 in front of the command shows"
    if is_of_another_rank(error):
        end(
            f"{name}: error: another rank has ended, whose own message says why, or was waited for "
            f"longer than trainer.timeout_minutes. {describe(error)} ({at})",
            INTERNAL,
        )
    if is_of_the_machine(error):
        end(f"{name}: error: {describe(error)} ({at})", INTERNAL)
    end(f"{name}: internal error: {describe(error)} Please report it with the {at}", INTERNAL)


def fault_of_path(error: BaseException, config: Any) -> str | None:
    """Say what is wrong with a file that somebody has named; None for an exception of another kind.

    Args:
        error: as it was caught.
        config: the configuration, as plain values.
    """
    if isinstance(error, RuntimeError) and str(error).startswith(_LOOP):
        return f"{error}."
    if not isinstance(error, OSError) or not error.filename:
        return None
    name = os.fsdecode(error.filename)
    places = {
        option: place
        for option, place in _places(config)
        if _holds(place, Path(name)) or place in PurePath(name).parts
    }
    longest = max(places, key=lambda option: len(places[option]), default=None)
    if error.errno not in _OF_NAMES and not (longest and error.errno == errno.ENOENT):
        return None
    given = f" It comes from {longest}." if longest else ""
    return f"{reprlib.repr(name)} cannot be opened: {reason_of(error)}.{given}"


def is_of_the_machine(error: BaseException) -> bool:
    """Tell whether an exception says what the machine lacks, and not what the code does wrong."""
    return isinstance(error, OSError | MemoryError) or type(error).__name__ == "OutOfMemoryError"


def is_of_another_rank(error: BaseException) -> bool:
    """Tell whether an exchange with other ranks has failed, for which this one is not to blame."""
    of_torch = {"DistBackendError", "DistNetworkError"}  # of NCCL, and of the store
    return type(error).__name__ in of_torch or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def describe(error: BaseException) -> str:
    """Describe an exception as one sentence in one line."""
    text = in_one_line(error)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    sentence = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def end_stopped(command: str, stop: TrainingStopped) -> NoReturn:
    """End the process as the signal would have done, which also ends a comparison or a sweep."""
    from siftclip.trainer.runtime.launch import STOPS, find_launch
    from siftclip.trainer.runtime.run_dir import is_rank_zero  # imports torch, as all that trains

    by_submitit = stop.signal not in STOPS
    if not is_rank_zero():
        # Lightning's own launcher kills rank 0 when another rank fails, and submitit's rank 0 has
        # to queue the job again.
        raise SystemExit(0 if by_submitit or find_launch(os.environ) is None else stop.exit_status)
    message = f"siftclip {command}: {stop}"
    if by_submitit:
        print(message, file=sys.stderr, flush=True)
        signal.raise_signal(stop.signal)  # its handler queues the job again, and exits
    end(message, stop.exit_status)


def follows_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C led to an exception: a second one may break off a file of torch."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def end_interrupted(command: str, error: BaseException) -> NoReturn:
    """End the process after Ctrl-C, or as it was going to end.

    Lightning turns an interrupt during training into sys.exit(1).
    """
    if not follows_interrupt(error):
        raise error
    if is_first_rank(os.environ):
        print(f"\nsiftclip {command}: interrupted; the same command continues.", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


# ---- what cannot be written ---------------------------------------------------------------------
def message_of(error: InputError, config: Any) -> str:
    """Return the message of an error, with the option that names the folder, where it is of one.

    Args:
        error: as it was caught.
        config: the configuration, as plain values.
    """
    if not isinstance(error, WriteError):
        return _OF_POOL.sub(r"pool.\1", str(error))
    option = option_of(error.path, config)
    return error.told_with(option)


def option_of(path: Path, config: Any) -> str:
    """Find what names the folder of a path: "output_dir=FOLDER"; "" if nothing does."""
    places = dict(_places(config))
    places |= {name: os.path.dirname(places[name]) or "." for name in _FILES if name in places}
    found = [name for name in _OUTPUTS if _holds(places.get(name), path)]
    if found:
        name = max(found, key=lambda name: len(os.path.abspath(places[name])))
        return f"{name}=FOLDER{'/NAME' if name in _FILES else ''}"
    if _holds(places.get("pool.root"), path) or Path.home() / ".cache" / "siftclip" in path.parents:
        return f"{_CACHE_OPTION}=FOLDER"
    return "TMPDIR=FOLDER in front of the command" if _is_temporary(path) else ""


def _places(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in node.items() if isinstance(node, Mapping) else ():
        if isinstance(value, str):
            yield f"{prefix}{name}", value
        yield from _places(value, f"{prefix}{name}.")


def _holds(place: str | None, path: Path) -> bool:
    """Tell whether a path is a place or below it; one that leads elsewhere by links is, too."""
    if not place or "://" in place:
        return False
    own = (os.path.abspath(path), os.path.realpath(path))
    of_place = (os.path.abspath(place), os.path.realpath(place))
    return any(inner == outer or inner.startswith(f"{outer}{os.sep}")
               for inner, outer in zip(own, of_place, strict=True))  # fmt: skip


def _is_temporary(path: Path) -> bool:
    import tempfile

    try:
        return Path(tempfile.gettempdir()) in path.parents
    except OSError:  # there is none that can be written
        return True
