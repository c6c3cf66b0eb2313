"""The formats of small files: text, JSON, JSONL, npz, tar; written whole, read with checks."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import math
import os
import reprlib
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from siftclip.errors import InputError
from siftclip.file_identity import FileIdentity
from siftclip.reading import (
    MAX_RECORD_BYTES,
    open_file,
    open_handle,
    read_bytes,
    readable,
    require_file,
)
from siftclip.writing import atomic_path, make_folder, writing_to

_LINE_WAY_OUT = "Delete that line; what the others hold stays."
_MAX_LOG_BYTES = 1 << 32  # of a JSONL, to which a long run adds a line every few steps

log = logging.getLogger(__name__)


def has_content(path: Path) -> bool:
    """Return whether there is something to read: no folder, and no file without content.

    A power cut may leave a file of which only the name was written: empty, or full of NUL bytes. It
    says as much as none at all, and a warning says that it does. Of a pipe, or what cannot be read,
    its reader says what it is.
    """
    try:
        with os.fdopen(open_handle(path), "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_RECORD_BYTES:
                return True
            while block := file.read(1 << 16):
                if block.strip(b"\0"):
                    return True
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except OSError:
        return True
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


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values as a file of torch, atomically."""
    import torch  # takes a second, which commands without tensors need not wait

    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


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
    data = read_bytes(path)
    try:
        return parse_json(data)
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
    make_folder(path.parent)
    line = json.dumps(record, allow_nan=False) + "\n"
    with _mended_log(path) as file:
        file.write(line.encode())


@contextmanager
def _mended_log(path: Path) -> Iterator[IO[bytes]]:
    """Open a JSONL file to append to it, without what a killed writer left of a last line."""
    if path.exists() and not path.is_dir():  # of a folder the writing itself says so
        require_file(path)
    with writing_to(path), path.open("ab+") as file:
        _mend_last_line(file, path)
        yield file


def keep_records(
    path: Path,
    keep: Callable[[Mapping[str, Any]], bool],
    *,
    read: Callable[[Path], list[dict[str, Any]]] | None = None,
) -> None:
    """Keep some records of a JSONL file and drop the others, atomically.

    Args:
        path: of the file.
        keep: whether a record stays.
        read: reads the records, and may refuse some; None: `read_jsonl`.

    Raises:
        InputError: see `read_jsonl`.
    """
    if not path.exists():
        return
    with _mended_log(path):
        pass
    records = (read or read_jsonl)(path)
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
    *lines, rest = read_bytes(path, most=_MAX_LOG_BYTES).split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
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


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8, with or without a mark at its start.

    Raises:
        ValueError: it is something else, nested too deeply, has a name twice, or a number of
            thousands of digits.
    """
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
        record = parse_json(rest)
    except ValueError:
        return []
    return [record] if isinstance(record, dict) else []


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write an array as npy, atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


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
    with open_file(path) as file, readable(path, "npz file"), zipfile.ZipFile(file) as archive:
        names = npz_names(archive)
        missing = [key for key in keys if key not in names]
        if missing:
            raise InputError(f"{path} must hold the array {missing[0]!r}. It holds {names}.")
        return [_read_member(archive, key) for key in keys]


def read_npz_all(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an npz by key, see `read_npz`."""
    with open_file(path) as file, readable(path, "npz file"), zipfile.ZipFile(file) as archive:
        return {key: _read_member(archive, key) for key in npz_names(archive)}


def npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Read shape and dtype of each array of an npz, by its key.

    Raises:
        InputError: the file is missing, or damaged as far as these and its table of contents tell.
    """
    with open_file(path) as file, readable(path, "npz file"), zipfile.ZipFile(file) as archive:
        headers = {}
        for key in npz_names(archive):
            if f"{key}.npy" in archive.NameToInfo:
                member = archive.getinfo(f"{key}.npy")
                with archive.open(member) as values:
                    shape, _, dtype = read_npy_header(values, member.file_size)
                headers[key] = (shape, dtype)
        return headers


def npz_names(archive: zipfile.ZipFile) -> list[str]:
    """List the keys of an npz, sorted.

    Raises:
        ValueError: two members have one name, of which readers take either.
    """
    names = sorted(name.removesuffix(".npy") for name in archive.namelist())
    if len(set(names)) < len(names):
        raise ValueError("it has two members of one name")
    return names


def _read_member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    name = f"{key}.npy"
    size_bytes = archive.getinfo(name).file_size
    with archive.open(name) as member:
        require_plain(read_npy_header(member, size_bytes)[2])
    with archive.open(name) as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
        member.read(1)  # of nothing that is left: the checksum is looked at behind the last byte
        return array


def read_npy(path: Path, *, mapped: bool = False, kind: str = "npy file") -> np.ndarray:
    """Read an array in npy format without ever unpickling.

    Args:
        path: of the file.
        mapped: give an array whose values are read when they are asked for, and never written.
        kind: what messages call it.

    Raises:
        InputError: the file is missing or damaged, or in another format.
    """
    with open_file(path) as file, readable(path, kind):
        if file.read(4) == b"PK\x03\x04" and zipfile.is_zipfile(file):
            raise InputError(f"{path} must be in npy format. It is an npz file.")
        file.seek(0)
        shape, fortran, dtype = read_npy_header(file, os.fstat(file.fileno()).st_size)
        require_plain(dtype)
        if not mapped or 0 in shape or not dtype.itemsize:  # what is empty cannot be mapped
            file.seek(0)
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
        order: Literal["C", "F"] = "F" if fortran else "C"
        values = np.memmap(file, dtype, "r", offset=file.tell(), shape=shape, order=order)
        return np.asarray(values)  # numpy's class for maps is slow to index


def read_npy_header(file: IO[bytes], size_bytes: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read shape, Fortran order and dtype of an npy; the file is then at the values.

    Args:
        file: at the first byte of the npy.
        size_bytes: of the npy.

    Raises:
        ValueError: this is not an npy file, or it has too few values.
    """
    start = file.tell()
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_2_0
    if version == (1, 0):
        read = np.lib.format.read_array_header_1_0
    shape, fortran, dtype = read(file)
    values_bytes = 0 if dtype.hasobject else math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or values_bytes > size_bytes - (file.tell() - start):
        raise ValueError(f"it has fewer values than the shape {shape} says")
    return shape, fortran, dtype


def has_form(array: np.ndarray, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> bool:
    """Return whether an array has a dtype and a shape."""
    return array.dtype == dtype and array.shape == shape


def require_plain(dtype: np.dtype) -> None:
    """Raise ValueError for an array of objects, which would be unpickled, and so could run code."""
    if dtype.hasobject:
        raise ValueError("object arrays would be unpickled")


def require_floats(dtype: np.dtype, name: str) -> None:
    """Check the dtype of an array that becomes a tensor of PyTorch.

    Raises:
        InputError: it is no float16, float32 or float64 in this machine's order of bytes.
    """
    if dtype.kind != "f":
        raise InputError(f"{name} must hold floats. Its dtype is {dtype}.")
    if dtype.itemsize > 8 or not dtype.isnative:
        raise InputError(
            f"{name} must hold floats of 16, 32 or 64 bits in the order of bytes of this machine. "
            f"Its dtype is {dtype.str}."
        )


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
    with os.fdopen(open_handle(path), "rb") as file:
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
