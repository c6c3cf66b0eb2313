"""Files of a data set on the Hugging Face hub: listed at one commit, fetched, and checked.

`snapshot_download` is not used: huggingface_hub 2 begins a file anew after a kill, does not compare
what it got with the hash that the hub lists, and trusts a file that was damaged later.
"""

from __future__ import annotations

import io
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from siftclip.errors import InputError
from siftclip.eval.download.checksums import FileChecksum, hash_file
from siftclip.eval.download.hub_errors import may_pass, readable_errors
from siftclip.progress import Progress, show_progress
from siftclip.writing import delete_file, make_folder, move, writing_to

WORK_FOLDER = ".download"  # of a task folder: files that are not complete
_LIBRARY = "siftclip"  # who asks
_PAUSES_SECONDS = (1.0, 4.0)  # before a file is tried again; `http_get` has tried several times
_LISTING_TIMEOUT_SECONDS = 30.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BARS_OF_HTTP_GET = "huggingface_hub.http_get"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as the hub lists it."""

    name: str  # its path in the repository, with /
    size_bytes: int
    sha256: str | None  # of a file that git does not hold itself; else None
    blob_id: str  # git's hash of the content if `sha256` is None

    def checksum(self, path: Path) -> FileChecksum | None:
        """Return the checksum of `path` if it has this file's content, else None."""
        if not path.is_file() or path.stat().st_size != self.size_bytes:
            return None
        sha256, blob_id = hash_file(path)
        right = blob_id == self.blob_id if self.sha256 is None else sha256 == self.sha256
        return FileChecksum(size_bytes=self.size_bytes, sha256=sha256) if right else None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """A data set's repository, seen from one endpoint."""

    repository: str
    endpoint: str

    @classmethod
    def at(cls, repository: str, endpoint: str | None) -> HubDataset:
        """Name a repository; `endpoint` None means that of `HF_ENDPOINT`, else huggingface.co."""
        address = (endpoint or constants.ENDPOINT).rstrip("/")
        if not address.startswith(("https://", "http://")):
            raise InputError(f"The hub's address must begin with https://. Got {address!r}.")
        return cls(repository=repository, endpoint=address)

    def list_files(self, revision: str | None) -> tuple[str, list[RemoteFile]]:
        """List the commit that `revision` (None: the main branch) stands for, and its files.

        Raises:
            InputError: no network, no such repository or revision, no access, an answer that is
                not a hub's, or a file whose name leads out of a folder.
        """
        api = HfApi(endpoint=self.endpoint, library_name=_LIBRARY)
        with readable_errors(self.repository, self.endpoint, None):
            try:
                commit = api.dataset_info(
                    self.repository, revision=revision, timeout=_LISTING_TIMEOUT_SECONDS
                ).sha
                entries = api.list_repo_tree(
                    self.repository, recursive=True, revision=commit, repo_type="dataset"
                )
                files = [_remote_file(entry) for entry in entries if isinstance(entry, RepoFile)]
            except HFValidationError as error:
                raise InputError(
                    f"A repository must be named owner/name. Got {self.repository!r}: {error}."
                ) from None
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, (HfHubHTTPError, InputError)):
                    raise
                raise self._not_a_hub(repr(error)) from None
        if commit is None or not _COMMIT.fullmatch(commit):
            raise self._not_a_hub(f"its commit is {commit!r}")
        for file in files:
            self._require_inside(file.name)
        return commit, files

    def fetch_files(
        self,
        commit: str,
        files: Sequence[RemoteFile],
        folder: Path,
        *,
        workers: int,
        progress: bool,
    ) -> tuple[dict[str, FileChecksum], int]:
        """Fetch files of a commit into a folder, several at once.

        A file that is there with the right content is kept. Another one is written to
        `WORK_FOLDER`, where a later call continues it, and moved once its content is right.

        Returns:
            The checksums by name, and how many files were fetched.

        Raises:
            InputError: no network, no access, no room, or content that is not what the hub lists.
        """
        fetch = _Fetch(self, commit, folder)
        total = sum(file.size_bytes for file in files)
        checksums = {}
        with (
            readable_errors(self.repository, self.endpoint, folder),
            _own_bar_only(),
            show_progress(total=total, label=folder.name, unit="B", bar=progress) as fetch.bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            futures = {pool.submit(fetch.fetch_file, file): file for file in files}
            try:
                for future in as_completed(futures):
                    checksums[futures[future].name] = future.result()
            except BaseException:  # Ctrl-C too: the threads end at their next block
                fetch.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return checksums, fetch.fetched_files

    def _require_inside(self, name: str) -> None:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f]", name):
            raise InputError(
                f"{self.repository} lists the file {name!r}, whose name may lead out of the task "
                "folder. Nothing was downloaded."
            )

    def _not_a_hub(self, reason: str) -> InputError:
        return InputError(
            f"{self.endpoint} does not answer about {self.repository} as a Hugging Face hub does: "
            f"{reason}. Check HF_ENDPOINT, and that no proxy answers in its place."
        )


