"""Locks: one holder, who is named, and nothing that a dead one leaves behind."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from siftclip.errors import InputError
from siftclip.locks import (
    LOCK_NAME,
    HeldError,
    describe_holder,
    lock_beside,
    lock_holder,
    locked,
)
from siftclip.ranks import Ranks

HOLD = """
import sys, time
from pathlib import Path
from siftclip.locks import locked

with locked(Path(sys.argv[-1]), owner="it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(child_environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`hold(path)`: another process, which holds a lock until it is ended."""
    started = []

    def start(path: Path, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *words, str(path)],
            env=child_environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_holder_is_named_and_a_killed_one_holds_nothing(hold: Any, tmp_path: Path) -> None:
    path = tmp_path / "run" / LOCK_NAME
    before = int(time.time())
    process = hold(path, "train", "+pool.storage_options.key=SECRET")
    holder = json.loads(path.read_text())
    assert (holder["pid"], holder["host"]) == (process.pid, socket.gethostname())
    assert holder["command"] == "siftclip train"  # no option, which may be a secret
    with (
        pytest.raises(HeldError) as caught,
        locked(path, owner="The run"),
    ):
        raise AssertionError("two hold it")
    assert f"The run is being written by process {process.pid} on " in str(caught.value)
    assert f"since {holder['since']} (siftclip train)" in str(caught.value)
    assert abs(time.mktime(time.strptime(holder["since"][:19], "%Y-%m-%d %H:%M:%S")) - before) < 60
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    with locked(path, owner="The run"):
        assert path.exists()
    assert not path.exists()


def test_a_child_of_the_holder_does_not_keep_it(tmp_path: Path) -> None:
    """Loader processes are forked while the lock is held, and may outlive a SIGKILL."""
    path = tmp_path / LOCK_NAME
    fork = multiprocessing.get_context("fork")
    release, answers = fork.Event(), fork.Queue()

    def child() -> None:
        release.wait(60)
        try:
            with locked(path, owner="it"):
                answers.put("took it")
        except HeldError:
            answers.put("refused")

    with locked(path, owner="it"):
        child_process = fork.Process(target=child)
        child_process.start()
        with pytest.raises(HeldError), locked(path, owner="it"):
            pass
        assert path.exists()  # the refusal has not freed it
    with locked(path, owner="it"):  # although the child lives
        release.set()
        assert answers.get(timeout=60) == "refused"
        child_process.join()
        with pytest.raises(HeldError), locked(path, owner="it"):
            pass


def test_a_process_that_asks_again_does_not_lose_its_own(tmp_path: Path) -> None:
    """Closing any handle of the file gives a record lock up."""
    path, fork = tmp_path / LOCK_NAME, multiprocessing.get_context("fork")
    answers = fork.Queue()

    def other() -> None:
        try:
            with locked(path, owner="it"):
                answers.put("took it")
        except HeldError as error:
            answers.put(str(error))

    with locked(path, owner="it"):
        with pytest.raises(HeldError, match=f"by process {os.getpid()} on"), locked(path, owner=""):
            pass
        process = fork.Process(target=other)
        process.start()
        assert f"by process {os.getpid()} on" in answers.get(timeout=60)
        process.join()


def test_waiting_ends_with_the_holder(
    hold: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("siftclip.locks.POLL_SECONDS", 0.01)
    monkeypatch.setattr("siftclip.locks.PATIENCE_SECONDS", 0.05)
    process = hold(tmp_path / LOCK_NAME)
    timer = threading.Timer(0.3, process.terminate)
    timer.start()
    with locked(tmp_path / LOCK_NAME, owner="The features", wait=True):
        pass
    timer.join()
    assert len(caplog.messages) == 1
    assert f"The features is being written by process {process.pid}" in caplog.messages[0]


def test_no_count_is_lost_where_files_are_deleted_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each release deletes the file that others have open: two must never hold different ones."""
    monkeypatch.setattr("siftclip.locks.POLL_SECONDS", 0.0005)
    count = tmp_path / "count"
    count.write_text("0")

    def add() -> None:
        for _ in range(60):
            with locked(tmp_path / LOCK_NAME, owner="it", wait=True):
                count.write_text(str(int(count.read_text()) + 1))

    processes = [multiprocessing.get_context("fork").Process(target=add) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert count.read_text() == "240"


def test_a_deleted_file_frees_what_it_names(hold: Any, tmp_path: Path) -> None:
    """The way out where a crashed machine still holds a lock over NFS."""
    process = hold(tmp_path / LOCK_NAME)
    (tmp_path / LOCK_NAME).unlink()
    with locked(tmp_path / LOCK_NAME, owner="it"):
        process.terminate()
        process.wait()
        assert (tmp_path / LOCK_NAME).exists()  # the old holder deletes its own file alone


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"It cannot be written: .*file/\.lock: "),
        locked(tmp_path / "file" / LOCK_NAME, owner="It"),
    ):
        pass


def test_a_pipe_in_the_place_of_a_lock(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"\.lock is no file.*Delete it"), locked(path, owner="It"):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path / LOCK_NAME, owner="it"):
        pass
    assert "has no locks (No locks available)" in caplog.text


def test_ranks_hold_together_and_are_refused_together(
    run_on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    def on_rank(ranks: Ranks) -> str:
        try:
            with locked(tmp_path / "run" / LOCK_NAME, owner="it", ranks=ranks):
                ranks.barrier()
                return "held"
        except HeldError as error:
            return str(error)

    assert run_on_ranks(3, on_rank) == ["held"] * 3
    with locked(tmp_path / "run" / LOCK_NAME, owner="it"):
        answers = run_on_ranks(3, on_rank)
    assert all("is being written" in answer for answer in answers)
    assert str(os.getpid()) in answers[0]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[1]", b'{"pid": "x"}', b"null"])
def test_any_content_of_the_file_is_survived(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_bytes(content)
    assert describe_holder(tmp_path / LOCK_NAME) == "by another process"
    with locked(tmp_path / LOCK_NAME, owner="it"):
        pass


def test_names() -> None:
    assert lock_beside(Path("a/eval_results.jsonl")) == Path("a/.eval_results.jsonl.lock")


# ---- looking, without taking --------------------------------------------------------------------
def test_who_holds_a_lock_is_told_without_taking_it(hold: Any, tmp_path: Path) -> None:
    path = tmp_path / "run" / LOCK_NAME
    assert lock_holder(path) is None
    assert not path.parent.exists()
    process = hold(path, "train")
    for _ in range(3):
        holder = lock_holder(path)
        assert holder is not None
        assert holder.startswith(f"by process {process.pid} on")
    with pytest.raises(HeldError), locked(path, owner="it"):
        pass
    process.kill()
    process.wait()
    assert path.exists()  # it holds nothing
    assert lock_holder(path) is None


def test_looking_at_ones_own_lock_does_not_give_it_up(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    path = tmp_path / LOCK_NAME
    with locked(path, owner="it"):
        assert f"by process {os.getpid()} on" in str(lock_holder(path))
        look = "from siftclip.locks import *; import sys; from pathlib import Path; "
        look += "print(lock_holder(Path(sys.argv[1])))"
        answer = subprocess.run(
            [sys.executable, "-c", look, str(path)],
            env=child_environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"by process {os.getpid()} on" in answer
    assert lock_holder(path) is None


def test_what_cannot_be_asked_counts_as_held(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    path.mkdir()
    assert lock_holder(path) == "by another process"
    path.rmdir()
    os.mkfifo(path)
    assert lock_holder(path) == "by another process"
