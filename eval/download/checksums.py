"""The checksums of a task folder: what says that its download or conversion is complete.

`checksums.json` is written last. It holds where the task is from, and the size and the SHA-256 of
each file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from siftclip.errors import InputError
from siftclip.files import sha256_of, write_json
from siftclip.reading import open_file
from siftclip.records import Count, Text, read_record

CHECKSUMS_FILE = "checksums.json"
_BLOCK_BYTES = 1 << 20


class _FileRecord(TypedDict):
    """The checksum of a file in JSON."""

    size: Count
    sha256: Text


class _Record(TypedDict):
    """What `checksums.json` holds."""

    repository: Text
    revision: Text
    commit: Text
    splits: list[Text]
    files: dict[Text, _FileRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChecksum:
    """Of one file."""

    size_bytes: int
    sha256: str  # hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskChecksums:
    """What `checksums.json` says."""

    repository: str  # empty where it is not known
    revision: str  # as it was asked for: a branch, a tag or a commit; empty = the main branch
    commit: str
    splits: tuple[str, ...]  # those that are complete
    files: dict[str, FileChecksum]  # by path in the folder, with /


def hash_file(path: Path) -> tuple[str, str]:
    """Hash a file: SHA-256, and the id that git would give it as a blob; both hexadecimal."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open_file(path) as file:
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
            blob.update(block)
    return sha256.hexdigest(), blob.hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileChecksum]:
    """Compute the checksums of files in a folder, by name."""
    return {
        name: FileChecksum(
            size_bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name)
        )
        for name in names
    }


def write_checksums(folder: Path, checksums: TaskChecksums) -> None:
    """Write `checksums.json`, atomically."""
    files = {
        name: {"size": file.size_bytes, "sha256": file.sha256}
        for name, file in sorted(checksums.files.items())
    }
    write_json(
        folder / CHECKSUMS_FILE,
        {
            "repository": checksums.repository,
            "revision": checksums.revision,
            "commit": checksums.commit,
            "splits": list(checksums.splits),
            "files": files,
        },
    )


def read_checksums(folder: Path) -> TaskChecksums | None:
    """Read `checksums.json` of a folder; None where there is none.

    Raises:
        InputError: it is not as `write_checksums` writes it.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return None
    try:
        record = read_record(path, _Record)
    except InputError as error:
        raise InputError(
            f"{path} is not a record of checksums: {error} Delete it and download this task "
            "again; files that are already right are kept."
        ) from None
    return TaskChecksums(
        repository=record["repository"],
        revision=record["revision"],
        commit=record["commit"],
        splits=tuple(record["splits"]),
        files={
            name: FileChecksum(size_bytes=file["size"], sha256=file["sha256"])
            for name, file in record["files"].items()
        },
    )


def wrong_sizes(folder: Path, checksums: TaskChecksums) -> list[str]:
    """Return the names of the files that are missing or not of the recorded size, sorted."""
    return [name for name, file in sorted(checksums.files.items()) if not _fits(folder, name, file)]


def verify_task(folder: Path) -> list[str]:
    """Hash a task's files again and return the names of the damaged and missing ones, sorted.

    Raises:
        InputError: the folder has no `checksums.json`, or it is not a record of checksums.
    """
    checksums = read_checksums(folder)
    if checksums is None:
        raise InputError(
            f"{folder} must hold {CHECKSUMS_FILE}, which is written when a download is complete. "
            "Run the download again; it continues where it was."
        )
    return [
        name
        for name, file in sorted(checksums.files.items())
        if not _fits(folder, name, file) or sha256_of(folder / name) != file.sha256
    ]


def _fits(folder: Path, name: str, file: FileChecksum) -> bool:
    path = folder / name
    return path.is_file() and path.stat().st_size == file.size_bytes
