"""`siftclip explain OPTION`: meaning, type, default and allowed values of an option."""

from __future__ import annotations

import sys

from siftclip.trainer.settings.describing.explain import explain, nearest, overview

FAILURE = 2  # exit status for faults of the user's input


def main() -> None:
    """Explain the options that are named."""
    names = [word for word in sys.argv[2:] if word not in ("-h", "--help")]
    if not names:
        print(overview())
        return
    for number, name in enumerate(names):
        text = explain(name.lstrip("+~").partition("=")[0])
        if text is None:
            close = nearest(name)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            print(f"siftclip explain: error: {name} is not an option.{hint}", file=sys.stderr)
            raise SystemExit(FAILURE)
        print("\n" * (number > 0) + text)
