"""Downloads from a small server that speaks what huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from siftclip.errors import InputError
from siftclip.eval.download import hub
from siftclip.eval.download.checksums import CHECKSUMS_FILE, read_checksums, verify_task
from siftclip.eval.download.tasks import DownloadReport, download_source, download_task
from siftclip.eval.tasks.task import read_task
from siftclip.locks import LOCK_NAME, locked
from siftclip.progress import Progress, show_progress

REPOSITORY = "someone/wds_things_test"
COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_secret"


@dataclass
class FakeHub:
    """One data set. Tars are redirected to a second server, as large files are on the hub."""

    files: dict[str, bytes]
    commit: str = COMMIT
    wrong: dict[str, int] = field(default_factory=dict)  # how often a byte is changed
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes sent by each answer
    status: tuple[int, str] | None = None  # of every answer, with X-Error-Code
    page: bytes | None = None  # every answer is this
    without_range: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    endpoint: str = ""
    storage: str = ""

    def fetched(self, name: str) -> list[dict[str, str]]:
        """The headers of the requests for a file's bytes."""
        address = "/storage/" if name.endswith(".tar") else "/resolve/"
        return [head for _, path, head in self.requests if address in path and name in path]


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the hub does; `fake` says what it has."""

    fake: FakeHub

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.fake.requests.append((self.command, path, dict(self.headers)))
        root = f"/api/datasets/{REPOSITORY}"
        if self.fake.status is not None:
            self.answer(self.fake.status[0], b"{}", {"X-Error-Code": self.fake.status[1]})
        elif self.fake.page is not None:
            self.answer(200, self.fake.page)
        elif path.startswith(f"{root}/tree/{self.fake.commit}"):
            self.answer(200, json.dumps([self.entry(name) for name in self.fake.files]).encode())
        elif path in (root, f"{root}/revision/main", f"{root}/revision/{self.fake.commit}"):
            about = {"_id": "1", "id": REPOSITORY, "sha": self.fake.commit, "siblings": []}
            self.answer(200, json.dumps(about).encode())
        elif path.startswith(f"{root}/revision/"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/datasets/{REPOSITORY}/resolve/{self.fake.commit}/"):
            name = path.partition(f"/{self.fake.commit}/")[2]
            if name.endswith(".tar"):
                self.answer(302, b"", {"Location": f"{self.fake.storage}/storage/{name}"})
            else:
                self.answer_file(name)
        elif path.startswith("/storage/"):
            self.answer_file(path.removeprefix("/storage/"))
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def entry(self, name: str) -> dict[str, Any]:
        data = self.fake.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if name.endswith(".tar"):
            entry["oid"] = "f" * 40  # the pointer's
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return entry

    def answer_file(self, name: str) -> None:
        data = self.fake.files[name]
        if self.fake.wrong.get(name, 0) > 0:
            self.fake.wrong[name] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if "Range" in self.headers and not self.fake.without_range:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": '"x"', "X-Repo-Commit": self.fake.commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.fake.cut_after.get(name)
        body = data[start:]
        self.answer(206 if start else 200, body, headers, send=cuts.pop(0) if cuts else len(body))

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        send: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def fake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_task: Callable[..., Path]
) -> Iterator[FakeHub]:
    """A hub with the files of a real task, and some that are not to be fetched."""
    task = make_task(tmp_path / "original", shards=2)
    files = {
        str(path.relative_to(task)): path.read_bytes() for path in task.rglob("*") if path.is_file()
    }
    files |= {
        "README.md": b"#",
        "things.py": b"import os",
        "test/evil.py": b"import os",
        "test/index.tar": b"not a number",
        "train/nshards.txt": b"1",
        "train/0.tar": files["test/1.tar"],
    }
    fake = FakeHub(files)
    for variable in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # no look into the user's home, and no request to huggingface.co, for the user agent's text
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of http_get, before it tries again
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what a cut may lose
    monkeypatch.setattr(hub, "_PAUSES_SECONDS", (0.0, 0.0))
    servers = [
        ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"fake": fake}))
        for _ in range(2)
    ]
    fake.endpoint, fake.storage = (f"http://127.0.0.1:{s.server_port}" for s in servers)
    threads = [
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        for server in servers
    ]
    for thread in threads:
        thread.start()
    yield fake
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


def download(fake: FakeHub, folder: Path, **options: Any) -> DownloadReport:
    options = {"workers": 2, "progress": False, **options}
    return download_task(REPOSITORY, folder, endpoint=fake.endpoint, **options)


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


LAYOUT = {
    "classnames.txt",
    "dataset_type.txt",
    "zeroshot_classification_templates.txt",
    "test/nshards.txt",
    "test/0.tar",
    "test/1.tar",
}


# ---- a complete download ------------------------------------------------------------------------


def test_fetches_the_layout_and_nothing_else(fake: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "wds_things"
    report = download(fake, folder)
    assert written(folder) - {LOCK_NAME} == LAYOUT | {CHECKSUMS_FILE}
    for name in LAYOUT:
        assert (folder / name).read_bytes() == fake.files[name]
    assert (report.commit, report.files, report.fetched_files) == (COMMIT, 6, 6)
    assert report.size_bytes == sum(len(fake.files[name]) for name in LAYOUT)
    assert report.damaged == ()
    record = json.loads((folder / CHECKSUMS_FILE).read_text())
    assert (record["repository"], record["commit"]) == (REPOSITORY, COMMIT)
    assert record["files"] == {
        name: {
            "size": len(fake.files[name]),
            "sha256": hashlib.sha256(fake.files[name]).hexdigest(),
        }
        for name in LAYOUT
    }
    assert len(read_task(folder).shards) == 2
    assert not (tmp_path / "hf").exists()


def test_the_token_goes_to_the_hub_and_not_to_the_storage(fake: FakeHub, tmp_path: Path) -> None:
    download(fake, tmp_path / "task")
    for _, path, headers in fake.requests:
        sent = {key.lower(): value for key, value in headers.items()}.get("authorization")
        assert sent == (None if path.startswith("/storage/") else f"Bearer {TOKEN}"), path


def test_a_second_call_asks_nothing(fake: FakeHub, tmp_path: Path) -> None:
    first = download(fake, tmp_path / "task")
    fake.requests.clear()
    for options in ({}, {"revision": COMMIT}, {"verify": True}):
        again = download(fake, tmp_path / "task", **options)
        assert (again.fetched_files, again.damaged) == (0, ())
        assert (again.commit, again.size_bytes) == (first.commit, first.size_bytes)
    assert fake.requests == []


def test_a_complete_download_may_be_read_only(fake: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    download(fake, folder)
    with locked(folder / LOCK_NAME, owner="another"):  # nobody needs the lock to read
        assert download(fake, folder).fetched_files == 0


def test_other_splits_are_added(fake: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    download(fake, folder)
    fake.requests.clear()
    assert download(fake, folder, splits=("train",)).fetched_files == 2
    assert {"train/0.tar", "train/nshards.txt"} <= written(folder)
    assert fake.fetched("test/0.tar") == []  # kept
    known = read_checksums(folder)
    assert known is not None
    assert known.splits == ("test", "train")
    assert download(fake, folder, splits=("test", "train")).fetched_files == 0


def test_another_revision_replaces_what_differs(fake: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    download(fake, folder)
    fake.commit = "d" * 40
    fake.files["classnames.txt"] = b"a\nb"
    assert download(fake, folder).commit == COMMIT  # what is there
    report = download(fake, folder, revision="main")
    assert (report.commit, report.fetched_files) == ("d" * 40, 1)
    assert (folder / "classnames.txt").read_bytes() == b"a\nb"
    (folder / "classnames.txt").unlink()
    assert download(fake, folder).damaged == ("classnames.txt",)
    fake.requests.clear()
    assert download(fake, folder, revision="main").fetched_files == 0
    assert fake.requests == []


def test_a_bar_counts_the_bytes_once(
    fake: FakeHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bars: list[Any] = []

    def opened(**options: Any) -> Progress:
        bars.append(show_progress(**options))
        return bars[-1]

    monkeypatch.setattr("siftclip.progress.draws_bars", lambda: True)
    monkeypatch.setattr(hub, "show_progress", opened)
    download(fake, tmp_path / "task", progress=True)
    errors = capsys.readouterr().err
    assert "\rtask: " in errors
    assert "0.tar" not in errors  # no second bar
    (tmp_path / "task" / CHECKSUMS_FILE).unlink()
    assert download(fake, tmp_path / "task", progress=True).fetched_files == 0
    assert "\rtask: " in capsys.readouterr().err
    assert [bar.n / bar.total for bar in bars] == [1.0, 1.0]
    download(fake, tmp_path / "other")
    assert capsys.readouterr().err == ""


# ---- broken downloads ---------------------------------------------------------------------------


def test_goes_on_within_a_file_after_a_cut(fake: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    fake.cut_after["test/0.tar"] = [1000] + [0] * 30
    with pytest.raises(InputError, match="Run this again to continue"):
        download(fake, folder)
    assert not (folder / CHECKSUMS_FILE).exists()
    assert not (folder / "test" / "0.tar").exists()
    fake.cut_after.clear()
    fake.requests.clear()
    download(fake, folder)
    assert [head["Range"] for head in fake.fetched("test/0.tar")] == ["bytes=1000-"]
    assert verify_task(folder) == []
    assert (folder / "test" / "0.tar").read_bytes() == fake.files["test/0.tar"]
    assert written(folder) - {LOCK_NAME} == LAYOUT | {CHECKSUMS_FILE}  # no unfinished file is left


def test_a_cut_is_healed_in_the_same_call(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut_after["test/1.tar"] = [700, 700]
    assert download(fake, tmp_path / "task").fetched_files == 6
    assert verify_task(tmp_path / "task") == []
    assert len(fake.fetched("test/1.tar")) == 3


def test_a_server_without_ranges_begins_anew(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut_after["test/0.tar"] = [1000]
    fake.without_range = True
    download(fake, tmp_path / "task")
    assert (tmp_path / "task/test/0.tar").read_bytes() == fake.files["test/0.tar"]


def test_a_changed_file_does_not_continue_the_old_one(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut_after["test/0.tar"] = [1000] + [0] * 30
    with pytest.raises(InputError):
        download(fake, tmp_path / "task")
    fake.cut_after.clear()
    fake.requests.clear()
    fake.commit = "d" * 40
    fake.files["test/0.tar"] = fake.files["test/0.tar"][::-1]
    download(fake, tmp_path / "task")
    assert all("Range" not in head for head in fake.fetched("test/0.tar"))
    assert (tmp_path / "task/test/0.tar").read_bytes() == fake.files["test/0.tar"]
    assert not list(tmp_path.rglob("*.part"))


def test_ctrl_c_leaves_a_state_to_go_on_from(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "task"

    def interrupt(futures: dict[Any, Any]) -> Iterator[Any]:
        yield next(as_completed(futures))
        raise KeyboardInterrupt

    class Kept(hub._Fetch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    made: list[Kept] = []
    with monkeypatch.context() as patch:
        patch.setattr(hub, "as_completed", interrupt)
        patch.setattr(hub, "_Fetch", Kept)
        with pytest.raises(KeyboardInterrupt):
            download(fake, folder, workers=1)
    assert not (folder / CHECKSUMS_FILE).exists()
    assert made[0].stop.is_set()
    there = written(folder) & LAYOUT
    assert there
    fake.requests.clear()
    assert download(fake, folder).fetched_files == 6 - len(there)
    assert all(fake.fetched(name) == [] for name in there)
    assert verify_task(folder) == []


def test_a_stop_ends_a_file_at_its_next_block(tmp_path: Path) -> None:
    stop = threading.Event()
    counted: list[int] = []
    with hub._PartFile(tmp_path / "part", stop, counted.append) as out:
        out.write(b"abc")
        stop.set()
        with pytest.raises(hub._Stopped):
            out.write(b"def")
    assert (tmp_path / "part").read_bytes() == b"abc"
    assert counted == [3]


@pytest.mark.parametrize("name", ["test/0.tar", "classnames.txt"])  # by SHA-256, by git's hash
@pytest.mark.parametrize("times", [1, 2])
def test_wrong_content_is_fetched_once_more(
    fake: FakeHub, tmp_path: Path, name: str, times: int
) -> None:
    folder = tmp_path / "task"
    fake.wrong[name] = times
    if times == 1:
        download(fake, folder)
        assert (folder / name).read_bytes() == fake.files[name]
    else:
        with pytest.raises(InputError, match=rf"{name} of {REPOSITORY} came twice"):
            download(fake, folder)
        assert not (folder / name).exists()
        assert not list(folder.rglob(f"*{Path(name).name}*.part"))
        assert not (folder / CHECKSUMS_FILE).exists()
    assert len(fake.fetched(name)) == 2


def test_damage_on_the_disk_is_found_and_mended(fake: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    download(fake, folder)
    data = fake.files["test/0.tar"]
    (folder / "test/0.tar").write_bytes(data[:-1] + b"x")
    (folder / "classnames.txt").unlink()
    (folder / "test/nshards.txt").write_bytes(b"22")
    assert verify_task(folder) == ["classnames.txt", "test/0.tar", "test/nshards.txt"]
    report = download(fake, folder)  # sizes only
    assert report.damaged == ("classnames.txt", "test/nshards.txt")
    shutil.copyfile(folder / "test/1.tar", folder / "test/0.tar")
    fake.commit, old = "d" * 40, fake.commit
    with pytest.raises(InputError):  # never another commit's
        download(fake, folder, verify=True)
    fake.commit = old
    download(fake, folder, verify=True)
    assert verify_task(folder) == []
    assert (folder / "test/0.tar").read_bytes() == data
    (folder / "test/0.tar").unlink()
    fake.wrong["test/0.tar"] = 2
    with pytest.raises(InputError, match="came twice"):
        download(fake, folder)
    assert not (folder / CHECKSUMS_FILE).exists()


def test_verify_task_needs_a_complete_download(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=CHECKSUMS_FILE):
        verify_task(tmp_path)
    (tmp_path / CHECKSUMS_FILE).write_text('{"files": {}}')
    with pytest.raises(InputError, match="not a record of checksums"):
        verify_task(tmp_path)


# ---- what users meet ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil.txt", "test/../../evil.tar", "/evil.txt", "test\\..\\..\\evil.txt", "C:x.txt"]
)
def test_names_that_lead_out_are_refused(fake: FakeHub, tmp_path: Path, name: str) -> None:
    fake.files[name] = b"evil"
    with pytest.raises(InputError, match="may lead out of the task folder"):
        download(fake, tmp_path / "task")
    assert written(tmp_path / "task") <= {LOCK_NAME}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "has no data set someone/wds_things_test.*HF_TOKEN"),
        (401, "RepoNotFound", "has no data set someone/wds_things_test.*HF_TOKEN"),
        (403, "GatedRepo", "is gated.*HF_TOKEN"),
        (404, "RevisionNotFound", "no such revision"),
        (401, "", "answered 401.*HF_TOKEN"),
        (403, "", "answered 403.*HF_TOKEN"),
        (402, "", "answered 402.*Try again later"),
    ],
)
def test_refusals_of_the_hub(
    fake: FakeHub, tmp_path: Path, status: int, code: str, message: str
) -> None:
    fake.status = (status, code)
    with pytest.raises(InputError, match=message):
        download(fake, tmp_path / "task")


def test_no_network_and_offline(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"HF_ENDPOINT.*HTTPS_PROXY"):
        download_task(REPOSITORY, tmp_path / "task", endpoint="http://127.0.0.1:9", progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        download(fake, tmp_path / "task")


def test_a_page_of_a_proxy_is_no_hub(fake: FakeHub, tmp_path: Path) -> None:
    fake.page = b"<html>Sign in</html>"
    with pytest.raises(InputError, match=r"does not answer .* as a Hugging Face hub does"):
        download(fake, tmp_path / "task")


def test_a_full_disk(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10, 9, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(InputError, match="more, but its disk has only"):
            download(fake, tmp_path / "task")

    def write(self: object, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub._PartFile, "write", write)
    with pytest.raises(InputError, match="its disk is full"):
        download(fake, tmp_path / "task")
    tried = Counter(path for _, path, _ in fake.requests if "/resolve/" in path)
    assert max(tried.values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ("../x",)}, "A split must be the name of a folder"),
        ({"splits": ("val",)}, r"must hold val/nshards\.txt and val/0\.tar"),
        ({"workers": 0}, "workers must be an integer of at least 1"),
        ({"revision": "no-such"}, "no such revision"),
    ],
)
def test_wrong_options(
    fake: FakeHub, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        download(fake, tmp_path / "task", **options)


def test_wrong_repositories_and_folders(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="named owner/name"):
        download_task("a/b/c", tmp_path / "x", endpoint=fake.endpoint, progress=False)
    with pytest.raises(InputError, match="must begin with https"):
        download_task("a/b", tmp_path / "x", endpoint="hub", progress=False)
    folder = tmp_path / "task"
    download(fake, folder)
    with pytest.raises(InputError, match="holds the task of someone/wds_things_test"):
        download_task("someone/else", folder, endpoint=fake.endpoint, progress=False)
    with (
        locked(tmp_path / "y" / LOCK_NAME, owner="another"),
        pytest.raises(InputError, match="y is being written by process"),
    ):
        download(fake, tmp_path / "y")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        download(fake, tmp_path / "file")


# ---- tasks in another form ----------------------------------------------------------------------


def test_download_source_prefers_parquet_and_takes_no_code(fake: FakeHub, tmp_path: Path) -> None:
    fake.files = {
        "load.py": b"import os",
        "dataset_infos.json": b"{}",
        "images.zip": b"PK",
        "data/table.csv": b"a,b",
    }
    folder = tmp_path / "zip"
    source = {"endpoint": fake.endpoint, "progress": False}
    assert download_source(REPOSITORY, folder, **source).files == 2
    assert written(folder) - {LOCK_NAME, CHECKSUMS_FILE} == {"images.zip", "data/table.csv"}
    fake.files["TEST/test/0000.parquet"] = b"PAR1"
    assert download_source(REPOSITORY, tmp_path / "parquet", **source).files == 1
    fake.files = {"load.py": b"import os"}
    with pytest.raises(InputError, match=r"must hold parquet files.*load\.py"):
        download_source(REPOSITORY, tmp_path / "none", **source)
