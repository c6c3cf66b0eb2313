"""Writing files so that a killed run never leaves half of one."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import reprlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from siftclip.errors import InputError
from siftclip.file_identity import FileIdentity

_LINE_WAY_OUT = "Delete that line; what the others hold stays."

log = logging.getLogger(__name__)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` which replaces it when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)  # else a crash of the machine may leave a name without data
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def has_content(path: Path) -> bool:
    """Return whether there is a file with something in it.

    A power cut may leave a file of which only the name was written: empty, or full of NUL bytes. It
    says as much as none at all, and a warning says that it does.
    """
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 16):
                if block.strip(b"\0"):
                    return True
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    _say_blank(path)
    return False


@functools.cache
def _say_blank(path: Path) -> None:
    """Warn of a file without content, once."""
    log.warning("%s has no content, as after a power cut, and counts as missing", path)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write named bytes as a tar, atomically. Times and owners are fixed: same input, same file."""
    with (
        atomic_path(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN and infinity are an error, they are not JSON."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except ValueError as error:
        raise InputError(f"{path} must be a JSON file: {error}.") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        InputError: the file is missing, or is not a JSON object.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise InputError(f"{path} must be a JSON object. Got {reprlib.repr(record)}.")
    return record


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record as a line of JSON, in one write.

    What a killed writer left of a last line is removed first, so that no record joins it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        _mend_last_line(file, path)
        file.write(line.encode())


def keep_records(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Keep some records of a JSONL file and drop the others, atomically.

    Raises:
        InputError: see `read_jsonl`.
    """
    if not path.exists():
        return
    with path.open("ab+") as file:
        _mend_last_line(file, path)
    records = read_jsonl(path)
    kept = [record for record in records if keep(record)]
    if len(kept) < len(records):
        write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of objects; a last line that a killed writer cut off is ignored.

    Raises:
        InputError: another line is not UTF-8 or not a JSON object.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _parsed(line)
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}, is not JSON: {error}. {_LINE_WAY_OUT}"
            ) from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}, must be a JSON object. Got {reprlib.repr(record)}. "
                f"{_LINE_WAY_OUT}"
            )
        records.append(record)
    return records + _last_record(rest)


def _parsed(data: bytes) -> Any:
    """Parse JSON in UTF-8, with or without a mark at its start; ValueError for anything else."""
    text = data.decode("utf-8-sig")
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # of Python, with advice for programmers
            raise ValueError("a number in it has thousands of digits") from None
        raise


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON; ValueError where a name is there twice: only one would count."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(
            name for name, count in Counter(name for name, _ in pairs).items() if count > 1
        )
        raise ValueError(f"it has {reprlib.repr(twice)} twice")
    return record


def _mend_last_line(file: IO[bytes], path: Path) -> None:
    """End the last line of a JSONL file, or cut it off where it is not whole, and say so."""
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    before, _, rest = file.read().rpartition(b"\n")
    if _last_record(rest):
        file.write(b"\n")
        return
    file.truncate(len(before) + 1 if before else 0)
    log.warning(
        "%s ended in a record that is not whole (%d bytes), which is cut off: its writer was "
        "killed, or the disk was full",
        path,
        len(rest),
    )


def _last_record(rest: bytes) -> list[dict[str, Any]]:
    """Return the record behind the last line break of a JSONL file, if it is whole."""
    try:
        record = _parsed(rest)
    except ValueError:
        return []
    return [record] if isinstance(record, dict) else []


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as an uncompressed npz, atomically. Object arrays are refused."""
    if any(array.dtype.hasobject for array in arrays.values()):
        raise TypeError("object arrays would be pickled")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes allow_pickle for a key


def read_npz(path: Path, keys: list[str]) -> list[np.ndarray]:
    """Read `keys` of an npz without ever unpickling.

    Raises:
        InputError: the file is missing or damaged, or lacks a key (the message lists those it has).
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise InputError(
                    f"{path} must hold the array {missing[0]!r}. It holds {sorted(file.files)}."
                )
            arrays = [file[key] for key in keys]
            if not all(isinstance(array, np.ndarray) for array in arrays):
                raise ValueError("a member is not in npy format")  # numpy gives its raw bytes
            return arrays
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except InputError:
        raise
    except Exception as error:  # numpy raises zipfile, zlib, value and OS errors for a damaged file
        raise InputError(f"{path} is not a readable npz file: {error}.") from None


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read shape, Fortran order and dtype of an npy; the file is then at the values.

    Raises:
        ValueError: this is not an npy file.
    """
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def read_npz_all(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an npz by key, see `read_npz`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = list(file.files)
    except Exception as error:  # numpy raises zipfile, value and OS errors for a damaged file
        raise InputError(f"{path} is not a readable npz file: {error}.") from None
    return dict(zip(keys, read_npz(path, keys), strict=True))


def file_stamp(path: Path) -> list[Any]:
    """Return a stamp that changes when the file does, without reading all of a large file.

    Name, size in bytes, time of the last change in ns, and a hash of blocks, the last among them:
    there an npz has the checksums of its arrays, and a parquet file its statistics.
    """
    return FileIdentity.of(path).stamp(path.name)


def content_digest(path: Path) -> str:
    """Hash a file's content (SHA-256). One that has not changed is read once per process.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    # ctime changes with the content even where somebody sets the other times back
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _content_digest(path, stamp)


@functools.lru_cache(maxsize=4096)
def _content_digest(path: Path, stamp: tuple[int, ...]) -> str:
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    """Hash a file's content as it is on the disk now: SHA-256, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_digests(place: Path) -> dict[str, str]:
    """Hash a file, or all files below a folder, by their paths in it; empty for neither."""
    if place.is_file():
        return {place.name: content_digest(place)}
    paths = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else []
    return {path.relative_to(place).as_posix(): content_digest(path) for path in paths}


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Hash an identity to twelve hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
