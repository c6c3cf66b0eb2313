"""What cannot be written is told in one message, whichever library writes, and leaves nothing."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from siftclip import writing
from siftclip.agreement import agreed
from siftclip.errors import InputError
from siftclip.files import append_jsonl, write_json, write_npy, write_npz, write_text
from siftclip.locks import locked
from siftclip.ranks import OneRank
from siftclip.trainer.online.record import ChosenRows
from siftclip.writing import (
    WriteError,
    atomic_path,
    delete,
    delete_empty_folders,
    delete_file,
    delete_folder,
    delete_inside,
    is_abandoned,
    make_folder,
    move,
    new_folder_whole,
    place_folder,
    temporary_beside,
    temporary_folder,
    writing_to,
)

SIZE = 1 << 20  # bytes of what each library writes
Write = Callable[[Path], object]


def _torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"a": torch.zeros(SIZE)}, file)


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(SIZE))


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(SIZE))


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"a": np.random.default_rng(0).integers(0, 2**60, SIZE)}), path)


def _csv(path: Path) -> None:
    pd.DataFrame({"a": np.arange(SIZE)}).to_csv(path)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a")
        info.size = SIZE
        with Path("/dev/zero").open("rb") as zeros:
            archive.addfile(info, zeros)


LIBRARIES: dict[str, Write] = {
    "numpy npy": _npy,
    "numpy npz": _npz,
    "torch": _torch,
    "safetensors": lambda path: save_file({"a": torch.zeros(SIZE)}, path),
    "pyarrow": _parquet,
    "pandas csv": _csv,
    "pandas parquet": lambda path: pd.DataFrame({"a": np.arange(SIZE)}).to_parquet(path),
    "tarfile": _tar,
    "text": lambda path: path.write_text("a" * SIZE),
    "pickle": lambda path: path.write_bytes(pickle.dumps(np.zeros(SIZE))),
}


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size: the write that would do so fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_that_writes(library: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")

    def write() -> None:
        with atomic_path(path) as temporary:
            LIBRARIES[library](temporary)

    with largest_file(5000), pytest.raises(WriteError, match=r"/a cannot be written: ") as caught:
        write()
    assert caught.value.number in (errno.EFBIG, errno.ENOSPC)  # numpy says no number
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]
    write()  # once there is room
    assert path.stat().st_size > 5000


# ---- what is in the way --------------------------------------------------------------------------
def test_a_file_where_a_folder_must_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "c.json"):
        with pytest.raises(WriteError, match=rf"{tmp_path}/a is a file, where a folder must be\."):
            write_json(path, {})
    with pytest.raises(WriteError, match="is a file, where a folder must be"):
        make_folder(tmp_path / "a")


def test_a_folder_where_a_file_must_be(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(WriteError, match=r"/a cannot be written: a folder has that name"):
        write_text(tmp_path / "a", "")
    with pytest.raises(WriteError, match="a folder has that name"):
        append_jsonl(tmp_path / "a", {})
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.mark.parametrize("name", ["a" * 300, "/".join(["a" * 200] * 30)])
def test_a_name_that_is_too_long(name: str, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="the name is too long"):
        write_text(tmp_path / name, "")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"its disk is full \(No space left on device\)\. Make room, and the same"),
        (errno.EDQUOT, r"the disk quota is used up\. Make room"),
        (errno.EROFS, r"its file system is read-only\. Choose another folder; or put it right"),
        (errno.EACCES, "you have no permission to write there"),
        (errno.ESTALE, "its folder is gone, as after its disk was unmounted"),
        (errno.EIO, "its disk reports an input/output error"),
        (errno.EMFILE, r"too many files are open \(ulimit -n\)\. Raise that limit"),
        (errno.ELOOP, "its symbolic links lead in a circle"),
        (errno.ENOTEMPTY, "a folder with files has that name"),
    ],
)
def test_the_reason_is_said_in_words(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WriteError, match=words):
        write_text(tmp_path / "a", "")
    with pytest.raises(WriteError, match=words):
        move(tmp_path / "b", tmp_path / "a")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/data/shards/0.tar"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        TimeoutError("no answer"),
        ValueError("not JSON"),
        OSError("a server's own words"),
        RuntimeError("something else"),
        InputError("our own"),
    ],
)
def test_what_fails_elsewhere_passes_through(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, writing_to(tmp_path / "a"):
        raise error
    assert caught.value is error


def test_deleting_says_what_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete_file(tmp_path / "none")
    delete_folder(tmp_path / "none")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(WriteError, match="no permission"):
        delete_file(tmp_path / "a")
    with pytest.raises(WriteError, match="no permission"):
        delete_folder(tmp_path / "a")


@pytest.mark.parametrize("before", ["nothing", "file", "folder", "link"])
def test_a_folder_gets_its_name_in_place_of_what_was_there(before: str, tmp_path: Path) -> None:
    place, other = tmp_path / "place", tmp_path / "other"
    for folder in (other, *([place] if before == "folder" else [])):
        folder.mkdir()
        (folder / "old").write_text("")
    if before == "file":
        place.write_text("old")
    elif before == "link":
        place.symlink_to(other)
    temporary = temporary_beside(place)
    temporary.mkdir()
    (temporary / "new").write_text("")
    place_folder(temporary, place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "place"]
    assert [path.name for path in place.iterdir()] == ["new"]
    assert (other / "old").exists()
    delete(place)
    delete(place)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_folder_that_is_deleted_loses_its_name_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "step-2.ckpt"
    place.mkdir()
    (place / "part").write_text("")
    rmtree = shutil.rmtree

    def fail(path: Path) -> None:
        if path.exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", fail)
    with pytest.raises(WriteError, match="no permission"):
        delete(place)
    (left,) = tmp_path.iterdir()
    assert left == temporary_beside(place)
    monkeypatch.setattr("shutil.rmtree", rmtree)
    delete(left)  # as the next start does
    assert not [*tmp_path.iterdir()]


def test_temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary_folder(".plan-", tmp_path / "new") as folder:
        assert folder.parent == tmp_path / "new"
        (folder / "a").write_text("")
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError), temporary_folder(".plan-", tmp_path / "file"):
        pass
    monkeypatch.setattr("tempfile._get_candidate_names", lambda: iter(()))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "file")])
    monkeypatch.setenv("TMPDIR", "/full")
    with pytest.raises(WriteError, match=r"/full cannot be written"), temporary_folder():
        pass


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with new_folder_whole(folder):
            write_text(folder / "a", "")
            raise KeyboardInterrupt

    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "b").write_text("")
    for name in ("new", "empty", "used"):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / name)
    assert [*tmp_path.iterdir()] == [tmp_path / "used"]
    assert {path.name for path in (tmp_path / "used").iterdir()} == {"a", "b"}


# ---- to other processes and ranks ----------------------------------------------------------------
def test_it_goes_to_another_process_whole(tmp_path: Path) -> None:
    error = WriteError(tmp_path / "a", errno.ENOSPC, "The run")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(copy) is WriteError
    assert str(copy) == str(error)
    assert str(error).startswith(f"The run cannot be written: {tmp_path / 'a'}: its disk is full")
    assert "another folder with run_dir=FOLDER" in copy.told_with("run_dir=FOLDER")


def test_ranks_agree_on_it_without_losing_its_kind(tmp_path: Path) -> None:
    def write() -> None:
        raise WriteError(tmp_path / "a", errno.ENOSPC)

    with pytest.raises(WriteError):
        agreed(OneRank(), write)


def test_a_lock_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with (
        pytest.raises(WriteError, match=r"^The run cannot be written: .*/a/\.lock: .*is a file"),
        locked(tmp_path / "a" / ".lock", owner="The run"),
    ):
        pass


# ---- real disks: a tmpfs -------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system; unmount it afterwards."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("needs root, and the right to mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_full_disk_and_then_room(library: str, small_disk: Callable[..., Path]) -> None:
    disk = small_disk("size=64k")
    for _ in range(2):  # what the first one began is gone
        with (
            pytest.raises(WriteError, match=r"its disk is full"),
            atomic_path(disk / "a") as temporary,
        ):
            LIBRARIES[library](temporary)
        assert [*disk.iterdir()] == []
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    with atomic_path(disk / "a") as temporary:
        LIBRARIES[library](temporary)
    assert [*disk.iterdir()] == [disk / "a"]


def test_a_read_only_disk(small_disk: Callable[..., Path]) -> None:
    disk = small_disk("size=64k")
    (disk / "a").write_text("")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for write in (
        lambda: write_text(disk / "b", ""),
        lambda: append_jsonl(disk / "a", {}),
        lambda: make_folder(disk / "c" / "d"),
        lambda: delete_file(disk / "a"),
        lambda: write_npz(disk / "c" / "b", a=np.zeros(3)),
        lambda: write_npy(disk / "b", np.zeros(3)),
    ):
        with pytest.raises(WriteError, match="its file system is read-only"):
            write()


def test_a_memory_map_on_a_full_disk_does_not_kill_the_process(
    small_disk: Callable[..., Path],
) -> None:
    """A sparse file would be mapped, and writing to it end the process with SIGBUS."""
    disk = small_disk("size=64k")
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from siftclip.trainer.online.record import ChosenRows\n"
        "from siftclip.writing import WriteError\n"
        "rows = ChosenRows(Path(sys.argv[1]), steps=1000, samples=1000)\n"
        "try: rows.write(999, np.arange(1000))\n"
        "except WriteError as error: print(error)\n"
    )
    path = disk / "chosen.npy"
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "chosen.npy cannot be written: its disk is full" in result.stdout
    assert [*disk.iterdir()] == []
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    rows = ChosenRows(path, steps=4, samples=3)
    rows.write(1, np.arange(3))
    assert np.load(path).tolist() == [[-1] * 3, [0, 1, 2], [-1] * 3, [-1] * 3]


def test_a_forbidden_folder(tmp_path: Path) -> None:
    """As another user where it can be: permission bits do not hold root back."""
    folder = tmp_path / "a"
    folder.mkdir(mode=0o500)
    with _as_nobody(), pytest.raises(WriteError, match="no permission"):
        write_text(folder / "b", "")


@contextmanager
def _as_nobody() -> Iterator[None]:
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_what_killed_processes_left_is_deleted(tmp_path: Path) -> None:
    own = temporary_beside(tmp_path / "a.npy")
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = (own.name.replace(str(os.getpid()), str(pid)) for pid in (dead.pid, os.getppid()))
    left, living = (tmp_path / name for name in names)
    elsewhere = tmp_path / f".a.npy.00000000-{dead.pid}.tmp"  # another machine's
    others = tmp_path / ".thesis.tex.1.tmp"
    long_ago = tmp_path / f".b.npy.00000000-{dead.pid}.tmp"
    for path in (left, living, elsewhere, others, long_ago):
        path.touch()
    week_ago = time.time() - 8 * 86_400
    for path in (long_ago, others):
        os.utime(path, (week_ago, week_ago))
    folder = tmp_path / left.name.replace("a.npy", "table")
    folder.mkdir()
    writing._swept.clear()
    with atomic_path(tmp_path / "b.npy") as temporary:
        temporary.write_text("b")
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"b.npy", living.name, elsewhere.name, others.name}


# ---- deleting inside a folder -------------------------------------------------------------------
def test_a_file_inside_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    for name in ("a/b/x", "a/b/y"):
        (root / name).write_text(name)
    assert delete_inside(root, "a/b/x")
    assert not delete_inside(root, "a/b/x")
    assert not delete_inside(root, "nowhere/x")
    assert [path.name for path in (root / "a" / "b").iterdir()] == ["y"]
    delete_empty_folders(root, "a")
    assert (root / "a" / "b" / "y").exists()
    delete_inside(root, "a/b/y")
    delete_empty_folders(root, "a")
    assert root.is_dir()
    assert not list(root.iterdir())
    delete_empty_folders(root, "a")


def test_no_link_is_followed_on_the_way(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    (outside / "deep").mkdir(parents=True)
    (outside / "x").write_text("x")
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "x")
    with pytest.raises(WriteError):
        delete_inside(root, "link/x")
    for place in ("link", "link/deep"):  # a link is no empty folder
        delete_empty_folders(root, place)
    assert (outside / "x").exists()
    assert (outside / "deep").exists()
    assert (root / "link").is_symlink()
    assert delete_inside(root, "file")  # the link itself
    assert not (root / "file").is_symlink()
    assert (outside / "x").exists()


@pytest.mark.parametrize("place", ["../x", "a/../../x", "/x", "a//x", "./x", ""])
def test_no_path_leads_out(place: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "x").write_text("x")
    with pytest.raises((ValueError, WriteError)):
        delete_inside(root, place)
    assert (tmp_path / "x").exists()


def test_which_temporary_files_are_abandoned(tmp_path: Path) -> None:
    own = temporary_beside(tmp_path / "a")
    own.touch()
    assert not is_abandoned(own)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = own.with_name(own.name.replace(f"-{os.getpid()}.", f"-{process.pid}."))
    dead.touch()
    assert is_abandoned(dead)
    assert not is_abandoned(tmp_path / ".a.tmp")
