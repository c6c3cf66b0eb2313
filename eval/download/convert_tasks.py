"""The tasks that are no tars on the hub, brought into clip_benchmark's layout.

They are DataComp's two retrieval tasks and WinoGAViL. Two forms of each are read.

- parquet files, any number, with the columns `image` (a struct with `bytes`) and `caption` (a list
  of strings), or `candidate_images` (a list of such structs), `candidates`, `cue`, `associations`;
- one zip of images with one csv, json (a list of records) or jsonl, with the columns `filename` and
  `raw` (a list of captions, as text), or `candidates`, `cue`, `associations`, where the image of
  a candidate is the member of the zip whose name without its suffix is the candidate.

A column `split`, where there is one, says which rows belong to a split. Images are copied as they
are. The tars depend on nothing but the input.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

from siftclip.errors import InputError, require_choice
from siftclip.eval.download.checksums import (
    CHECKSUMS_FILE,
    TaskChecksums,
    hash_files,
    read_checksums,
    write_checksums,
)
from siftclip.eval.tasks.task import NSHARDS_FILE, TYPE_FILE
from siftclip.files import write_text
from siftclip.reading import open_file, reason_of
from siftclip.writing import atomic_path, delete_file, make_folder

ConvertedKind = Literal["retrieval", "association"]
SAMPLES_PER_TAR = 5000
_TABLE_SUFFIXES = (".csv", ".json", ".jsonl")
_IGNORED = (CHECKSUMS_FILE, "dataset_infos.json")
_PARQUET_ROWS = 64  # at once; a row may hold a dozen images
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}  # WebP's is in two parts

# NotImplementedError: an unknown compression; RuntimeError: a password
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)

Members = list[tuple[str, bytes]]  # of a sample: suffix and content
ImageReader = Callable[[str], bytes]  # by a name in the table


class _Row(NamedTuple):
    """A row of a table, and where it is, for messages."""

    place: str
    values: dict[str, Any]
    read_image: ImageReader | None  # None: the images are among the values


def converted_kind(kind: str) -> ConvertedKind | None:
    """Return the kind as one whose tasks are converted; None where the hub has our layout."""
    return next((known for known in _MEMBERS if known == kind), None)


def convert_task(source: Path, folder: Path, kind: ConvertedKind, *, split: str = "test") -> int:
    """Convert a task to a task folder, and return its number of samples.

    Args:
        source: the folder that `download_source` wrote, or one with the same files.
        folder: the task folder to write. A sample of retrieval is an image with its captions in
            `txt`, one per line; one of association is the images `0.jpg`, `1.jpg`, ... and a `json`
            with `cue` and `associations`, the numbers of the images that go with the cue.
        kind: retrieval or association.
        split: the name of the split.

    Raises:
        InputError: a file is missing, damaged or in another form, or a row is wrong.
    """
    require_choice("kind", kind, get_args(ConvertedKind))
    if folder.resolve() == source.resolve():
        raise InputError(f"A task must be converted to another folder than its source, {source}.")
    make_members = _MEMBERS[kind]
    make_folder(folder / split)
    delete_file(folder / CHECKSUMS_FILE)
    samples = (make_members(row) for row in _read_rows(source, split))
    count, tars = _write_tars(folder / split, samples)
    if not count:
        raise InputError(f"{source} must hold rows of the split {split!r}. It holds none.")
    write_text(folder / TYPE_FILE, f"{kind}\n")
    write_text(folder / split / NSHARDS_FILE, f"{tars}\n")
    _record(source, folder, split, tars)
    return count


def _record(source: Path, folder: Path, split: str, tars: int) -> None:
    origin = read_checksums(source)
    names = [TYPE_FILE, f"{split}/{NSHARDS_FILE}", *(f"{split}/{i}.tar" for i in range(tars))]
    write_checksums(
        folder,
        TaskChecksums(
            repository=origin.repository if origin else "",
            revision=origin.revision if origin else "",
            commit=origin.commit if origin else "",
            splits=(split,),
            files=hash_files(folder, names),
        ),
    )


# ---- samples ------------------------------------------------------------------------------------


def _retrieval_members(row: _Row) -> Members:
    captions = _strings(row, "caption" if "caption" in row.values else "raw")
    if row.read_image is None:
        image = _struct_bytes(row, "image", _value(row, "image"))
    else:
        image = row.read_image(_text(row, "filename"))
    lines = "\n".join(" ".join(caption.splitlines()).strip() for caption in captions)
    return [(_image_suffix(row, "image", image), image), ("txt", lines.encode())]


def _association_members(row: _Row) -> Members:
    cue = _text(row, "cue")
    candidates = _strings(row, "candidates")
    chosen = _strings(row, "associations")
    unknown = sorted(set(chosen) - set(candidates))
    if unknown:
        raise InputError(
            f"{row.place}: associations must be candidates, {candidates}. Got {unknown[0]!r}."
        )
    if row.read_image is None:
        structs = _value(row, "candidate_images")
        if not isinstance(structs, list) or len(structs) != len(candidates):
            raise InputError(
                f"{row.place}: candidate_images must hold an image for each of the "
                f"{len(candidates)} candidates."
            )
        images = [_struct_bytes(row, "candidate_images", struct) for struct in structs]
    else:
        images = [row.read_image(candidate) for candidate in candidates]
    members = [
        (f"{number}.{_image_suffix(row, name, image)}", image)
        for number, (name, image) in enumerate(zip(candidates, images, strict=True))
    ]
    record = {"cue": cue, "associations": [i for i, n in enumerate(candidates) if n in chosen]}
    return [*members, ("json", json.dumps(record).encode())]


_MEMBERS: dict[ConvertedKind, Callable[[_Row], Members]] = {
    "retrieval": _retrieval_members,
    "association": _association_members,
}


def _value(row: _Row, column: str) -> Any:
    value = row.values.get(column)
    if value is None:
        raise InputError(
            f"{row.place} must have a value in the column {column!r}. "
            f"The columns are {sorted(map(str, row.values))}."
        )
    return value


def _text(row: _Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{row.place}: {column} must be a text. Got {value!r}.")
    return value.strip()


def _strings(row: _Row, column: str) -> list[str]:
    """Parse a list of texts; in a csv it is written in JSON, or as Python writes it."""
    value = _value(row, column)
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(text, str) and text.strip() for text in value)
    ):
        raise InputError(
            f"{row.place}: {column} must be a list of at least one text. Got {str(value)[:80]!r}."
        )
    return value


def _struct_bytes(row: _Row, column: str, struct: Any) -> bytes:
    data = struct.get("bytes") if isinstance(struct, dict) else None
    if not isinstance(data, bytes):
        raise InputError(f"{row.place}: {column} must hold the bytes of an image, not its address.")
    return data


def _image_suffix(row: _Row, name: str, data: bytes) -> str:
    for signature, suffix in _SIGNATURES.items():
        if data.startswith(signature):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise InputError(
        f"{row.place}: the image {name!r} must be a JPEG, a PNG or a WebP. "
        f"It begins with {data[:8]!r}."
    )


# ---- tars ---------------------------------------------------------------------------------------


def _write_tars(folder: Path, samples: Iterator[Members]) -> tuple[int, int]:
    """Write `0.tar`, `1.tar`, ...; return the numbers of samples and of tars."""
    count = tars = 0
    following = next(samples, None)
    while following is not None:
        with (
            atomic_path(folder / f"{tars}.tar") as path,
            tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            in_this = 0
            while following is not None and in_this < SAMPLES_PER_TAR:
                for suffix, data in following:
                    info = tarfile.TarInfo(f"{count:07d}.{suffix}")  # no time, owner or mode
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                count += 1
                in_this += 1
                following = next(samples, None)
        tars += 1
    return count, tars


# ---- sources ------------------------------------------------------------------------------------


def _read_rows(source: Path, split: str) -> Iterator[_Row]:
    files = sorted(
        path
        for path in source.rglob("*")
        if path.is_file() and path.name not in _IGNORED and not _is_hidden(path, source)
    )
    parquets = [path for path in files if path.suffix == ".parquet"]
    zips = [path for path in files if path.suffix == ".zip"]
    tables = [path for path in files if path.suffix in _TABLE_SUFFIXES]
    rows: Iterator[_Row]
    if parquets:
        rows = (row for path in parquets for row in _read_parquet(path))
    elif len(zips) == 1 and len(tables) == 1:
        rows = _read_zip(zips[0], tables[0])
    else:
        raise InputError(
            f"{source} must hold parquet files, or one zip of images and one table "
            f"({', '.join(_TABLE_SUFFIXES)}). It holds {len(zips)} zips and {len(tables)} tables."
        )
    for row in rows:
        if row.values.get("split", split) == split:
            yield row


def _is_hidden(path: Path, source: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(source).parts)


def _read_parquet(path: Path) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield _Row(f"{path}, row {number}", values, None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}.") from None


def _read_zip(zip_path: Path, table: Path) -> Iterator[_Row]:
    try:
        archive = zipfile.ZipFile(zip_path)
    except _ZIP_ERRORS as error:
        raise InputError(f"{zip_path} is not a readable zip file: {error}.") from None
    with archive:
        members = _members_by_name(archive)
        for number, values in enumerate(_read_table(table), start=1):
            place = f"{table}, row {number}"
            yield _Row(place, values, _reader(place, zip_path, archive, members))


def _members_by_name(archive: zipfile.ZipFile) -> dict[str, list[zipfile.ZipInfo]]:
    """Return the files of a zip by their names without folders, and without the suffix too.

    A name is only ever looked up, never a path to write to.
    """
    members: dict[str, list[zipfile.ZipInfo]] = {}
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if info.is_dir() or path.name.startswith("."):  # macOS adds `._name`
            continue
        for name in {path.name, path.stem}:
            members.setdefault(name, []).append(info)
    return members


def _reader(
    place: str, zip_path: Path, archive: zipfile.ZipFile, members: dict[str, list[zipfile.ZipInfo]]
) -> ImageReader:
    def read(name: str) -> bytes:
        entries = members.get(name, [])
        if len(entries) != 1:
            raise InputError(
                f"{place}: {zip_path} must hold one image {name!r}. It holds {len(entries)}."
            )
        try:
            return archive.read(entries[0])
        except _ZIP_ERRORS as error:
            raise InputError(f"{place}: {name!r} in {zip_path} is not readable: {error}.") from None

    return read


def _read_table(path: Path) -> Sequence[dict[str, Any]]:
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file, strict=True))
            if path.suffix == ".jsonl":
                records = [json.loads(line) for line in file if line.strip()]
            else:
                records = json.load(file)
    except InputError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(
            f"{path} is not a readable {path.suffix[1:]} file: {reason_of(error)}."
        ) from None
    if not isinstance(records, list) or not all(isinstance(row, dict) for row in records):
        raise InputError(f"{path} must hold a list of records, one for each sample.")
    return records
