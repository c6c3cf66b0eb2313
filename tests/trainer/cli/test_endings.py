"""A command ends in one line, whatever happens: an unknown fault, a full disk, a signal."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from siftclip import interrupts
from siftclip.trainer.cli import main as main_module
from siftclip.trainer.cli.application import _end_unforeseen, application
from siftclip.trainer.cli.endings import FULL_ERROR, describe, end_internal, option_of
from siftclip.trainer.runtime.fault_log import write_fault_log
from siftclip.trainer.settings.commands import PoolSections
from siftclip.writing import WriteError

MODULE = ["-m", "siftclip.trainer.cli"]
Fail = Callable[[BaseException], tuple[int, str]]


@pytest.fixture
def fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Fail:
    """Run a command whose stage raises; returns its exit status and stderr."""

    def run(error: BaseException) -> tuple[int, str]:
        def stage(_: PoolSections) -> None:
            raise error

        words = ["index", f"pool.root={tmp_path}", f"output_dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["siftclip", *words, "+pool.storage_options.key=hush"])
        with pytest.raises(SystemExit) as end:
            application("index", PoolSections)(stage)()
        return int(end.value.code or 0), capsys.readouterr().err

    return run


# ---- faults that nobody foresaw ------------------------------------------------------------------
def test_an_unknown_fault_is_one_line_and_a_log(
    fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "not-to-be-told")
    status, errors = fail(ValueError("shapes (3,) and\n(4,) differ"))
    match = re.fullmatch(
        r"siftclip index: internal error: ValueError: shapes \(3,\) and \(4,\) differ\. "
        r"Please report it with the log (\S+)\n",
        errors,
    )
    assert status == 1
    assert match is not None, errors
    log = Path(match[1])
    assert log.parent == tmp_path
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "command: siftclip index\n" in text
    assert "options: +pool.storage_options.key output_dir pool.root\n" in text
    assert "hush" not in text
    assert "not-to-be-told" not in text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "/data/0.tar"), "error: OSError: .*/data/0"),
        (MemoryError(), r"error: MemoryError\. \(log "),
    ],
)
def test_what_the_machine_lacks_is_no_internal_error(
    error: BaseException, words: str, fail: Fail
) -> None:
    status, errors = fail(error)
    assert status == 1
    assert re.match(f"siftclip index: {words}", errors)
    assert "internal" not in errors


def test_a_programmer_sees_all_of_it(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FULL_ERROR, "1")
    with pytest.raises(ValueError, match=r"^all$"):
        fail(ValueError("all"))


def test_the_log_goes_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error = ValueError("https://me:secret@example.org/pool is gone")
    log = write_fault_log(error, tmp_path / "no-such-folder")
    assert log is not None
    assert log.parent == tmp_path
    assert "https://***@example.org/pool is gone" in log.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no-such-folder"))
    assert write_fault_log(error, None) is None


def test_without_a_log_the_way_to_the_traceback_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no-such-folder"))
    with pytest.raises(SystemExit):
        end_internal("", ValueError("a"), None)
    assert capsys.readouterr().err == (
        "siftclip: internal error: ValueError: a. Please report it with the traceback, which "
        "HYDRA_FULL_ERROR=1 in front of the command shows\n"
    )


def test_a_command_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"{name}: libGL.so.1: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", missing)
    monkeypatch.setattr(sys, "argv", ["siftclip", "index"])
    with pytest.raises(SystemExit) as end:
        main_module.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("siftclip index: internal error: ImportError: ")


def test_long_messages_are_cut() -> None:
    assert len(describe(ValueError("a" * 10_000))) < 600
    assert describe(KeyError()) == "KeyError."


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP])
def test_a_name_that_cannot_be_opened_is_no_fault_of_ours(
    number: int, fail: Fail, tmp_path: Path
) -> None:
    status, errors = fail(OSError(number, os.strerror(number), f"{tmp_path}/x"))
    assert status == 2
    reason = f"cannot be opened: {os.strerror(number)}. It comes from pool.root.\n"
    assert errors.startswith("siftclip index: error: ")
    assert errors.endswith(reason)


def test_links_that_lead_in_a_circle_are_no_fault_of_ours(fail: Fail, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(RuntimeError) as raised:
        loop.resolve(strict=False)
    assert fail(raised.value) == (2, f"siftclip index: error: Symlink loop from '{loop}'.\n")


# ---- what cannot be written ----------------------------------------------------------------------
def test_the_option_that_names_another_folder_is_said(tmp_path: Path) -> None:
    config = {
        "output_dir": f"{tmp_path}/out",
        "run_dir": f"{tmp_path}/out/runs/a",
        "seed": 1,
        "pool": {"root": f"{tmp_path}/pool", "cache_dir": None},
        "features": {"root": "s3://bucket/features"},
        "export": {"path": f"{tmp_path}/files/x.pt"},
    }
    for path, option in {
        "out/scores/a.npz": "output_dir=FOLDER",
        "out/runs/a/model": "run_dir=FOLDER",
        "out": "output_dir=FOLDER",
        "pool/.siftclip/index": "pool.cache_dir=FOLDER",
        "files/.x.pt.lock": "export.path=FOLDER/NAME",
        "outer/a": "",
    }.items():
        expected = option or "TMPDIR=FOLDER in front of the command"  # pytest's own is below it
        assert option_of(tmp_path / path, config) == expected
    assert option_of(Path.home() / ".cache/siftclip/x", config) == "pool.cache_dir=FOLDER"
    assert option_of(Path("/elsewhere/a"), config) == ""


def test_a_command_says_the_option(fail: Fail, tmp_path: Path) -> None:
    status, errors = fail(WriteError(tmp_path / "a" / "b.npz", errno.ENOSPC))
    assert status == 2
    assert errors == (
        f"siftclip index: error: {tmp_path}/a/b.npz cannot be written: its disk is full (No space "
        "left on device). Make room, and the same command continues; or choose another folder "
        "with output_dir=FOLDER.\n"
    )


# ---- standard streams ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        ("> /dev/full", 1),
        (">&-", 0),
        ("2>&-", 0),
        ("2> /dev/full", 0),
        ("<&- >&- 2>&-", 0),
        ("> /dev/full 2> /dev/full", 1),
    ],
)
def test_streams_that_are_full_or_closed(redirection: str, status: int) -> None:
    """What was to be the result is never lost in silence; nothing else matters."""
    command = f"{sys.executable} {' '.join(MODULE)} --help {redirection}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602
    assert result.returncode == status
    full = "siftclip: error: standard output: No space left on device\n"
    assert result.stderr == (full if redirection == "> /dev/full" else "")


def test_errors_are_said_without_standard_output() -> None:
    command = f"{sys.executable} {' '.join(MODULE)} indx > /dev/full"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602
    assert result.returncode == 2
    assert "'indx' is not a command" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library printed would be written into it."""
    code = (
        "from siftclip.trainer.cli.streams import make_streams_last; make_streams_last()\n"
        f"print(open({str(tmp_path / 'a')!r}, 'w').fileno() > 2)"
    )
    command = f"{sys.executable} -c '{code.replace(chr(39), chr(34))}' <&- 2>&-"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert result.stdout == "True\n"


