"""`siftclip new KIND NAME [FOLDER]`: a package with a selector, a loss or a kind of task."""

from __future__ import annotations

import sys
from pathlib import Path

FAILURE = 2  # exit status for faults of the user's input
USAGE = """usage: siftclip new KIND NAME [FOLDER]

Writes a package that works unchanged, with a test of its contract:
  siftclip new selector caption_length
  siftclip new loss focal
  siftclip new task counting

FOLDER is NAME unless it is given."""


def main() -> None:
    """Write the package, and say what to do with it."""
    words = sys.argv[2:]
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return
    # Here, since importing it takes a moment, which `--help` need not cost.
    from siftclip.errors import InputError
    from siftclip.trainer.scaffold.packages import KINDS, write_package

    try:
        if len(words) not in (2, 3):
            raise InputError(f"A kind ({', '.join(KINDS)}) and a name are needed. {USAGE}")
        kind, name = words[:2]
        folder = Path(words[2] if len(words) == 3 else name)
        for path in write_package(kind, name, folder):
            print(f"written    {path}")
    except InputError as error:
        print(f"siftclip new: error: {error}", file=sys.stderr)
        raise SystemExit(FAILURE) from None
    print(
        f"\npip install -e '{folder}[dev]'\npytest {folder}\n{KINDS[kind].usage.format(name=name)}"
    )
