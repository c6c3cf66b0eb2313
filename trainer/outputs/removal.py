"""Removes what Siftclip has written, and nothing else: no link is followed, no stranger touched."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from siftclip.errors import InputError
from siftclip.locks import locked
from siftclip.trainer.outputs.references import References
from siftclip.trainer.outputs.scan import Entry, FoundFile, Outputs
from siftclip.writing import delete_empty_folders, delete_inside

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What was removed of an entry."""

    place: str
    files: int
    size_bytes: int
    left: tuple[str, ...]  # what is not ours, and stays


def find_entry(outputs: Outputs, name: str) -> Entry:
    """Find the entry that somebody names: by its path, its place, or the name of its folder.

    Raises:
        InputError: there is none, or there are several.
    """
    path = Path(name)
    folder = path.parent.resolve() / path.name  # a link to an entry is not the entry
    if folder.is_relative_to(outputs.root) and folder != outputs.root:
        place = folder.relative_to(outputs.root).as_posix()
        for entry in outputs.entries:
            if entry.place == place:
                return entry
    plain = name.strip("/")
    matching = [entry for entry in outputs.entries if plain in (entry.place, entry.name)]
    exact = [entry for entry in matching if entry.place == plain]
    if len(exact or matching) == 1:
        return (exact or matching)[0]
    if matching:
        places = ", ".join(entry.place for entry in matching)
        raise InputError(f"{name!r} may be any of {places}. Name one of these.")
    raise InputError(
        f"{name!r} must be a run, a selection or the like in {outputs.root}. siftclip runs list "
        "shows what there is."
    )


def require_free(entry: Entry) -> None:
    """Check that no process writes an entry.

    Raises:
        InputError: one does.
    """
    holders = entry.holders()
    if holders:
        raise InputError(
            f"{entry.place} is being written {holders[0]}. Wait for it, or end it. Nothing of it "
            "was removed."
        )


def require_unreferenced(entry: Entry, references: References) -> None:
    """Check that no other entry needs one.

    Raises:
        InputError: one does, or a record that cannot be read may name it.
    """
    others = references.to(entry.place)
    if others:
        told = "; ".join(f"{other.source} ({other.why})" for other in others[:5])
        more = f"; and {len(others) - 5} more" if len(others) > 5 else ""
        raise InputError(f"{entry.place} is referred to: {told}{more}.")
    if references.unreadable:
        raise InputError(
            f"Whether something refers to {entry.place} is not known: {references.unreadable[0]}"
        )


def ordered(entry: Entry) -> list[FoundFile]:
    """Return the files of an entry that are ours, in the order in which they go.

    First what makes it count, so that no command takes a part for the whole, and last what it is
    known by, so that a removal that was broken off can be continued.
    """
    first, last = entry.kind.first, entry.kind.last

    def order(file: FoundFile) -> tuple[int, int]:
        if file.path in first:
            return 0, first.index(file.path)
        return (2, last.index(file.path)) if file.path in last else (1, 0)

    ours = [file for file in entry.files if file.is_ours and entry.path / file.path != entry.lock]
    return sorted(ours, key=order)


def remove_entry(entry: Entry) -> Removed:
    """Remove all of an entry that is ours, and its folder if nothing else is in there.

    Raises:
        HeldError: a process writes it.
        WriteError: a file cannot be deleted.
    """
    require_free(entry)  # also locks of its parts, such as of an evaluation that watches it
    with locked(entry.lock, owner=entry.place):
        removed = _remove(entry, ordered(entry))
    delete_empty_folders(entry.root, entry.place)
    return removed


def remove_files(entry: Entry, paths: Iterable[str]) -> Removed:
    """Remove some files of an entry, by their paths in it.

    Raises:
        HeldError: a process writes it.
        WriteError: a file cannot be deleted.
    """
    wanted = {*paths}
    require_free(entry)
    with locked(entry.lock, owner=entry.place):
        removed = _remove(entry, [file for file in ordered(entry) if file.path in wanted])
    delete_empty_folders(entry.root, entry.place)
    return removed


def _remove(entry: Entry, files: list[FoundFile]) -> Removed:
    size_bytes = count = 0
    for file in files:
        if delete_inside(entry.root, f"{entry.place}/{file.path}"):
            size_bytes += file.size_bytes
            count += 1
    return Removed(place=entry.place, files=count, size_bytes=size_bytes, left=entry.strangers)
