"""Tables with images become task folders; each form of the same table gives the same folder."""

from __future__ import annotations

import csv
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftclip.errors import InputError
from siftclip.eval.download import convert_tasks
from siftclip.eval.download.checksums import (
    CHECKSUMS_FILE,
    TaskChecksums,
    read_checksums,
    verify_task,
    write_checksums,
)
from siftclip.eval.download.convert_tasks import convert_task
from siftclip.eval.tasks.task import read_task

CAPTIONS = [
    ["a dog", "a cat\nand a dog"],
    ["größer", 'it\'s "here"', "one, two"],
    ["a\r\nb"],
    ["five"],
    ["six", "seven"],
]
NAMES = ["bison", "st. bernard", "flea", "cattle", "shave"]
ASSOCIATIONS: list[dict[str, Any]] = [
    {"cue": "pogonophile", "candidates": NAMES, "associations": ["bison", "shave"]},
    {"cue": "dog", "candidates": NAMES[::-1], "associations": ["st. bernard"]},
]

Table = list[dict[str, Any]]


@pytest.fixture(scope="session")
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    sorts = [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK")]
    return [make_image(i, *sort) for i, sort in enumerate(sorts)]


def retrieval_table() -> Table:
    return [
        {"filename": f"{i}.jpg", "raw": json.dumps(captions), "split": "test", "sentids": "[1]"}
        for i, captions in enumerate(CAPTIONS)
    ]


def association_table() -> Table:
    return [
        {key: value if key == "cue" else json.dumps(value) for key, value in row.items()}
        for row in ASSOCIATIONS
    ]


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_csv(path: Path, table: Table) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def retrieval_zip(source: Path, images: list[bytes], table: Table | None = None) -> Path:
    names = {f"pictures/{i}.jpg": data for i, data in enumerate(images)}
    write_zip(source / "images.zip", {**names, "__MACOSX/pictures/._0.jpg": b"x"})
    write_csv(source / "test.csv", retrieval_table() if table is None else table)
    (source / "dataset_infos.json").write_text("{}")
    return source


def association_zip(source: Path, images: list[bytes], table: Table | None = None) -> Path:
    names = {f"{name}.jpg": data for name, data in zip(NAMES, images, strict=True)}
    write_zip(source / "images.zip", names)
    write_csv(source / "test.csv", association_table() if table is None else table)
    return source


def retrieval_parquet(source: Path, images: list[bytes]) -> Path:
    """As the hub writes it, in two files."""
    rows = [
        {"image": {"bytes": image, "path": f"{i}.jpg"}, "caption": captions, "split": "test"}
        for i, (image, captions) in enumerate(zip(images, CAPTIONS, strict=True))
    ]
    (source / "TEST").mkdir(parents=True)
    for number, part in enumerate((rows[:3], rows[3:])):
        pq.write_table(pa.Table.from_pylist(part), source / "TEST" / f"000{number}.parquet")
    return source


def association_parquet(source: Path, images: list[bytes], **changes: Any) -> Path:
    by_name = dict(zip(NAMES, images, strict=True))
    rows = [
        {
            **row,
            "candidate_images": [
                {"bytes": by_name[name], "path": f"{name}.jpg"} for name in row["candidates"]
            ],
            **changes,
        }
        for row in ASSOCIATIONS
    ]
    source.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), source / "0000.parquet")
    return source


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        read = []
        for info in archive:
            file = archive.extractfile(info)
            assert file is not None
            assert (info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "")
            read.append((info.name, file.read()))
        return read


@pytest.mark.parametrize("make", [retrieval_zip, retrieval_parquet])
def test_retrieval(
    make: Callable[..., Path],
    images: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convert_tasks, "SAMPLES_PER_TAR", 2)
    folder = tmp_path / "task"
    assert convert_task(make(tmp_path / "source", images), folder, "retrieval") == 5
    content = [member for i in range(3) for member in members(folder / "test" / f"{i}.tar")]
    suffixes = ["jpg", "png", "webp", "jpg", "jpg"]
    texts = [
        "a dog\na cat and a dog",
        'größer\nit\'s "here"\none, two',
        "a b",
        "five",
        "six\nseven",
    ]
    expected: list[tuple[str, bytes]] = []
    for i in range(5):
        expected += [(f"000000{i}.{suffixes[i]}", images[i]), (f"000000{i}.txt", texts[i].encode())]
    assert content == expected
    assert len(members(folder / "test/0.tar")) == 4
    task = read_task(folder)
    assert (task.kind, len(task.shards)) == ("retrieval", 3)
    assert verify_task(folder) == []


