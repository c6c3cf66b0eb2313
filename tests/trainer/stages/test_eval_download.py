from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.eval.download.checksums import TaskChecksums, hash_files, write_checksums
from siftclip.eval.tasks.known_tasks import KNOWN_TASKS
from siftclip.locks import LOCK_NAME, HeldError, locked
from siftclip.trainer.settings.commands import DownloadCommand
from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.evaluation import EvalSettings
from siftclip.trainer.settings.fields.reader import read
from siftclip.trainer.settings.tools import DownloadSettings
from siftclip.trainer.stages import eval_download
from siftclip.trainer.stages.eval_download import Downloaded, download_stage

CAPTIONS = "retrieval/flickr_1k_test_image_text_retrieval"
FILES = {"dataset_type.txt": b"retrieval\n", "test/nshards.txt": b"1\n", "test/0.tar": b"pictures"}


@pytest.fixture
def download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Downloaded, list[str]]]:
    """Download a task that is converted; its words, and what was done. The network is not asked."""
    done: list[str] = []

    def fetch(repository: str, source: Path, **options: Any) -> None:
        done.append("fetched")
        source.mkdir(parents=True)

    def convert(source: Path, folder: Path, kind: str) -> int:
        done.append("converted")
        with pytest.raises(HeldError), locked(folder / LOCK_NAME, owner="another"):
            pass
        for name, data in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        files = hash_files(folder, FILES)
        record = TaskChecksums(repository="", revision="", commit="", splits=("test",), files=files)
        write_checksums(folder, record)
        return 5

    monkeypatch.setattr(eval_download, "download_source", fetch)
    monkeypatch.setattr(eval_download, "convert_task", convert)

    def run(verify: bool = False) -> tuple[Downloaded, list[str]]:
        done.clear()
        settings = {
            "folder": str(tmp_path), "workers": 1, "splits": ["test"], "repositories": [],
            "verify": verify,
        }  # fmt: skip
        command = DownloadCommand(
            common=CommonSettings(progress=False),
            eval=EvalSettings(tasks=(CAPTIONS,)),
            download=read(DownloadSettings, settings, "download"),
        )
        (one,) = download_stage(command)
        return one, [*done]

    return run


def test_a_converted_task_is_there_while_its_files_are(
    tmp_path: Path, download: Callable[..., tuple[Downloaded, list[str]]]
) -> None:
    one, done = download()
    assert (one.failed, one.words) == (False, "5 samples, converted")
    assert one.folder == tmp_path / KNOWN_TASKS[CAPTIONS].folder
    assert not (tmp_path / ".sources" / one.folder.name).exists()
    assert done == ["fetched", "converted"]
    assert download()[1] == download(verify=True)[1] == []
    assert download()[0].words == "there already"
    tar = one.folder / "test" / "0.tar"
    tar.write_bytes(b"Pictures")
    assert download()[1] == []  # of the same size
    assert download(verify=True)[1] == ["fetched", "converted"]
    tar.write_bytes(b"short")
    assert download()[1] == ["fetched", "converted"]
    tar.unlink()
    assert download()[1] == ["fetched", "converted"]
    assert tar.read_bytes() == b"pictures"


def test_one_process_at_a_time_converts_a_task(
    tmp_path: Path, download: Callable[..., tuple[Downloaded, list[str]]]
) -> None:
    with locked(tmp_path / KNOWN_TASKS[CAPTIONS].folder / LOCK_NAME, owner="another"):
        one, done = download()
    assert one.failed
    assert "is being written by process" in one.words
    assert done == []
    assert not download()[0].failed
