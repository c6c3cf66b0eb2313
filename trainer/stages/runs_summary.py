"""What `siftclip runs` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from siftclip.redaction import printable
from siftclip.tables import listed, text_table, wrapped
from siftclip.trainer.outputs.garbage import GARBAGE, LOSSES, GarbageItem, size_in_words
from siftclip.trainer.outputs.kinds import BY_FOLDER, KindName
from siftclip.trainer.outputs.making import made_by, state_of
from siftclip.trainer.outputs.references import Reference
from siftclip.trainer.outputs.removal import Removed
from siftclip.trainer.outputs.scan import Entry
from siftclip.trainer.stages.runs import GarbagePlan, Listing

_ONE_OF: Mapping[KindName, str] = {
    "runs": "run",
    "selections": "selection",
    "subsets": "subset",
    "reports": "report",
    "copies": "copy",
}
_SHOWN_PATHS = 3
_SHOWN_REFERENCES = 20


def describe_outputs(listing: Listing) -> str:
    """Return a table of what lies in the outputs."""
    rows: list[list[str] | str] = []
    kind = ""
    for entry in listing.entries:
        if entry.kind.name != kind:
            kind = entry.kind.name
            of_kind = [other for other in listing.entries if other.kind.name == kind]
            total = sum(other.size_bytes for other in of_kind)
            rows.append(f"{kind}: {len(of_kind)}, {size_in_words(total)}")
        uses = len(listing.references.to(entry.place))
        rows.append(
            [
                entry.name
                if entry.place.removesuffix(f"/{entry.name}") in BY_FOLDER
                else entry.place,
                size_in_words(entry.size_bytes),
                _when(entry).partition(" ")[0],
                state_of(entry),
                str(uses) if uses else "",
                made_by(entry),
            ]
        )
    header = ["name", "size", "written", "state", "uses", "made by"]
    lines = text_table(header, rows, right=[1, 4]) if rows else ["nothing of these kinds"]
    return "\n".join([*lines, *_others(listing), *_unreadable(listing)])


def _when(entry: Entry) -> str:
    return f"{datetime.fromtimestamp(entry.modified):%Y-%m-%d %H:%M}" if entry.files else "-"


def _others(listing: Listing) -> list[str]:
    """Say what is not Siftclip's."""
    lines = []
    for name, files in listing.outputs.others.items():
        size = size_in_words(sum(file.size_bytes for file in files))
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        lines.append(f"other      {printable(name)}: {count}, {size}; never removed")
    for entry in listing.entries:
        if entry.strangers:
            lines.append(
                f"other      in {printable(entry.place)}: {listed(entry.strangers)}; never removed"
            )
    return lines


def _unreadable(listing: Listing) -> list[str]:
    return [f"unreadable {printable(text)}" for text in listing.references.unreadable]


def describe_entry(listing: Listing) -> str:
    """Describe one entry: what made it, how large its parts are, what refers to it."""
    (entry,) = listing.entries
    references = listing.references
    lines = [
        f"{entry.kind.name.removesuffix('s') if entry.kind.name == 'runs' else entry.kind.name}"
        f"{'':<8}"[:11]
        + printable(str(entry.path)),
        f"made by    {made_by(entry)}",
        f"state      {state_of(entry)}",
        f"written    {_when(entry)}",
        f"size       {size_in_words(entry.size_bytes)}",
        *(
            f"           {size_in_words(size):>9}  {printable(name)}"
            for name, size in _parts(entry)
        ),
    ]
    for holder in entry.holders():
        lines.append(f"held       {holder}")
    lines += _references("refers to", [(r.target, r) for r in references.of(entry.place)])
    lines += _references("used by", [(r.source, r) for r in references.to(entry.place)])
    if entry.strangers:
        lines.append(f"other      {listed(entry.strangers)}; never removed")
    return "\n".join([*lines, *_unreadable(listing)])


def _parts(entry: Entry) -> list[tuple[str, int]]:
    """Return the sizes of the files and folders of an entry, the largest first."""
    sizes: dict[str, int] = {}
    for file in entry.files:
        if file.is_ours:
            first, slash, _ = file.path.partition("/")
            sizes[first + slash] = sizes.get(first + slash, 0) + file.size_bytes
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def _references(label: str, places: Sequence[tuple[str, Reference]]) -> list[str]:
    shown = places[:_SHOWN_REFERENCES]
    lines = [f"{label:<11}{printable(place)} ({each.why})" for place, each in shown]
    if len(places) > len(shown):
        lines.append(f"{label:<11}and {len(places) - len(shown)} more")
    return lines


def describe_removal(listing: Listing) -> str:
    """Say what would be removed."""
    lines = []
    for entry in listing.entries:
        ours = sum(file.is_ours for file in entry.files)
        lines.append(
            f"remove     {printable(str(entry.path))}: {size_in_words(entry.size_bytes)} in "
            f"{ours} files"
        )
        lines += _references("used by", [(r.source, r) for r in listing.references.to(entry.place)])
        if entry.strangers:
            lines.append(f"stays      {listed(entry.strangers)}: not written by Siftclip")
    return "\n".join(lines)


def describe_garbage(plan: GarbagePlan) -> str:
    """Return what could go, by kind, or of the kinds that were asked for each item."""
    if plan.kinds:
        lines = [line for item in plan.items for line in _item_lines(item)]
        lines = lines or ["nothing of these kinds can go"]
    else:
        rows = []
        for kind in GARBAGE:
            items = plan.found.of(kind)
            size = sum(item.size_bytes for item in items)
            files = sum(len(item.paths) for item in items)
            rows.append([kind, str(len(items)), str(files), size_in_words(size)])
        lines = text_table(["kind", "in", "files", "size"], rows, right=[1, 2, 3])
    kinds = plan.kinds or [kind for kind in GARBAGE if plan.found.of(kind)]
    for kind in kinds:
        lines += wrapped(f"{kind}: {LOSSES[kind]}")
    lines += [line for note in plan.found.notes for line in wrapped(f"{note}.".replace("..", "."))]
    return "\n".join(lines)


def _item_lines(item: GarbageItem) -> list[str]:
    place = printable(item.entry.place)
    size = size_in_words(item.size_bytes)
    if item.is_whole:
        lines = [f"{item.kind:<11} {size:>9}  {place}"]
        if item.entry.strangers:
            lines.append(f"{'':<23}but not {listed(item.entry.strangers)}")
        return lines
    names = [printable(path) for path in item.paths]
    more = f" and {len(names) - _SHOWN_PATHS} more" if len(names) > _SHOWN_PATHS else ""
    return [f"{item.kind:<11} {size:>9}  {place}: {', '.join(names[:_SHOWN_PATHS])}{more}"]


def total_of(plan: GarbagePlan) -> str:
    """Say how much is to go."""
    files = sum(len(item.paths) for item in plan.items)
    return f"{size_in_words(sum(item.size_bytes for item in plan.items))} in {files} files"


def describe_removed(removed: Removed) -> str:
    """Say what was removed."""
    line = f"removed    {printable(removed.place)}: {size_in_words(removed.size_bytes)}"
    left = f"; left: {listed(removed.left)}" if removed.left else ""
    return f"{line} in {removed.files} files{left}"
