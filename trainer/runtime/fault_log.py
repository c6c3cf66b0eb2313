"""The log of a fault that Siftclip does not know: what the terminal is spared."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from datetime import datetime
from itertools import takewhile
from pathlib import Path

import siftclip
from siftclip.redaction import shown
from siftclip.writing import WriteError, writing_to


def write_fault_log(error: BaseException, folder: Path | None) -> Path | None:
    """Write the traceback of an error to a new file; None if it cannot be written anywhere.

    Args:
        error: as it was caught.
        folder: where to; where that is not possible, the folder for temporary files.
    """
    name = f"siftclip-fault-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    text = shown(_text_of(error))
    for place in (folder, Path(tempfile.gettempdir())):
        if place is None:
            continue
        path = place / name
        try:
            with writing_to(path):
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except WriteError:
            continue
        return path
    return None


def _text_of(error: BaseException) -> str:
    """Tell an error with what it takes to look into it: neither the environment nor any value."""
    words = takewhile(lambda word: "=" not in word and "://" not in word, sys.argv[1:])
    options = sorted(word.partition("=")[0] for word in sys.argv[1:] if "=" in word)
    torch = sys.modules.get("torch")
    lines = [
        f"siftclip {siftclip.__version__}, Python {platform.python_version()}, "
        f"torch {getattr(torch, '__version__', 'not imported')}, {platform.platform()}",
        f"command: siftclip {' '.join(words)}",
        f"options: {' '.join(options)}",
        "",
        *traceback.format_exception(error),
    ]
    return "\n".join(lines)
