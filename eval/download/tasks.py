"""Evaluation tasks from the Hugging Face hub: resumable, and checked against the hub's hashes.

`download_task` is for repositories in clip_benchmark's layout. `download_source` is for the few
that are a table with images, which `convert_tasks` brings into the layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from siftclip.errors import InputError, require_int
from siftclip.eval.download.checksums import (
    CHECKSUMS_FILE,
    TaskChecksums,
    read_checksums,
    verify_task,
    write_checksums,
    wrong_sizes,
)
from siftclip.eval.download.hub import WORK_FOLDER, HubDataset, RemoteFile, require_room
from siftclip.eval.tasks.task import NSHARDS_FILE
from siftclip.locks import LOCK_NAME, locked
from siftclip.writing import delete_file, delete_folder

DEFAULT_WORKERS = 4
_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_TEXT_FILE = re.compile(r"[^/]+\.txt")
_TAR_FILE = re.compile(r"[0-9]+\.tar")
_SOURCE_SUFFIXES = (".zip", ".csv", ".json", ".jsonl")
_SOURCE_IGNORED = ("dataset_infos.json",)  # the hub's own description of a data set


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadReport:
    """What a download did."""

    folder: Path
    repository: str
    commit: str
    files: int
    size_bytes: int  # of all files
    fetched_files: int  # by this call; 0 = all were there
    damaged: tuple[str, ...]  # found missing or damaged in a complete download, and fetched again


def download_task(
    repository: str,
    folder: Path,
    *,
    revision: str | None = None,
    splits: Sequence[str] = ("test",),
    endpoint: str | None = None,
    workers: int = DEFAULT_WORKERS,
    progress: bool = True,
    verify: bool = False,
) -> DownloadReport:
    """Download a task in clip_benchmark's layout: `*.txt` and, of each split, `*.txt` and `*.tar`.

    A call that was killed is continued by the next one, within a file too. When all files are there
    and right, `checksums.json` is written, and later calls ask the network nothing.

    Args:
        repository: a data set on the hub, such as `djghosh/wds_cifar10_test`.
        folder: the task folder to write.
        revision: a branch, tag or commit; None means what is there, else the main branch.
        splits: the folders of tars to fetch; those that are there already stay.
        endpoint: the hub's address; None means that of `HF_ENDPOINT`, else huggingface.co.
        workers: files at once.
        progress: show a bar.
        verify: hash the files of a complete download again; damaged ones are fetched again.

    Raises:
        InputError: no network, no such repository or revision, no access, a repository in another
            layout, no room on the disk, or a file whose content is not what the hub lists.
    """
    for split in splits:
        if not _SPLIT.fullmatch(split):
            raise InputError(f"A split must be the name of a folder, such as test. Got {split!r}.")

    def choose(files: list[RemoteFile], all_splits: tuple[str, ...]) -> list[RemoteFile]:
        return _choose_layout(repository, files, all_splits)

    return _download(
        HubDataset.at(repository, endpoint),
        folder,
        revision=revision,
        splits=tuple(splits),
        choose=choose,
        workers=workers,
        progress=progress,
        verify=verify,
    )


def download_source(
    repository: str,
    folder: Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    workers: int = DEFAULT_WORKERS,
    progress: bool = True,
    verify: bool = False,
) -> DownloadReport:
    """Download the data of a task that is not in clip_benchmark's layout, for `convert_tasks`.

    These are the parquet files of a repository, or, where it has none, its zip, csv and json files;
    never code. The revision `refs/convert/parquet` has the parquet form of many data sets. All else
    is as in `download_task`.
    """

    def choose(files: list[RemoteFile], all_splits: tuple[str, ...]) -> list[RemoteFile]:
        return _choose_source(repository, files)

    return _download(
        HubDataset.at(repository, endpoint),
        folder,
        revision=revision,
        splits=(),
        choose=choose,
        workers=workers,
        progress=progress,
        verify=verify,
    )


def _download(
    dataset: HubDataset,
    folder: Path,
    *,
    revision: str | None,
    splits: tuple[str, ...],
    choose: Callable[[list[RemoteFile], tuple[str, ...]], list[RemoteFile]],
    workers: int,
    progress: bool,
    verify: bool,
) -> DownloadReport:
    workers = require_int("workers", workers, minimum=1)
    damaged: list[str] = []
    asked_revision = revision or ""
    known = read_checksums(folder)
    if known is not None:
        _require_same_repository(dataset.repository, folder, known)
        splits = tuple(dict.fromkeys((*known.splits, *splits)))
        if revision in (None, known.revision, known.commit):
            damaged = verify_task(folder) if verify else wrong_sizes(folder, known)
            if not damaged and set(splits) == set(known.splits):
                return _report(folder, known, fetched_files=0, damaged=damaged)
            revision = known.commit  # never files of two commits
            asked_revision = known.revision
    with locked(folder / LOCK_NAME, owner=str(folder)):
        commit, listed = dataset.list_files(revision)
        files = choose(listed, splits)
        delete_file(folder / CHECKSUMS_FILE)
        require_room(folder, _missing_bytes(folder, files))
        checksums, fetched_files = dataset.fetch_files(
            commit, files, folder, workers=workers, progress=progress
        )
        done = TaskChecksums(
            repository=dataset.repository,
            revision=asked_revision,
            commit=commit,
            splits=splits,
            files=checksums,
        )
        write_checksums(folder, done)
        delete_folder(folder / WORK_FOLDER)
    return _report(folder, done, fetched_files=fetched_files, damaged=damaged)


def _choose_layout(
    repository: str, files: list[RemoteFile], splits: tuple[str, ...]
) -> list[RemoteFile]:
    chosen = []
    for file in files:
        split, _, name = file.name.rpartition("/")
        is_text = _TEXT_FILE.fullmatch(name) is not None
        if (not split and is_text) or (split in splits and (is_text or _TAR_FILE.fullmatch(name))):
            chosen.append(file)
    names = {file.name for file in chosen}
    for split in splits:
        if not {f"{split}/{NSHARDS_FILE}", f"{split}/0.tar"} <= names:
            raise InputError(
                f"{repository} must hold {split}/{NSHARDS_FILE} and {split}/0.tar, as tasks in "
                f"clip_benchmark's layout do. It holds {_some_names(files)}."
            )
    return chosen


def _choose_source(repository: str, files: list[RemoteFile]) -> list[RemoteFile]:
    chosen = [file for file in files if file.name.endswith(".parquet")] or [
        file
        for file in files
        if file.name.endswith(_SOURCE_SUFFIXES)
        and PurePosixPath(file.name).name not in _SOURCE_IGNORED
    ]
    if not chosen:
        raise InputError(
            f"{repository} must hold parquet files, or a zip and a table. "
            f"It holds {_some_names(files)}."
        )
    return chosen


def _some_names(files: list[RemoteFile]) -> str:
    names = sorted(file.name for file in files)
    if len(names) > 8:
        return ", ".join(names[:8]) + f" and {len(names) - 8} more files"
    return ", ".join(names) or "no file"


def _missing_bytes(folder: Path, files: list[RemoteFile]) -> int:
    """Sum the sizes of the files that are not there, less what is there of unfinished ones."""
    missing = sum(file.size_bytes for file in files if not (folder / file.name).is_file())
    unfinished = sum(path.stat().st_size for path in (folder / WORK_FOLDER).glob("*.part"))
    return max(missing - unfinished, 0)


def _require_same_repository(repository: str, folder: Path, known: TaskChecksums) -> None:
    if known.repository != repository:
        raise InputError(
            f"{folder} holds the task of {known.repository or 'another source'}. "
            f"Download {repository} to another folder, or delete this one."
        )


def _report(
    folder: Path, checksums: TaskChecksums, *, fetched_files: int, damaged: list[str]
) -> DownloadReport:
    return DownloadReport(
        folder=folder,
        repository=checksums.repository,
        commit=checksums.commit,
        files=len(checksums.files),
        size_bytes=sum(file.size_bytes for file in checksums.files.values()),
        fetched_files=fetched_files,
        damaged=tuple(damaged),
    )
