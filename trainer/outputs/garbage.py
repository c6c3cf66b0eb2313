"""What could go without a loss of results: intermediate files that nothing refers to."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from siftclip.errors import InputError
from siftclip.trainer.outputs.kinds import KindName, plain_name
from siftclip.trainer.outputs.references import References
from siftclip.trainer.outputs.removal import Removed, remove_entry, remove_files
from siftclip.trainer.outputs.scan import Entry, Outputs
from siftclip.trainer.runtime.run_dir import RunDir, checkpoints_in
from siftclip.trainer.runtime.run_records import read_config
from siftclip.writing import is_abandoned

Garbage: TypeAlias = Literal[
    "checkpoints", "scores", "selections", "features", "damaged", "replaced", "temporary"
]
GARBAGE: tuple[Garbage, ...] = get_args(Garbage)
# What is lost with each, as one or more sentences
LOSSES: Mapping[Garbage, str] = {
    "checkpoints": (
        "Of finished runs, whose model stays. Lost: the weights that the model is not of "
        "(siftclip export with raw or ema), evaluating these steps (siftclip eval watch), and "
        "mending a damaged model without training again. A longer budget is another run, which "
        "begins anew in any case."
    ),
    "scores": "That no selection and no run was made from. They are computed again when needed.",
    "selections": "That no run was trained on. They are made again when needed.",
    "features": "That no run and no selection reads. siftclip embed makes them again.",
    "damaged": "What was set aside, as it could not be read, and has been made again since.",
    "replaced": "Runs that reuse=false has set aside for newer ones.",
    "temporary": "What killed processes have left half written.",
}
_WHOLE: tuple[Garbage, ...] = ("scores", "selections", "features")  # entries that go as such


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbageItem:
    """An entry, or some of its files, that could go."""

    kind: Garbage
    entry: Entry
    paths: tuple[str, ...]  # files of the entry
    size_bytes: int

    @property
    def is_whole(self) -> bool:
        """Whether the whole entry goes."""
        return self.kind in (*_WHOLE, "replaced")


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbageList:
    """All that could go, and what stays for a reason that may pass."""

    items: tuple[GarbageItem, ...]
    notes: tuple[str, ...]

    def of(self, kind: Garbage) -> list[GarbageItem]:
        """Return the items of a kind."""
        return [item for item in self.items if item.kind == kind]


def find_garbage(
    outputs: Outputs, references: References, *, older_than_seconds: float
) -> GarbageList:
    """Find what could go.

    Args:
        outputs: as they were scanned.
        references: among them.
        older_than_seconds: scores, selections and features that were written since stay: a command
            may be about to use them.
    """
    items: list[GarbageItem] = []
    notes: list[str] = []
    held = {entry.place: entry.holders() for entry in outputs.entries}
    busy = [place for place, holders in held.items() if holders]
    for entry in outputs.entries:
        if not held[entry.place]:
            items += _in_entry(entry, references)
            items += _replaced(entry, references)
    reason = None
    if busy:
        reason = f"{busy[0]} is being written {held[busy[0]][0]}"
    elif references.unreadable:
        reason = references.unreadable[0]
    if reason is not None:
        notes.append(f"Scores, selections and features stay for now, since {reason}")
    else:
        newest = time.time() - older_than_seconds
        items += _unreferenced(outputs, references, newest, notes)
    return GarbageList(items=tuple(items), notes=tuple(notes))


def _unreferenced(
    outputs: Outputs, references: References, newest: float, notes: list[str]
) -> Iterator[GarbageItem]:
    """Yield scores, selections and features that nothing names."""
    young = 0
    for kind in _WHOLE:
        for entry in outputs.entries:
            if entry.kind.name != _KIND_OF[kind] or references.to(entry.place):
                continue
            if entry.modified > newest:
                young += 1
                continue
            yield _whole(kind, entry)
    if young:
        notes.append(f"{young} scores, selections or features are too young to go")


_KIND_OF: Mapping[Garbage, KindName] = {
    "scores": "scores",
    "selections": "selections",
    "features": "features",
}


def _whole(kind: Garbage, entry: Entry) -> GarbageItem:
    paths = tuple(file.path for file in entry.files if file.is_ours)
    return GarbageItem(kind=kind, entry=entry, paths=paths, size_bytes=entry.size_bytes)


def _replaced(entry: Entry, references: References) -> Iterator[GarbageItem]:
    if entry.is_replaced and not references.to(entry.place):
        yield _whole("replaced", entry)


def _in_entry(entry: Entry, references: References) -> Iterator[GarbageItem]:
    """Yield the parts of an entry that could go, while it stays."""
    parts: dict[Garbage, list[str]] = {"damaged": [], "temporary": [], "checkpoints": []}
    if entry.kind.name == "runs" and not entry.is_replaced:
        parts["checkpoints"] = _needless_checkpoints(entry, references)
    for file in entry.files if not entry.is_replaced else ():
        state = plain_name(file.path)[1]
        if file.is_ours and state and (state == "damaged" or _is_left(entry, file.path)):
            parts[state].append(file.path)
    sizes = {file.path: file.size_bytes for file in entry.files}
    for kind, paths in parts.items():
        if paths:
            size_bytes = sum(sizes[path] for path in paths)
            yield GarbageItem(kind=kind, entry=entry, paths=tuple(paths), size_bytes=size_bytes)


def _is_left(entry: Entry, path: str) -> bool:
    """Return whether a temporary file, or the temporary folder that it is in, is left behind."""
    parts = path.split("/")
    places = ("/".join(parts[: number + 1]) for number in range(len(parts)))
    return any(is_abandoned(entry.path / place) for place in places)


def _needless_checkpoints(entry: Entry, references: References) -> list[str]:
    """List the checkpoints of a finished run that were kept to continue from alone.

    Not those that `trainer.keep_every_n_steps` keeps for good, nor those that a record names; and
    none where the model itself is not there, or damaged.
    """
    run = RunDir(path=entry.path)
    try:
        has_weights = entry.has_file("model/open_clip_model.safetensors")
        if not has_weights or not run.is_finished:
            return []
        trainer = read_config(entry.path / "config.yaml").get("trainer")
    except InputError:
        return []
    every = trainer.get("keep_every_n_steps") if isinstance(trainer, Mapping) else None
    if isinstance(every, bool) or not isinstance(every, int | None) or every == 0:
        return []
    folder = f"{entry.place}/checkpoints"
    if any(text.endswith(f"/{folder}") for text in references.texts):
        return []
    return [
        file.path
        for step, path in checkpoints_in(run.checkpoints).items()
        if (every is None or step % every) and not references.names_path(f"{folder}/{path.name}")
        for file in entry.files
        # itself, or its parts
        if f"{file.path}/".startswith(f"checkpoints/{path.name}/") and file.is_ours
    ]


def free(items: Collection[GarbageItem]) -> Iterator[Removed]:
    """Remove items, one after the other.

    Raises:
        HeldError: a process has begun to write one; those before it are gone.
        WriteError: a file cannot be deleted.
    """
    for item in items:
        yield remove_entry(item.entry) if item.is_whole else remove_files(item.entry, item.paths)


def size_in_words(size_bytes: int) -> str:
    """Return a size as people read it.

    Example:
        >>> from siftclip.trainer.outputs.garbage import size_in_words
        >>> size_in_words(999), size_in_words(1500), size_in_words(40_200_000)
        ('999 B', '1.5 kB', '40.2 MB')
    """
    size, units = float(size_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.95 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
