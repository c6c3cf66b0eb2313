"""Files are written whole or not at all, and read without running what is in them."""

from __future__ import annotations

import math
import os
import pickle
import stat
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.files import (
    append_jsonl,
    has_content,
    keep_records,
    read_json,
    read_jsonl,
    read_npz,
    write_json,
    write_npz,
    write_text,
)
from siftclip.writing import atomic_path


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 0.5, None], "a": "ä"})
    assert read_json(path) == {"b": [1, 0.5, None], "a": "ä"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": math.nan})
    assert read_json(path)["a"] == "ä"
    with pytest.raises(InputError, match=r"b.json does not exist"):
        read_json(tmp_path / "b.json")
    path.write_text("{")
    with pytest.raises(InputError, match=r"a.json must be a JSON file"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"a.json must be a JSON file"):
        read_json(path)


def test_jsonl_forgives_only_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    for step in range(3):
        append_jsonl(path, {"step": step})
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2]
    path.write_text(path.read_text()[:-4])
    assert [record["step"] for record in read_jsonl(path)] == [0, 1]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"a.jsonl, line 2, is not JSON"):
        read_jsonl(path)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.integers(0, 60))
def test_a_record_never_joins_a_line_that_was_cut_off(texts: list[str], kept: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        for text in texts:
            append_jsonl(path, {"text": text})
        whole = path.read_bytes()
        path.write_bytes(whole[:kept])
        before = read_jsonl(path)
        append_jsonl(path, {"text": "last"})
        assert read_jsonl(path) == [*before, {"text": "last"}]
        ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
        assert len(before) == sum(end - 1 <= kept for end in ends)


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "\0" * 40, '{"st\0\0', "3"])
def test_a_last_line_that_is_not_whole_is_cut_off_and_said(
    tail: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    append_jsonl(path, {"step": 1})
    path.write_text(path.read_text() + tail)
    append_jsonl(path, {"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    (said,) = caplog.messages
    assert f"a.jsonl ended in a record that is not whole ({len(tail)} bytes), which is cut" in said
    path.write_text(path.read_text() + tail)
    keep_records(path, lambda record: record["step"] == 2)
    assert path.read_text() == '{"step": 2}\n'
    assert len(caplog.messages) == 2


def test_records_are_dropped_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    keep_records(path, lambda record: True)
    assert not path.exists()
    for step in range(5):
        append_jsonl(path, {"step": step, "loss": 1 / 3})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="killed"):
            keep_records(path, lambda record: record["step"] < 3)
    assert path.read_bytes() == before
    keep_records(path, lambda record: record["step"] < 3)
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])


def test_damage_in_the_middle_names_the_line_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for middle in ('{"step": 2, "lo{"step": 3}', "\0" * 30 + '{"step": 3}', "[2]"):
        path.write_text(f'{{"step": 1}}\n{middle}\n{{"step": 4}}\n')
        for use in (lambda: read_jsonl(path), lambda: keep_records(path, lambda record: True)):
            with pytest.raises(
                InputError, match=r"a\.jsonl, line 2, .* Delete that line; what the"
            ):
                use()
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{line}\n" for line in (lines[0], lines[2])))
        assert [record["step"] for record in read_jsonl(path)] == [1, 4]


def test_a_file_without_content_counts_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.json"
    assert not has_content(path)
    assert not has_content(tmp_path)
    assert not has_content(Path(__file__) / "a.json")
    assert not caplog.messages
    for blank in (b"", bytes(100_000)):
        path.write_bytes(blank)
        assert not has_content(path)
    assert len(caplog.messages) == 1  # said once
    path.write_bytes(bytes(100_000) + b"{}")
    assert has_content(path)


def test_jsonl_that_is_no_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "\u2028ä"}\r\n\n{"a": 2}'.encode())
    assert read_jsonl(path) == [{"a": "\u2028ä"}, {"a": 2}]
    for line in (b"[1]", b'"x"', b"\xff", b"{", b"[" * 100_000):
        path.write_bytes(b"{}\n" + line + b"\n{}\n")
        with pytest.raises(InputError, match=r"a.jsonl, line 2, (is not JSON|must be a JSON obj)"):
            read_jsonl(path)
        path.write_bytes(b"{}\n" + line)
        assert read_jsonl(path) == [{}]
    (tmp_path / "deep.json").write_bytes(b"[" * 100_000)
    with pytest.raises(InputError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")


def test_npz_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    first, second = np.arange(6.0).reshape(2, 3), np.array(["x", "yy"])
    write_npz(path, first=first, second=second)
    read_second, read_first = read_npz(path, ["second", "first"])
    assert np.array_equal(read_first, first)
    assert np.array_equal(read_second, second)
    with pytest.raises(InputError, match=r"must hold the array 'third'. It holds \['first', 'sec"):
        read_npz(path, ["first", "third"])
    with pytest.raises(InputError, match=r"b.npz does not exist"):
        read_npz(tmp_path / "b.npz", ["first"])


def test_damaged_npz_is_an_input_error_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(path, a=np.arange(40))
    data = path.read_bytes()
    for size in range(0, len(data), 37):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"a.npz is not a readable npz file"):
            read_npz(path, ["a"])


def test_flipped_byte_in_npz_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(path, a=np.arange(40))
    data = bytearray(path.read_bytes())
    data[data.index(np.arange(40).tobytes()) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="CRC"):
        read_npz(path, ["a"])


def test_pickles_in_npz_are_never_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "a.npz", tmp_path / "proof"
    np.savez(path, a=np.array([Intruder(proof)], dtype=object))
    with pytest.raises(InputError, match=r"a.npz is not a readable npz file"):
        read_npz(path, ["a"])
    with zipfile.ZipFile(path, "w") as archive:  # a member that is a bare pickle
        archive.writestr("a.npy", pickle.dumps(Intruder(proof)))
    with pytest.raises(InputError, match=r"a.npz is not a readable npz file"):
        read_npz(path, ["a"])
    path.write_bytes(pickle.dumps(Intruder(proof)))
    with pytest.raises(InputError, match=r"a.npz is not a readable npz file"):
        read_npz(path, ["a"])
    assert not proof.exists()


def test_object_arrays_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="would be pickled"):
        write_npz(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    """Also what safetensors writes, which makes a file of its own that others may not read."""
    from safetensors.numpy import save_file

    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "weights.safetensors") as temporary:
            save_file({"x": np.zeros(2)}, temporary)
        write_text(tmp_path / "text", "a")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o640}


def test_what_has_content(tmp_path: Path) -> None:
    """A pipe has what its reader is to say; nothing waits for it."""
    path = tmp_path / "file"
    assert not has_content(path)
    for content, expected in ((b"", False), (bytes(10**5), False), (bytes(10**5) + b"x", True)):
        path.write_bytes(content)
        assert has_content(path) is expected
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert has_content(path)
    for make, expected in (
        (path.mkdir, False),
        (lambda: os.mkfifo(path), True),
        (lambda: path.symlink_to(path.name), True),
        (lambda: path.symlink_to("nowhere"), False),
        (lambda: path.symlink_to("/dev/zero"), True),
    ):
        (path.rmdir if path.is_dir() and not path.is_symlink() else path.unlink)()
        make()
        assert has_content(path) is expected


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    with pytest.raises(InputError, match="it is a named pipe, not a file"):
        append_jsonl(path, {"step": 1})
    with pytest.raises(InputError, match="it is a named pipe, not a file"):
        keep_records(path, lambda record: True)
