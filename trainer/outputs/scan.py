"""Looks through a folder of outputs, and follows no link: what lies there, and how large it is."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from siftclip.errors import InputError
from siftclip.locks import LOCK_NAME, lock_holder
from siftclip.reading import reason_of
from siftclip.trainer.outputs.kinds import Kind, is_replaced, kind_of, plain_name

_DEEPEST = 12  # folders in each other that are looked into, outside of entries


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file, or whatever else is no folder."""

    path: str  # in the entry, or in the folder of outputs
    size_bytes: int
    modified: float  # seconds since 1970
    is_ours: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A run, a selection, scores, ...: a folder with what one command has made."""

    root: Path  # of the outputs
    place: str  # the path of its folder in there
    kind: Kind
    files: tuple[FoundFile, ...]

    @property
    def path(self) -> Path:
        return self.root / self.place

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.place.rpartition("/")[2]

    @property
    def lock(self) -> Path:
        """Of whoever writes it."""
        return self.path / LOCK_NAME

    @property
    def size_bytes(self) -> int:
        """Of all files that are ours."""
        return sum(file.size_bytes for file in self.files if file.is_ours)

    @property
    def strangers(self) -> tuple[str, ...]:
        """The files that are not ours."""
        return tuple(file.path for file in self.files if not file.is_ours)

    @property
    def modified(self) -> float:
        """When one of its files was last written, in seconds since 1970; 0 without files."""
        return max((file.modified for file in self.files), default=0.0)

    @property
    def is_replaced(self) -> bool:
        """Whether this is a run that another one has set aside."""
        return self.kind.name == "runs" and is_replaced(self.place)

    def has_file(self, path: str) -> bool:
        """Return whether it holds a file of this path."""
        return any(file.path == path for file in self.files)

    def size_of(self, folder: str) -> int:
        """Return the size of what is in one of its folders, in bytes."""
        return sum(f.size_bytes for f in self.files if f.path.startswith(f"{folder}/"))

    def holders(self) -> list[str]:
        """Say which processes write in it: "by process PID on HOST since ..."."""
        locks = [file.path for file in self.files if _is_lock(file.path)]
        holders = (lock_holder(self.path / lock) for lock in locks)
        return [holder for holder in holders if holder is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """All that lies in a folder of outputs."""

    root: Path
    entries: tuple[Entry, ...]  # by place
    others: Mapping[str, Sequence[FoundFile]] = field(default_factory=dict)
    """Files that belong to no entry, by the first part of their path."""

    def entry_at(self, place: str) -> Entry | None:
        """Return the entry that a path in the outputs is, or lies in."""
        return next((e for e in self.entries if f"{place}/".startswith(f"{e.place}/")), None)


def scan(root: Path) -> Outputs:
    """Look through a folder of outputs.

    Raises:
        InputError: it is no folder, or cannot be read.
    """
    if not root.is_dir():
        raise InputError(f"{root} must be a folder that commands have written into.")
    root = root.resolve()
    entries: list[Entry] = []
    others: dict[str, list[FoundFile]] = {}
    for found in _walk(root, ""):
        if isinstance(found, Entry):
            entries.append(found)
        else:
            others.setdefault(found.path.partition("/")[0], []).append(found)
    return Outputs(root=root, entries=tuple(entries), others=others)


def _walk(root: Path, place: str) -> Iterator[Entry | FoundFile]:
    """Yield the entries in a folder, and files beside them, in the order of their names."""
    children = _children(root / place)
    kind = kind_of(place, [child.name for child in children]) if place else None
    if kind is not None:
        files = tuple(_files(root / place, kind))
        if not files or any(file.is_ours for file in files):
            yield Entry(root=root, place=place, kind=kind, files=files)
        else:  # what is left of an entry that was removed
            yield from (replace(file, path=f"{place}/{file.path}") for file in files)
        return
    for child in children:
        path = f"{place}/{child.name}" if place else child.name
        if child.is_dir(follow_symlinks=False) and path.count("/") < _DEEPEST:
            yield from _walk(root, path)
        else:
            yield _found(child, path, is_ours=False)


def _files(folder: Path, kind: Kind, prefix: str = "") -> Iterator[FoundFile]:
    """Yield all files of an entry."""
    for child in _children(folder / prefix):
        path = f"{prefix}{child.name}"
        if child.is_dir(follow_symlinks=False):
            yield from _files(folder, kind, f"{path}/")
            continue
        plain, _ = plain_name(path)
        is_file = child.is_file(follow_symlinks=False)
        is_ours = kind.has(plain) if is_file else child.is_symlink() and kind.may_be_link(plain)
        yield _found(child, path, is_ours=is_ours)


def _found(child: os.DirEntry[str], path: str, *, is_ours: bool) -> FoundFile:
    try:
        status = child.stat(follow_symlinks=False)
    except FileNotFoundError:  # just deleted
        return FoundFile(path=path, size_bytes=0, modified=0.0, is_ours=is_ours)
    size_bytes = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return FoundFile(path=path, size_bytes=size_bytes, modified=status.st_mtime, is_ours=is_ours)


def _children(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:  # just deleted
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {reason_of(error)}.") from None


def _is_lock(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name == LOCK_NAME or (name.startswith(".") and name.endswith(".lock"))