def _remote_file(entry: RepoFile) -> RemoteFile:
    return RemoteFile(
        name=entry.path,
        size_bytes=entry.size,
        sha256=None if entry.lfs is None else entry.lfs.sha256,
        blob_id=entry.blob_id,
    )


class _Fetch:
    """What the threads of one `fetch_files` share."""

    bar: Progress

    def __init__(self, dataset: HubDataset, commit: str, folder: Path) -> None:
        self.dataset = dataset
        self.commit = commit
        self.folder = folder
        self.stop = threading.Event()
        self.fetched_files = 0
        self._lock = threading.Lock()
        self._headers = build_hf_headers(library_name=_LIBRARY)

    def fetch_file(self, file: RemoteFile) -> FileChecksum:
        """Download one file if it is not there, and twice if its content is wrong."""
        path = self.folder / file.name
        checksum = file.checksum(path)
        if checksum is not None:
            self._count(file.size_bytes)
            return checksum
        make_folder(path.parent)
        content_id = (file.sha256 or file.blob_id)[:16]
        part = self.folder / WORK_FOLDER / f"{file.name.replace('/', '__')}.{content_id}.part"
        make_folder(part.parent)
        for _ in range(2):
            self._fetch_bytes(file, part)
            checksum = file.checksum(part)
            if checksum is not None:
                move(part, path)
                with self._lock:
                    self.fetched_files += 1
                return checksum
            self._count(-part.stat().st_size)
            delete_file(part)
        raise InputError(
            f"{file.name} of {self.dataset.repository} came twice from {self.dataset.endpoint} "
            f"with another content than its hash, {file.sha256 or file.blob_id}, says. It was "
            "deleted. Try again later, or another mirror in HF_ENDPOINT."
        )

    def _fetch_bytes(self, file: RemoteFile, part: Path) -> None:
        """Append what `part` lacks; `http_get` continues after it."""
        url = hf_hub_url(
            self.dataset.repository,
            file.name,
            repo_type="dataset",
            revision=self.commit,
            endpoint=self.dataset.endpoint,
        )
        if part.is_file():
            self._count(part.stat().st_size)
        for pause_seconds in (*_PAUSES_SECONDS, None):
            # huggingface_hub before 2 appends the whole file where a server knows no ranges
            if part.is_file() and part.stat().st_size > file.size_bytes:
                self._count(-part.stat().st_size)
                delete_file(part)
            try:
                with writing_to(part), _PartFile(part, self.stop, self._count) as out:
                    http_get(
                        url,
                        out,
                        resume_size=out.tell(),
                        headers=dict(self._headers),
                        expected_size=file.size_bytes,
                    )
                return
            except (OSError, HTTPError) as error:
                if pause_seconds is None or not may_pass(error):
                    raise
                if self.stop.wait(pause_seconds):
                    raise _Stopped from None

    def _count(self, size_bytes: int) -> None:
        with self._lock:
            self.bar.update(size_bytes)


class _Stopped(Exception):
    """Another file failed, or the user pressed Ctrl-C."""


class _PartFile(io.BufferedWriter):
    """Appends what `http_get` reads; counts it, and ends the download when asked to."""

    def __init__(self, path: Path, stop: threading.Event, count: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._stop = stop
        self._count = count

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise _Stopped
        self._count(len(data))
        return super().write(data)


@contextmanager
def _own_bar_only() -> Iterator[None]:
    """Hide huggingface_hub's bar for each file, inside the block."""
    if are_progress_bars_disabled(_BARS_OF_HTTP_GET):
        yield
        return
    disable_progress_bars(_BARS_OF_HTTP_GET)
    try:
        yield
    finally:
        enable_progress_bars(_BARS_OF_HTTP_GET)


def require_room(folder: Path, size_bytes: int) -> None:
    """Check that the disk of a folder has room for so many more bytes."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise InputError(
            f"{folder} needs {size_bytes / 1e9:.2f} GB more, but its disk has only "
            f"{free_bytes / 1e9:.2f} GB left. Make room, or choose another folder."
        )