@pytest.mark.parametrize("make", [association_zip, association_parquet])
def test_association(make: Callable[..., Path], images: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "task"
    assert convert_task(make(tmp_path / "source", images), folder, "association") == 2
    suffixes = ["jpg", "png", "webp", "jpg", "jpg"]
    expected: list[tuple[str, bytes]] = [
        (f"0000000.{i}.{suffixes[i]}", images[i]) for i in range(5)
    ]
    expected.append(("0000000.json", b'{"cue": "pogonophile", "associations": [0, 4]}'))
    expected += [(f"0000001.{i}.{suffixes[4 - i]}", images[4 - i]) for i in range(5)]
    expected.append(("0000001.json", b'{"cue": "dog", "associations": [3]}'))
    assert members(folder / "test/0.tar") == expected
    assert (folder / "dataset_type.txt").read_text() == "association\n"
    assert (folder / "test/nshards.txt").read_text() == "1\n"


def test_the_same_bytes_each_time_and_the_origin(images: list[bytes], tmp_path: Path) -> None:
    source = retrieval_zip(tmp_path / "source", images)
    write_checksums(
        source,
        TaskChecksums(repository="a/b", revision="main", commit="c" * 40, splits=(), files={}),
    )
    convert_task(source, tmp_path / "one", "retrieval")
    convert_task(retrieval_zip(tmp_path / "again", images), tmp_path / "two", "retrieval")
    tars = [(tmp_path / name / "test/0.tar").read_bytes() for name in ("one", "two")]
    assert tars[0] == tars[1]
    known, unknown = read_checksums(tmp_path / "one"), read_checksums(tmp_path / "two")
    assert known is not None
    assert unknown is not None
    assert (known.repository, known.commit, known.splits) == ("a/b", "c" * 40, ("test",))
    assert unknown.repository == ""
    assert known.files == unknown.files


def test_lists_as_python_writes_them_json_and_jsonl(images: list[bytes], tmp_path: Path) -> None:
    source = tmp_path / "source"
    table = retrieval_table()
    for row, captions in zip(table, CAPTIONS, strict=True):
        row["raw"] = repr(captions)
    retrieval_zip(source, images, table)
    convert_task(source, tmp_path / "csv", "retrieval")
    lists = [{**row, "raw": captions} for row, captions in zip(table, CAPTIONS, strict=True)]
    (source / "test.csv").unlink()
    (source / "test.json").write_text(json.dumps(lists))
    convert_task(source, tmp_path / "json", "retrieval")
    (source / "test.json").unlink()
    (source / "test.jsonl").write_text("\n".join(map(json.dumps, lists)))
    convert_task(source, tmp_path / "jsonl", "retrieval")
    tars = {(tmp_path / name / "test/0.tar").read_bytes() for name in ("csv", "json", "jsonl")}
    assert len(tars) == 1


def test_rows_of_other_splits_are_left_out(images: list[bytes], tmp_path: Path) -> None:
    table = retrieval_table()
    table[0]["split"] = table[3]["split"] = "train"
    source = retrieval_zip(tmp_path / "source", images, table)
    assert convert_task(source, tmp_path / "task", "retrieval") == 3
    assert convert_task(source, tmp_path / "train", "retrieval", split="train") == 2
    assert members(tmp_path / "train/train/0.tar")[2][1] == images[3]
    with pytest.raises(InputError, match="must hold rows of the split 'val'"):
        convert_task(source, tmp_path / "val", "retrieval", split="val")
    assert not (tmp_path / "val" / CHECKSUMS_FILE).exists()


def test_a_member_whose_name_leads_out_is_only_a_name(images: list[bytes], tmp_path: Path) -> None:
    source = retrieval_zip(tmp_path / "source", images)
    write_zip(source / "images.zip", {f"../../{i}.jpg": data for i, data in enumerate(images)})
    convert_task(source, tmp_path / "deep" / "task", "retrieval")
    assert not list(tmp_path.rglob("*.jpg"))
    assert members(tmp_path / "deep/task/test/0.tar")[0] == ("0000000.jpg", images[0])


def test_an_unfinished_conversion_is_not_complete(images: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "task"
    convert_task(retrieval_zip(tmp_path / "source", images), folder, "retrieval")
    table = retrieval_table()
    table[4]["raw"] = "[]"
    with pytest.raises(InputError):
        convert_task(retrieval_zip(tmp_path / "bad", images, table), folder, "retrieval")
    assert not (folder / CHECKSUMS_FILE).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw": "[]"}, r"row 2: raw must be a list of at least one text"),
        ({"raw": "a dog"}, r"row 2: raw must be a list"),
        ({"raw": '["a", " "]'}, r"row 2: raw must be a list"),
        ({"raw": "__import__('os')"}, r"row 2: raw must be a list"),
        ({"filename": "9.jpg"}, r"row 2: .*images\.zip must hold one image '9\.jpg'"),
        ({"filename": "../0.jpg"}, r"row 2: .*must hold one image"),
        ({"filename": ""}, r"row 2: filename must be a text"),
    ],
)
def test_wrong_rows_of_retrieval(
    images: list[bytes], tmp_path: Path, change: dict[str, str], message: str
) -> None:
    table = retrieval_table()
    table[1].update(change)
    source = retrieval_zip(tmp_path / "source", images, table)
    with pytest.raises(InputError, match=rf"test\.csv, {message}"):
        convert_task(source, tmp_path / "task", "retrieval")


