"""What lies under a name may be anything: one line says what, and nothing waits or fills memory."""

from __future__ import annotations

import os
import pickle
import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.file_identity import FileIdentity
from siftclip.files import read_json, read_npy, read_npz
from siftclip.reading import (
    open_file,
    read_bytes,
    read_text,
    readable,
    reason_of,
    require_file,
)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # a socket's path is short
        made.bind(path.name)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (Path.mkdir, "cannot be read: Is a directory"),
    "pipe": (os.mkfifo, "cannot be read: it is a named pipe, not a file"),
    "socket": (make_socket, "cannot be read: (it is a socket|No such device)"),
    "loop": (
        lambda path: path.symlink_to(path.name),
        "cannot be read: Too many levels of symbolic",
    ),
    "device": (lambda path: path.symlink_to("/dev/zero"), "cannot be read: it is a device"),
    "nowhere": (lambda path: path.symlink_to("nowhere"), "does not exist"),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_no_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = NO_FILES[name]
    path = tmp_path / "a.json"
    make(path)
    start = time.monotonic()
    for read in (open_file, require_file, read_bytes, read_text, read_json, read_npy):
        with pytest.raises(InputError, match=rf"a\.json {message}"):
            read(path)
    with pytest.raises(InputError, match=r"a\.json"):
        read_npz(path, ["a"])
    with pytest.raises(InputError, match=r"a\.json cannot be read"):
        FileIdentity.of(path)
    assert time.monotonic() - start < 5  # opening a pipe waits for whoever writes to it


def test_names_that_no_file_has(tmp_path: Path) -> None:
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(InputError, match="cannot be read"):
            open_file(f"{tmp_path}/{name}")


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no space
    with pytest.raises(InputError, match=r"a\.json has 1,099,511,627,776 bytes. Such a file has"):
        read_json(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, most=5) == b"12345"
    with pytest.raises(InputError, match="at most 4"):
        read_bytes(path, most=4)


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode("utf-8-sig"))
    assert read_text(path) == "é"
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"a\.txt must be UTF-8 text"):
        read_text(path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(5, "Input/output error"), "Input/output error"),
        (ValueError("two\n  lines."), "two lines"),
        (MemoryError(), "it asks for more memory than there is"),
        (RecursionError("maximum"), "it is nested too deeply"),
        (KeyError("a"), "KeyError 'a'"),
        (AttributeError(), "AttributeError"),
        (ValueError("x" * 1000), "x" * 300 + "..."),
    ],
)
def test_reasons(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
    with pytest.raises(InputError) as caught, readable("a.npz", "npz file"):
        raise error
    assert str(caught.value) == f"a.npz is not a readable npz file: {reason}."


def test_own_errors_pass() -> None:
    with pytest.raises(InputError, match=r"^mine$"), readable("a", "file"):
        raise InputError("mine")


@pytest.mark.parametrize("mapped", [False, True])
def test_arrays(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.npy"
    for array in (np.arange(6.0).reshape(2, 3), np.zeros((0, 4)), np.asarray(3), np.eye(3).T):
        np.save(path, array)
        assert np.array_equal(read_npy(path, mapped=mapped), array)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="object arrays would be unpickled"):
        read_npy(path, mapped=mapped)
    np.save(path, np.zeros(100))
    whole = path.read_bytes()
    for wrong in (
        whole[:-1],
        whole.replace(b"(100,)", b"(999,)"),
        whole.replace(b"(100,)", b"(-1,) "),
        whole.replace(b"(100,)", b"(9999999999999999999,)"),
        b"",
        pickle.dumps(3),
    ):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=r"a\.npy is not a readable npy file"):
            read_npy(path, mapped=mapped)


def test_an_npz_with_one_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(2))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.npy", archive.read("a.npy"))
    with pytest.raises(InputError, match="two members of one name"):
        read_npz(path, ["a"])