# ---- signals -------------------------------------------------------------------------------------
def let_interrupts_come() -> None:
    """In a child: where the tests run in the background of a shell, Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def signalled(number: int, seconds: float, *words: str) -> tuple[int, str]:
    """Start a command, send a signal after some seconds; returns its exit status and stderr."""
    command = [sys.executable, *MODULE, *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=let_interrupts_come,
    )
    time.sleep(seconds)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    return process.returncode, errors


def check_ending(number: int, status: int, errors: str) -> None:
    """Check that a command ended by a signal, or before it; or that Python itself was starting."""
    if "Traceback" in errors and "siftclip" not in errors:
        return  # Python itself was starting: no package could answer
    words = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(number)]
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert status in (0, 128 + number, -number, 2), errors  # 0: it had ended by then
    assert status != 128 + number or re.search(rf"^siftclip( \w+)?: {words}", errors, re.M), errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.7, 1.5])
def test_a_signal_during_the_imports(number: int, seconds: float) -> None:
    check_ending(number, *signalled(number, seconds, "train", "pool.root=/none"))


COMMANDS = [
    *("index", "embed", "target", "score", "select", "train", "eval", "eval watch", "eval diff"),
    *("export", "compare", "data compact", "data bench", "demo", "explain", "new"),
]


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_at_many_moments(command: str) -> None:
    for step in range(2, 100, 7):
        check_ending(signal.SIGINT, *signalled(signal.SIGINT, step * 0.02, *command.split()))


def test_signals_while_a_command_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is an exception then, SIGTERM ends the process by itself; and as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(interrupts, "_process", 0)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    ended: list[int] = []
    monkeypatch.setattr(interrupts, "_end", ended.append)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        interrupts.answer()
        interrupts.answer()  # has no more effect
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert ended == [signal.SIGTERM, signal.SIGINT]
        interrupts.begin_work()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.end_work()
        signal.raise_signal(signal.SIGINT)
        assert ended == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup, or in the background of a shell."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(interrupts, "_process", 0)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    term = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupts.answer()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, term)


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (["python", "-m", "siftclip.trainer.cli", "train"], True),
        (["/env/bin/python", "/env/bin/siftclip", "train"], True),
        (["python", "train.py"], False),
        (["python", "-c", "import siftclip"], False),
        (["python"], False),
    ],
)
def test_only_commands_answer(
    words: list[str], answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(interrupts, "answer", lambda: called.append(True))
    monkeypatch.setattr(sys, "orig_argv", words)
    interrupts.answer_if_command()
    assert bool(called) is answers


def test_a_forked_process_does_not_answer() -> None:
    code = (
        "import os, signal, sys\n"
        "from siftclip import interrupts\n"
        "interrupts.answer()\n"
        "child = os.fork()\n"
        "if not child: signal.raise_signal(signal.SIGTERM)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == (f"{-signal.SIGTERM}\n", "")


def test_an_interrupt_that_python_would_forget_ends_the_command() -> None:
    code = (
        "import os, signal\n"
        "from siftclip import interrupts\n"
        "interrupts.answer(); interrupts.begin_work()\n"
        "class Slow:\n"
        "    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "Slow(); print('never')"
    )
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        preexec_fn=let_interrupts_come,
    )
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.strip().endswith("interrupted")


def test_an_interrupt_of_a_caller_in_python_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "_run", interrupt)
    monkeypatch.setattr(sys, "argv", ["siftclip", "index"])
    with pytest.raises(SystemExit) as end:
        main_module.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "\nsiftclip index: interrupted\n"


def test_an_exception_after_an_interrupt_is_an_interrupt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A second Ctrl-C inside torch.save ends in its RuntimeError about the file."""
    try:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 14773184 vs 14773076")
    except RuntimeError as error:
        with pytest.raises(SystemExit) as stopped:
            _end_unforeseen("train", error, {})
    assert stopped.value.code == 130
    assert "siftclip train: interrupted; the same command continues." in capsys.readouterr().err
