"""What is kept and damaged is set aside, and never overwritten or lost."""

from __future__ import annotations

import copy
import errno
import logging
import os
from pathlib import Path

import pytest

from siftclip import damaged
from siftclip.damaged import set_aside, set_aside_if_damaged
from siftclip.errors import DamagedError, InputError
from siftclip.files import read_json


def test_each_damaged_file_keeps_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    for content in ("first", "second", "third"):
        path.write_text(content)
        set_aside(path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "kept.json.damaged": "first",
        "kept.json.damaged-2": "second",
        "kept.json.damaged-3": "third",
    }
    assert set_aside(path) is None


def test_folders_pipes_and_loops_are_set_aside_too(tmp_path: Path) -> None:
    folder, pipe, loop = (tmp_path / name for name in ("folder", "pipe", "loop"))
    folder.mkdir()
    os.mkfifo(pipe)
    loop.symlink_to(loop.name)
    for path in (folder, pipe, loop):
        assert set_aside(path) is not None
        assert not os.path.lexists(path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_file_is_said_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = tmp_path / "kept.json", tmp_path / "beside.npy"
    path.write_text('{"half": ')
    other.write_text("")
    with caplog.at_level(logging.WARNING), set_aside_if_damaged(path, other):
        read_json(path)
    assert "kept.json must be a JSON file" in caplog.text
    assert "what was there is now kept.json.damaged, beside.npy.damaged" in caplog.text
    assert not path.exists()
    assert not other.exists()


def test_who_makes_it_again_need_not_be_told_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kept.json"
    path.touch()
    error = DamagedError(f"{path} is empty.", "Delete it.")
    assert str(error) == f"{path} is empty. Delete it."
    assert str(copy.copy(error)) == str(error)
    with caplog.at_level(logging.WARNING), set_aside_if_damaged(path):
        raise error
    assert "is empty. It is made again; what was there is now kept.json.damaged" in caplog.text


def test_a_whole_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text("{}")
    with set_aside_if_damaged(path):
        assert read_json(path) == {}
    assert path.exists()


def test_what_cannot_be_opened_now_may_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    path.write_text("{}")

    def refused(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(damaged.os, "open", refused)
    with pytest.raises(InputError, match="Permission denied"), set_aside_if_damaged(path):
        read_json(path)
    assert path.exists()
