"""Says what commands have imported: each runs in a process forked from this one, which is small.

Reads from its input a JSON list of cases, each `{"words": [...], "cwd": FOLDER}`. Words are those
of `siftclip`, or `import` and names of modules. The answers are a list of
`{"status": ..., "printed": ..., "modules": [...]}`. The modules that the command line names are
imported once before all of them, to save their time.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_words(words: list[str]) -> None:
    """Do what `siftclip *words` or the import of modules does."""
    if words[0] == "import":
        for name in words[1:]:
            importlib.import_module(name)
        return
    sys.argv = ["siftclip", *words]
    main = importlib.import_module("siftclip.trainer.cli.main").main
    main()


def run_case(case: dict[str, Any], folder: Path) -> None:
    """In a child: run the case, leave what it prints and its modules in files, and end."""
    with (folder / "printed").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(case["cwd"])
    try:
        run_words(case["words"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "modules").write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")
    os._exit(status)


def main() -> None:
    """Run all cases one after the other."""
    gc.disable()  # looking for garbage takes a fifth of imports
    for module in sys.argv[1:]:
        importlib.import_module(module)
    answers = []
    for case in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            child = os.fork()
            if child == 0:
                run_case(case, folder)
            _, status = os.waitpid(child, 0)
            answers.append(
                {
                    "status": os.waitstatus_to_exitcode(status),
                    "printed": (folder / "printed").read_text(encoding="utf-8"),
                    "modules": json.loads((folder / "modules").read_text(encoding="utf-8")),
                }
            )
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
