"""Declare that changed code of selectors answers as before: `make same-answers`.

    python tests/recording/same_answers.py
    python tests/recording/same_answers.py --changed siftclip.selectors.methods.vas

The table under which answers are kept then takes the text of now for that of before, and what users
have kept is reused. That is refused, and undone, where the recording of behaviour differs. With
`--changed MODULE`, the answers of a module, and of all that import it, are new ones instead.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import siftclip.selectors
from siftclip.datamodules.identity.code_identity import built_in_code
from siftclip.datamodules.identity.kept_code import TABLE, KeptCode, kept_code


def selector_modules() -> list[str]:
    """All modules of the selectors, imported."""
    package = siftclip.selectors
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    names = sorted(info.name for info in found if not info.ispkg)
    for name in names:
        importlib.import_module(name)
    return names


def declared(changed: list[str]) -> KeptCode:
    """The table in which the code of now answers as before, but for some modules."""
    table = kept_code().with_same_answers(built_in_code(selector_modules()))
    for module in changed:
        table = table.with_new_answers(module)
    return table


def main() -> None:
    """Write the table, and take it back where the recording differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--changed", nargs="*", default=[], metavar="MODULE")
    arguments = parser.parse_args()
    before = TABLE.read_bytes()
    declared(arguments.changed).write()
    if arguments.changed:
        print(f"{TABLE} is written. Now `make record`, and read the diff.")
        return
    tests = Path(__file__).with_name("test_recording.py")
    if subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)], check=False).returncode:
        TABLE.write_bytes(before)
        raise SystemExit("The recording differs, see above: nothing is declared.")


if __name__ == "__main__":
    main()
