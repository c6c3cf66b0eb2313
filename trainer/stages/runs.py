"""The stages of `siftclip runs`: what lies in the folder of outputs, and what can go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from siftclip.errors import InputError
from siftclip.trainer.outputs.garbage import (
    GARBAGE,
    Garbage,
    GarbageItem,
    GarbageList,
    find_garbage,
    free,
)
from siftclip.trainer.outputs.kinds import KINDS
from siftclip.trainer.outputs.references import References, find_references
from siftclip.trainer.outputs.removal import (
    Removed,
    find_entry,
    remove_entry,
    require_free,
    require_unreferenced,
)
from siftclip.trainer.outputs.scan import Entry, Outputs, scan
from siftclip.trainer.settings.commands import (
    RunsGcCommand,
    RunsListCommand,
    RunsRmCommand,
    RunsShowCommand,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Entries of a folder of outputs, with what refers to them."""

    outputs: Outputs
    references: References
    entries: tuple[Entry, ...]


def list_stage(settings: RunsListCommand) -> Listing:
    """Look through the outputs.

    Raises:
        InputError: there are none, or a kind is unknown.
    """
    kinds = _kinds("runs_list.kinds", settings.runs_list.kinds, tuple(KINDS)) or tuple(KINDS)
    outputs = scan(settings.common.output_root)
    entries = tuple(entry for kind in kinds for entry in outputs.entries if entry.kind.name == kind)
    return Listing(outputs=outputs, references=find_references(outputs), entries=entries)


def show_stage(settings: RunsShowCommand) -> Listing:
    """Find one entry.

    Raises:
        InputError: there is no such entry.
    """
    outputs = scan(settings.common.output_root)
    entry = find_entry(outputs, settings.runs_show.run)
    return Listing(outputs=outputs, references=find_references(outputs), entries=(entry,))


def removal_stage(settings: RunsRmCommand) -> Listing:
    """Find what is to be removed, and check that it may be. Nothing is removed.

    Raises:
        InputError: there is no such entry, a process writes it, or, without `runs_rm.force`, others
            refer to it that are not removed with it.
    """
    wanted = settings.runs_rm.run
    outputs = scan(settings.common.output_root)
    names = [wanted] if isinstance(wanted, str) else [*wanted]
    entries = tuple(dict.fromkeys(find_entry(outputs, name) for name in names))
    references = find_references(outputs)
    going = {entry.place for entry in entries}
    others = References(
        all=tuple(each for each in references.all if each.source not in going),
        unreadable=references.unreadable,
    )
    for entry in entries:
        require_free(entry)
        if settings.runs_rm.force:
            continue
        try:
            require_unreferenced(entry, others)
        except InputError as error:
            raise InputError(f"{error} runs_rm.force=true removes it all the same.") from None
    return Listing(outputs=outputs, references=references, entries=entries)


def remove_all(listing: Listing) -> Iterator[Removed]:
    """Remove the entries of a listing.

    Raises:
        HeldError: a process has begun to write one; those before it are gone.
    """
    for entry in listing.entries:
        yield remove_entry(entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbagePlan:
    """What could go, and which kinds of it were asked for."""

    found: GarbageList
    kinds: tuple[Garbage, ...]

    @property
    def items(self) -> list[GarbageItem]:
        """What is to go."""
        return [item for item in self.found.items if item.kind in self.kinds]


def garbage_stage(settings: RunsGcCommand) -> GarbagePlan:
    """Find what could go. Nothing is removed.

    Raises:
        InputError: there are no outputs, or a kind is unknown.
    """
    wanted = settings.runs_gc
    kinds = _kinds("runs_gc.kinds", wanted.kinds, GARBAGE)
    outputs = scan(settings.common.output_root)
    found = find_garbage(
        outputs,
        find_references(outputs),
        older_than_seconds=3600 * wanted.older_than_hours,
    )
    return GarbagePlan(found=found, kinds=tuple(kind for kind in GARBAGE if kind in kinds))


def free_all(plan: GarbagePlan) -> Iterator[Removed]:
    """Remove what was asked for, see `free`."""
    yield from free(plan.items)


def _kinds(option: str, given: str | Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds that an option names.

    Raises:
        InputError: one is unknown.
    """
    kinds = [given] if isinstance(given, str) else [*(given or ())]
    for kind in kinds:
        if kind not in known:
            close = get_close_matches(kind, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{option} must be some of {[*known]}. Got {kind!r}.{hint}")
    return tuple(kinds)
