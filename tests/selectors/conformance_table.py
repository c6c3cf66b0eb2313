"""The table of docs/conformance.md about the authors' outputs, from what the tests have found.

    rm -f found.jsonl
    SIFTCLIP_CONFORMANCE_RECORD=found.jsonl python -m pytest tests/selectors -m testbed
    python tests/selectors/conformance_table.py found.jsonl

Without the variable, the tests check that the table has the row of each case. Differences are
given by the power of ten that they stay below. Last bits of sums differ from machine to machine,
see `tells_the_same`; how far scores and kept rows may differ is bounded by the tests themselves.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

HEADER = (
    "| case | scores differ by less than | kept | Jaccard | note |",
    "|---|---|---|---|---|",
)


def conformance_row(record: dict[str, Any]) -> str:
    """A row of the table: case, power of ten above the largest difference, kept rows, Jaccard."""
    difference = record.get("largest_difference")
    if difference is None:
        bound = "-"
    elif difference == 0:
        bound = "equal"
    else:
        bound = f"1e{max(-6, math.ceil(math.log10(difference)))}"
    kept, jaccard = record.get("kept", "-"), record.get("jaccard")
    similarity = "-" if jaccard is None else f"{jaccard:.4g}"
    return f"| {record['case']} | {bound} | {kept} | {similarity} | {record['note']} |"


def tells_the_same(documented: str, row: str) -> bool:
    """Whether two rows agree but for what the last bits of sums decide, hence the CPU.

    That is the next power of ten, where "equal" counts as 1e-6; the numbers in a note, such as how
    many near ties changed places; and a near tie in a thousand at the cut.
    """
    theirs, ours = ([cell.strip() for cell in line.split("|")] for line in (documented, row))
    if len(theirs) != len(ours) or (theirs[1], theirs[3]) != (ours[1], ours[3]):
        return False
    powers, shares = (
        (theirs[i].replace("equal", "1e-6"), ours[i].replace("equal", "1e-6")) for i in (2, 4)
    )
    notes = {re.sub(r"\d+", "N", cells[5]) for cells in (theirs, ours)}
    return (
        len(notes) == 1
        and (len(set(powers)) == 1 or abs(math.log10(float(powers[0]) / float(powers[1]))) < 1.5)
        and (len(set(shares)) == 1 or abs(float(shares[0]) - float(shares[1])) <= 1e-3)
    )


def main() -> None:
    """Print the table of a file of records."""
    lines = Path(sys.argv[1]).read_text().splitlines()
    rows = dict.fromkeys(conformance_row(json.loads(line)) for line in lines)
    print("\n".join([*HEADER, *sorted(rows)]))


if __name__ == "__main__":
    main()
