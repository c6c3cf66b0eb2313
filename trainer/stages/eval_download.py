"""The download stage: evaluation sets from the Hugging Face hub, in the layout that eval reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from siftclip.errors import InputError
from siftclip.eval.download.checksums import read_checksums, verify_task, wrong_sizes
from siftclip.eval.download.convert_tasks import ConvertedKind, convert_task, converted_kind
from siftclip.eval.download.tasks import download_source, download_task
from siftclip.eval.tasks.known_tasks import KNOWN_TASKS, KnownTask
from siftclip.eval.tasks.task import require_names
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.settings.commands import DownloadCommand
from siftclip.trainer.settings.tools import DownloadSettings
from siftclip.writing import delete_folder

PARQUET_REVISION = "refs/convert/parquet"  # the hub's own conversion of each data set
SOURCES_FOLDER = ".sources"


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """What became of one task."""

    name: str
    folder: Path
    words: str  # what was done, or why it failed
    failed: bool = False


def download_stage(settings: DownloadCommand) -> Iterator[Downloaded]:
    """Download the tasks that the configuration names, one after the other.

    What is complete is not asked for again, and what was cut off is continued. A task that fails
    leaves the others alone.

    Yields:
        Each task when it is done.

    Raises:
        InputError: an option is wrong.
    """
    download, progress = settings.download, settings.common.progress
    root = Path(download.folder)
    jobs: list[tuple[str, Path, KnownTask | None]] = [
        (name, root / name.rpartition("/")[2], None) for name in download.repositories
    ]
    jobs += [(task.repository, root / task.folder, task) for task in _tasks(settings)]
    for repository, folder, task in jobs:
        name = repository if task is None else task.key
        try:
            kind = None if task is None else converted_kind(task.kind)
            if task is None or kind is None:
                report = download_task(
                    repository,
                    folder,
                    splits=download.splits if task is None else ("test",),
                    workers=download.workers,
                    progress=progress,
                    verify=download.verify,
                )
                fetched = f"{report.fetched_files} of {report.files} files fetched"
                words = f"{fetched}, {report.size_bytes / 1e6:,.1f} MB"
            else:
                words = _converted(task, kind, folder, download, progress=progress)
            yield Downloaded(name=name, folder=folder, words=words)
        except InputError as error:
            yield Downloaded(name=name, folder=folder, words=str(error), failed=True)


def _tasks(settings: DownloadCommand) -> list[KnownTask]:
    given = settings.eval.tasks
    if given is None:
        given = () if settings.download.repositories else (*KNOWN_TASKS,)
    names = require_names("eval.tasks", given)
    for name in names:
        if name not in KNOWN_TASKS:
            raise InputError(
                f"eval.tasks must name tasks of DataComp: {[*KNOWN_TASKS]}. Got {name!r}. Others "
                "come with download.repositories=[clip-benchmark/wds_NAME]."
            )
    return [KNOWN_TASKS[name] for name in names]


def _converted(
    task: KnownTask,
    kind: ConvertedKind,
    folder: Path,
    download: DownloadSettings,
    *,
    progress: bool,
) -> str:
    """Download a task that is not in our layout, and bring it into it."""
    known = read_checksums(folder)
    if known is not None:
        damaged = verify_task(folder) if download.verify else wrong_sizes(folder, known)
        if not damaged:
            return "there already"
    source = folder.parent / SOURCES_FOLDER / folder.name
    with locked(folder / LOCK_NAME, owner=str(folder)):
        download_source(
            task.repository,
            source,
            revision=PARQUET_REVISION,
            workers=download.workers,
            progress=progress,
        )
        samples = convert_task(source, folder, kind)
        delete_folder(source)
    return f"{samples:,} samples, converted"
