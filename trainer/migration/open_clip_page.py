"""The table of all flags in docs/open_clip.md."""

from __future__ import annotations

import sys
from pathlib import Path

from siftclip.files import write_text
from siftclip.reading import read_text
from siftclip.trainer.migration.open_clip_flags import GROUPS, Flag

_HEADING = "## All flags\n\n"


def with_tables(page: str) -> str:
    """Return the page with the tables of all flags behind its last heading."""
    before, heading, _ = page.partition(_HEADING)
    return f"{before}{heading}{flag_tables()}\n"


def flag_tables() -> str:
    """Write a table of Markdown for each group of flags."""
    return "\n\n".join(
        "\n".join(
            [
                f"### {title}",
                "",
                "| open_clip | here | notes |",
                "|---|---|---|",
                *(_row(flag) for flag in flags),
            ]
        )
        for title, flags in GROUPS.items()
    )


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in (flag.name, *flag.aliases))
    here = {"always": "always so", "missing": "missing", "other": "-"}.get(flag.kind, "")
    here = f"`{flag.ours.replace('{}', 'VALUE')}`" if flag.ours else here or "see the note"
    cells = (names, here, flag.note)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_text(place, with_tables(read_text(place)))