def test_wrong_rows_of_association(images: list[bytes], tmp_path: Path) -> None:
    table = association_table()
    table[1]["associations"] = '["bison", "yak"]'
    source = association_zip(tmp_path / "a", images, table)
    with pytest.raises(InputError, match=r"row 2: associations must be candidates.*'yak'"):
        convert_task(source, tmp_path / "task", "association")
    table = association_table()
    table[0]["candidates"] = json.dumps([*NAMES, "yak"])
    source = association_zip(tmp_path / "b", images, table)
    with pytest.raises(InputError, match=r"row 1: .*one image 'yak'. It holds 0"):
        convert_task(source, tmp_path / "task", "association")
    source = association_parquet(tmp_path / "c", images, candidate_images=[{"bytes": images[0]}])
    with pytest.raises(InputError, match=r"row 1: .*an image for each of the 5 candidates"):
        convert_task(source, tmp_path / "task", "association")
    source = association_parquet(tmp_path / "d", images, candidate_images=["http://x"] * 5)
    with pytest.raises(InputError, match="the bytes of an image, not its address"):
        convert_task(source, tmp_path / "task", "association")
    source = association_parquet(tmp_path / "e", images, cue=None)
    with pytest.raises(InputError, match="row 1 must have a value in the column 'cue'"):
        convert_task(source, tmp_path / "task", "association")


def test_wrong_images_and_files(images: list[bytes], tmp_path: Path) -> None:
    source = retrieval_zip(tmp_path / "a", [*images[:2], b"<html>404", *images[3:]])
    with pytest.raises(InputError, match=r"row 3: the image 'image' must be a JPEG.*<html>40"):
        convert_task(source, tmp_path / "task", "retrieval")
    data = bytearray((source / "images.zip").read_bytes())
    data[60] ^= 255  # in the first image
    (source / "images.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"row 1: '0\.jpg' in .* is not readable"):
        convert_task(source, tmp_path / "task", "retrieval")
    (source / "images.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="not a readable zip file"):
        convert_task(source, tmp_path / "task", "retrieval")
    (source / "more.csv").touch()
    with pytest.raises(InputError, match=r"It holds 1 zips and 2 tables"):
        convert_task(source, tmp_path / "task", "retrieval")
    (source / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a readable parquet file"):
        convert_task(source, tmp_path / "task", "retrieval")
    with pytest.raises(InputError, match="another folder than its source"):
        convert_task(source, source, "retrieval")
    with pytest.raises(InputError, match="kind must be one of"):
        convert_task(source, tmp_path / "task", "classification")  # type: ignore[arg-type]


def test_two_images_of_one_name(images: list[bytes], tmp_path: Path) -> None:
    source = retrieval_zip(tmp_path / "source", images)
    both = {f"{side}/{i}.jpg": data for side in "ab" for i, data in enumerate(images)}
    write_zip(source / "images.zip", both)
    with pytest.raises(InputError, match=r"row 1: .*one image '0\.jpg'. It holds 2"):
        convert_task(source, tmp_path / "task", "retrieval")
