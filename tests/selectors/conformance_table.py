"""The table of docs/conformance.md about the authors' outputs, from what the tests have found.

    rm -f found.jsonl
    SIFTCLIP_CONFORMANCE_RECORD=found.jsonl python -m pytest tests/selectors -m testbed
    python tests/selectors/conformance_table.py found.jsonl

Without the variable, the tests check that the table has the row of each case. Differences are
given by the power of ten that they stay below, so that the last bits of a sum may differ from
machine to machine.
"""

from __future__ import annotations

import json
import math
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


def main() -> None:
    """Print the table of a file of records."""
    lines = Path(sys.argv[1]).read_text().splitlines()
    rows = dict.fromkeys(conformance_row(json.loads(line)) for line in lines)
    print("\n".join([*HEADER, *sorted(rows)]))


if __name__ == "__main__":
    main()
