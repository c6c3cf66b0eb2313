"""What is in the place of a pool where there are no tars, and what to name instead."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

MAX_LOOKED_AT = 10_000  # names in a folder: more would say no more
_SHOWN = 4
_COMPRESSED = {
    ".gz": "gunzip",
    ".tgz": "gunzip",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zst": "unzstd",
}
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
NO_PARQUET = (
    "Images are not read from parquet files: docs/pools.md has a program that writes them as tars."
)
_PATTERN_CHARACTERS = frozenset("*?[{")


def describe_names(files: Sequence[str], folders: Sequence[str]) -> str:
    """Say what is in a folder, such as "It holds 40 .jpg, 40 .txt and the folder a."."""
    counts = Counter(suffix_of(name) or "without a suffix" for name in files)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {suffix}" for suffix, count in ranked[:_SHOWN]]
    others = sum(count for _, count in ranked[_SHOWN:])
    parts += [f"{others} more"] if others else []
    if folders:
        names = ", ".join(sorted(folders)[:_SHOWN])
        more = f" and {len(folders) - _SHOWN} more" if len(folders) > _SHOWN else ""
        parts.append(f"the folder{'s' if len(folders) > 1 else ''} {names}{more}")
    if not parts:
        return "It is empty."
    return f"It holds {' and '.join(filter(None, (', '.join(parts[:-1]), parts[-1])))}."


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name, with the one before if that is .tar: .tar.gz."""
    stem, suffix = os.path.splitext(name)
    return ".tar" + suffix if stem.endswith(".tar") else suffix


def explain_no_folder(root: Path) -> str:
    """Say what a root that is no folder is, and what to name instead; "" without an idea."""
    if root.is_file():
        is_tar = suffix_of(root.name) == ".tar"
        return f"It is one tar. Name its folder: {root.parent}" if is_tar else "It is a file."
    pattern = next((part for part in root.parts if _PATTERN_CHARACTERS & set(part)), None)
    if pattern is None:
        return ""
    folder = Path(*root.parts[: root.parts.index(pattern)])
    return (
        f"A pool is all tars of a folder: name {folder}. For some of them, make a folder of links: "
        f"mkdir part; ln -s {root.absolute()} part"
    )


def explain_no_tars(root: Path) -> str:
    """Say what a folder without tars holds, and what to do."""
    files, folders = _list(root)
    held = describe_names(files, folders)
    suffixes = Counter(map(suffix_of, files))
    place = shlex.quote(str(root))
    if root.name == "metadata" and (_has_tars(root.parent) or _has_tars(root.parent / "shards")):
        return f"{held} It is the metadata of a pool: name {root.parent}"
    inside = {name: _count_tars(root / name) for name in sorted(folders)}
    with_tars = [f"{root / name} (tars: {count})" for name, count in inside.items() if count]
    if with_tars:
        return f"{held} Name one of its folders that hold tars: {', '.join(with_tars[:_SHOWN])}"
    for suffix, program in _COMPRESSED.items():
        compressed = suffix if suffix == ".tgz" else f".tar{suffix}"
        if suffixes[compressed]:
            return (
                f"{held} Single samples cannot be read from compressed tars. Decompress them: "
                f"{program} {place}/*{compressed}"
            )
    if suffixes[".TAR"]:
        return f"{held} Rename them: the suffix is .tar in lower case."
    if suffixes[".parquet"]:
        return f"{held} {NO_PARQUET}"
    if any(suffixes[suffix] for suffix in _IMAGES):
        return (
            f"{held} Images beside captions of the same name (.txt) are packed by: mkdir new; "
            f"tar --sort=name -cf new/00000.tar -C {place} ."
        )
    return held


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """List the visible files and folders in a folder, not too many."""
    with os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        some = list(islice(visible, MAX_LOOKED_AT))
    folders = [entry.name for entry in some if entry.is_dir()]
    return [entry.name for entry in some if not entry.is_dir()], folders


def _has_tars(folder: Path) -> bool:
    return any(_tars(folder))


def _count_tars(folder: Path) -> int:
    return sum(1 for _ in islice(_tars(folder), MAX_LOOKED_AT)) or sum(
        1 for _ in islice(_tars(folder / "shards"), MAX_LOOKED_AT)
    )


def _tars(folder: Path) -> Iterable[Path]:
    return folder.glob("*.tar")
