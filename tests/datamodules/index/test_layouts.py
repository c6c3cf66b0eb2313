"""Tars of strangers: messages say what is there, and the commands that they give make it a pool."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from siftclip.datamodules.index.layouts import MAX_KINDS, MemberKind, MemberKinds, kind_of
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.errors import InputError

Make = Callable[..., Any]
Members = list[tuple[str, bytes]]
COUNT = 4


def image(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number * 20, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"a 'quoted' picture {number}"


def samples(
    *parts: tuple[str, Callable[[int], bytes]], in_turn: bool = True
) -> Callable[[], Members]:
    """Members such as `KEY.jpg` of each part, sample by sample or part by part."""

    def make() -> Members:
        numbered = [(n, part) for n in range(COUNT) for part in parts]
        if not in_turn:
            numbered = [(n, part) for part in parts for n in range(COUNT)]
        return [(name.replace("KEY", f"{n:05d}"), of(n)) for n, (name, of) in numbered]

    return make


def text(number: int) -> bytes:
    return caption(number).encode()


def record(number: int) -> bytes:
    return json.dumps({"uid": f"{number:032x}", "url": "x", "caption": caption(number)}).encode()


def nested(number: int) -> bytes:
    return json.dumps({"it's": {"captions": [caption(number), "other"]}}).encode()


def tiff(number: int) -> bytes:
    return image(number, "TIFF")


LAYOUTS: dict[str, tuple[Callable[[], Members], str]] = {
    "two suffixes": (
        samples(("KEY.input.jpg", image), ("KEY.outputs.txt", text)),
        "4 samples have .input.jpg and .outputs.txt; none of these has an image "
        "(.jpg, .png, .jpeg or .webp) or a caption (.txt).",
    ),
    "caption in the json": (
        samples(("KEY.jpg", image), ("KEY.json", record)),
        '4 samples have .jpg and .json with the text "caption"; none of these has a caption '
        "(.txt).",
    ),
    "caption deep in the json": (
        samples(("KEY.jpg", image), ("KEY.json", nested)),
        '4 samples have .jpg and .json with the text "it\'s.captions.0"; none',
    ),
    "tif and json": (
        samples(("KEY.tif", tiff), ("KEY.json", record)),
        '4 samples have .tif and .json with the text "caption"; none of these has an image '
        "(.jpg, .png, .jpeg or .webp) or a caption (.txt).",
    ),
    "tif": (
        samples(("KEY.tif", tiff), ("KEY.txt", text)),
        "4 samples have .tif and .txt; none of these has an image (.jpg, .png, .jpeg or .webp).",
    ),
    "another suffix": (
        samples(("KEY.jpg", image), ("KEY.caption", text)),
        "4 samples have .jpg and .caption; none of these has a caption (.txt).",
    ),
    "several captions": (
        samples(("KEY.jpg", image), ("KEY.0.txt", text), ("KEY.1.txt", lambda n: b"other")),
        "4 samples have .jpg, .0.txt and .1.txt; none of these has a caption (.txt).",
    ),
    "images first": (
        samples(("KEY.jpg", image), ("KEY.txt", text), in_turn=False),
        "4 whose image and caption do not follow each other in their tar "
        "(such as s.tar:00000 [00000.jpg, 00000.txt]",
    ),
    "folders": (
        samples(("images/KEY.jpg", image), ("texts/KEY.txt", text), in_turn=False),
        "4 whose image and caption are in different folders of their tar: two keys "
        "(such as s.tar:images/00000 [images/00000.jpg, texts/00000.txt]",
    ),
    "folders of three": (
        samples(("t/KEY.txt", text), ("i/KEY.jpg", image), ("j/KEY.json", record), in_turn=False),
        "4 whose image and caption are in different folders",
    ),
}


# Each takes seconds, in which webdataset loads torch
TRIED = (
    "two suffixes",
    "caption deep in the json",
    "tif and json",
    "images first",
    "folders of three",
)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], None]:
    """Run a command of a message in a shell, as a user who has installed Siftclip does."""

    def run(command: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "python").unlink(missing_ok=True)
        (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "python").chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(
            ["bash", "-c", command], check=True, cwd=tmp_path, env={**os.environ, "PATH": path}
        )

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_message_says_what_is_there_and_its_command_makes_a_pool(
    name: str, tmp_path: Path, write_tar: Make, load_pool: Make, run: Callable[[str], None]
) -> None:
    make, found = LAYOUTS[name]
    root = tmp_path / "a pool"
    write_tar(root / "s.tar", make())
    with pytest.raises(InputError) as caught:
        load_pool(root)
    message = str(caught.value)
    assert f"{COUNT} of {COUNT} samples are bad" in message
    assert found in message
    assert "allow more" not in message  # of which there would be none
    command = message[message.index("mkdir new;") :]
    if name not in TRIED:
        return
    run(command)
    pool = load_pool(tmp_path / "new")
    reader = SampleReader(pool=pool, max_image_pixels=100)
    assert [reader.read_caption(row) for row in range(len(pool))] == list(
        map(caption, range(COUNT))
    )
    for row in range(COUNT):
        red = np.asarray(reader.read_image(row))[0, 0, 0]
        assert abs(int(red) - 20 * row) < 5
    has_uids = name in ("tif and json", "folders of three")
    assert pool.derived_uids == (0 if has_uids else COUNT)


def test_what_the_messages_advise_about_dots_in_names_makes_a_pool(
    tmp_path: Path, write_tar: Make, load_pool: Make, run: Callable[[str], None]
) -> None:
    root = tmp_path / "pool"
    write_tar(root / "s.tar", samples(("img.v2.KEY.tif", tiff), ("img.v2.KEY.json", record))())
    with pytest.raises(InputError, match=r"Read the pool with last_dot as the key split\."):
        load_pool(root)
    with pytest.raises(InputError, match=r"into the folder new, a pool then") as caught:
        Pool(root, cache_dir=tmp_path / "c", key_split="last_dot", progress=False)
    run(str(caught.value).partition("a pool then: ")[2])
    pool = load_pool(tmp_path / "new")
    assert pool.keys.tolist() == [f"img_v2_{number:05d}".encode() for number in range(COUNT)]
    assert pool.derived_uids == 0


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([("KEY.jpg", image), ("KEY.cls", text)], "4 samples have .jpg and .cls; none"),
        (
            [("KEY.jpg", image), ("KEY.json", lambda n: b'{"url": "x", "place": "y", "n": 1}')],
            '4 samples have .jpg and .json whose texts are "url, place"; none',
        ),
        ([("KEY.jpg", image), ("KEY.json", lambda n: b"{")], "4 samples have .jpg and .json; none"),
        ([("KEY.npy", image), ("KEY.txt", text)], "4 samples have .npy and .txt; none"),
    ],
)
def test_layout_without_a_command_points_to_the_docs(
    parts: Any, found: str, tmp_path: Path, write_tar: Make, load_pool: Make
) -> None:
    write_tar(tmp_path / "pool" / "s.tar", samples(*parts)())
    with pytest.raises(InputError) as caught:
        load_pool(tmp_path / "pool")
    assert found in str(caught.value)
    assert str(caught.value).endswith("docs/pools.md has commands that write such tars.")


def test_few_incomplete_samples_are_described_beside_the_usual_advice(
    tmp_path: Path, write_tar: Make, load_pool: Make, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [
        (f"w{n}.{suffix}", data)
        for n in range(9)
        for suffix, data in [("jpg", b"i"), ("txt", b"t")]
    ]
    write_tar(tmp_path / "pool" / "s.tar", [*whole, ("x.gif", b"g"), ("x.txt", b"t")])
    found = "1 sample has .gif and .txt; none of these has an image (.jpg, .png, .jpeg or .webp)."
    with pytest.raises(InputError) as caught:
        load_pool(tmp_path / "pool")
    assert str(caught.value).endswith(
        f"{found} Repair or remove these samples, or allow more with max_bad_fraction."
    )
    assert len(load_pool(tmp_path / "pool", max_bad_fraction=0.1)) == 9
    assert f"left out 1 without image (such as s.tar:x [x.gif, x.txt]). {found}" in caplog.text


def test_table_of_an_older_version_has_no_kinds(
    tmp_path: Path, write_tar: Make, load_pool: Make
) -> None:
    write_tar(tmp_path / "pool" / "s.tar", [("a.jpg", b"i"), ("a.txt", b"t"), ("b.jpg", b"i")])
    pool = load_pool(tmp_path / "pool", max_bad_fraction=0.5)
    notes = json.loads((pool.table_folder / "notes.json").read_text())
    del notes["incomplete"]
    (pool.table_folder / "notes.json").write_text(json.dumps(notes))
    with pytest.raises(InputError, match=r"1 of 2 samples are bad.*1 without caption"):
        load_pool(tmp_path / "pool")


def test_kinds_are_bounded() -> None:
    """A tar whose samples have nothing in common does not fill notes and messages."""
    kinds = MemberKinds()
    for number in range(3 * MAX_KINDS):
        kinds.add(kind_of(["jpg", f"{number}.seg.png"], None))
    assert len(kinds.counts) == MAX_KINDS + 1
    assert sum(kinds.counts.values()) == 3 * MAX_KINDS
    assert len(kinds.describe()) < 500
    restored = MemberKinds.from_state(json.loads(json.dumps(kinds.state())))
    assert restored.counts == kinds.counts
    restored.merge(kinds)
    assert restored.counts == {kind: 2 * count for kind, count in kinds.counts.items()}
    many = kind_of([f"s{number}" for number in range(50)], None)
    assert ".s0, .s1, .s2, .s3, .s4 and 45 more" in MemberKinds(Counter([many])).describe()


def test_names_in_a_command_cannot_leave_it(
    tmp_path: Path, write_tar: Make, load_pool: Make, run: Callable[[str], None]
) -> None:
    """A tar of a stranger chooses suffixes and fields; what is pasted into a shell is quoted."""
    image_suffix, text_suffix = "'; touch pwned; '.tif", "a\"];open('pwned','w');b=['.txt"
    write_tar(
        tmp_path / "pool" / "s.tar",
        [
            (f"k.{image_suffix}", b"i"),
            (f"k.{text_suffix}", b"t"),
            ("m.jpg", b"i"),
            ("m.json", b'{"\'; touch pwned; \'": {"caption": "x"}}'),
        ],
    )
    with pytest.raises(InputError) as caught:
        load_pool(tmp_path / "pool")
    assert "touch pwned" in str(caught.value)
    for kind in (
        MemberKind((image_suffix, text_suffix)),
        MemberKind(("jpg", "json"), (("'; touch pwned; '", "caption"),)),
    ):
        command = MemberKinds(Counter([kind])).way_out("pool/*.tar", "first_dot")
        with pytest.raises(subprocess.CalledProcessError):  # KeyError: each is half of the tar
            run(command[command.index("mkdir") :])
        shutil.rmtree(tmp_path / "new")
        assert not list(tmp_path.rglob("pwned"))


ACCEPTED: dict[str, Members] = {
    "./ before the names": [("./a.jpg", b"i"), ("./a.txt", b"t")],
    "folders": [("x/y.z/a.jpg", b"i"), ("x/y.z/a.txt", b"t")],
    "upper case": [("a.JPG", b"i"), ("a.TXT", b"t")],
    "mixed case": [("a.Jpeg", b"i"), ("a.txt", b"t")],
    "several images": [("a.webp", b"w"), ("a.png", b"p"), ("a.jpg", b"i"), ("a.txt", b"t")],
    "macOS": [
        ("__MACOSX/x/._a.jpg", b"m"),
        ("x/.DS_Store", b"m"),
        ("x/._a.jpg", b"m"),
        ("x/a.jpg", b"i"),
        ("x/._a.txt", b"m"),
        ("x/a.txt", b"t"),
        ("._x", b"m"),
        (".DS_Store", b"m"),
    ],
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("key_split", ["first_dot", "last_dot"])
def test_what_is_read_as_it_is(name: str, key_split: Any, tmp_path: Path, write_tar: Make) -> None:
    write_tar(tmp_path / "pool" / "s.tar", ACCEPTED[name])
    pool = Pool(tmp_path / "pool", max_bad_fraction=0, key_split=key_split, progress=False)
    assert len(pool) == 1
    sample = SampleReader(pool=pool, max_image_pixels=100).read_one(0)
    assert sample == (b"i", b"t")


# ---- files that are no tars ---------------------------------------------------------------------

NO_TARS: dict[str, tuple[bytes, str]] = {
    "0 bytes": (b"", "empty"),
    "text": (b"this file was not found, sorry about that", "a text"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>" * 99, "a web page"),
    "gzip": (b"\x1f\x8b\x08" + bytes(range(256)) * 9, "compressed by gzip"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git"),
    "zeros": (bytes(2 << 20), "zeros"),
    "noise": (np.random.default_rng(0).bytes(4096), "damaged from its first header on"),
    "an image": (b"\xff\xd8\xff\xe0" + bytes(2000), "damaged from its first header on"),
}


@pytest.mark.parametrize("name", NO_TARS)
def test_file_that_is_no_tar_is_a_fault_like_a_cut_one(
    name: str, tmp_path: Path, write_tar: Make, load_pool: Make
) -> None:
    content, found = NO_TARS[name]
    for tar in ("0.tar", "2.tar"):
        members = [(f"{n}.{s}", d) for n in range(10) for s, d in [("jpg", b"i"), ("txt", b"t")]]
        write_tar(tmp_path / "pool" / tar, members)
    (tmp_path / "pool" / "1.tar").write_bytes(content)
    pool = load_pool(tmp_path / "pool", max_bad_fraction=0.5)
    assert len(pool) == 20
    assert pool.faults.samples == 10  # as many as in the other tars
    (cause,) = [
        cause for cause in pool.faults.counts if cause.startswith("lost with a tar that is")
    ]
    assert found in cause
    assert pool.faults.examples[cause] == ["1.tar"]
    with pytest.raises(
        InputError, match=r"10 of 30 samples are bad.*1\.tar.*Copy these tars again"
    ):
        load_pool(tmp_path / "pool")


@pytest.mark.parametrize("end", [0, 1024, 10240, 1 << 20])
def test_tar_without_members_is_no_fault(
    end: int, tmp_path: Path, write_tar: Make, load_pool: Make
) -> None:
    write_tar(tmp_path / "pool" / "0.tar", [("a.jpg", b"i"), ("a.txt", b"t")])
    if end:
        (tmp_path / "pool" / "1.tar").write_bytes(bytes(end))
    pool = load_pool(tmp_path / "pool", max_bad_fraction=0)
    assert (len(pool), pool.faults.samples) == (1, 0)


def test_tars_that_are_all_compressed(
    tmp_path: Path, write_tar: Make, load_pool: Make, run: Callable[[str], None]
) -> None:
    import gzip

    for number in range(2):
        path = write_tar(tmp_path / "pool" / f"{number}.tar", [("a.jpg", b"i"), ("a.txt", b"t")])
        path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match=r"2 lost with a tar that is compressed by gzip") as caught:
        load_pool(tmp_path / "pool")
    message = str(caught.value)
    run(message[message.index("mkdir new;") :])
    assert len(load_pool(tmp_path / "new")) == 2


def test_pool_of_one_empty_file(tmp_path: Path, load_pool: Make) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "0.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 1 samples are bad.*a tar that is empty"):
        load_pool(tmp_path / "pool")
    with pytest.raises(InputError, match=r"holds 1 tars without one sample\..*is empty"):
        load_pool(tmp_path / "pool", max_bad_fraction=1.0)
    assert [shard.size_bytes for shard in LocalStorage(str(tmp_path / "pool")).shards()] == [0]
