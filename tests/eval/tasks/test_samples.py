from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from clip_benchmark.datasets.builder import build_wds_dataset
from PIL import Image
from torch import Tensor

from siftclip.datamodules.pool.reader import decode_image
from siftclip.errors import InputError
from siftclip.eval.tasks.kinds.base import ImagesOfSample, TaskKind, TextFeatures
from siftclip.eval.tasks.kinds.registry import offered
from siftclip.eval.tasks.kinds.values import Label, Task, TaskSamples, TaskScores
from siftclip.eval.tasks.samples import read_samples, tar_of
from siftclip.eval.tasks.task import find_tasks, read_task

MakeTask = Callable[..., Path]
MakeImage = Callable[..., bytes]
Member = tuple[str, bytes]


def pixels(samples: TaskSamples, image: int) -> np.ndarray:
    _, offset, size = samples.places[image].tolist()
    data = tar_of(samples, image).read_bytes()[offset : offset + size]
    return np.asarray(decode_image(data, 10**6))


@pytest.fixture
def open_one(tmp_path: Path, make_task: MakeTask) -> Callable[..., TaskSamples]:
    """`open_one(kind, *members, special=None)`: a task of one sample with these members."""

    def start(kind: str, *members: Member, special: str | None = None) -> TaskSamples:
        root = make_task(tmp_path / "x", kind, members=[list(members)], shards=1)
        return read_samples(replace(read_task(root), special=special))

    return start


@pytest.mark.parametrize("name", ["things", "few", "many_labels", "captions"])
@pytest.mark.filterwarnings("ignore:.*shardshuffle")  # clip_benchmark's, number 14
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tars open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the same, later
def test_samples_are_those_of_clip_benchmark(task_root: Path, name: str) -> None:
    theirs = build_wds_dataset(name, np.asarray, data_dir=str(task_root / f"wds_{name}"))
    ours = read_samples(read_task(task_root / f"wds_{name}"))
    expected = list(theirs)
    assert len(ours) == len(expected) > 5
    assert list(ours.task.classnames) == (theirs.classes or [])
    assert list(ours.task.templates) == (theirs.templates or [])
    assert ours.first_image.tolist() == list(range(len(expected) + 1))
    for i, (image, label) in enumerate(expected):
        np.testing.assert_array_equal(pixels(ours, i), image)
        if name == "captions":
            assert list(ours.captions[i]) == label
            continue
        assert ours.labels is not None
        np.testing.assert_array_equal(ours.labels[i], label)
    if name == "captions":
        assert ours.labels is None
    else:
        assert ours.labels is not None
        assert ours.labels.dtype == (np.bool_ if name == "many_labels" else np.int64)
        assert ours.captions == ()
    assert ours.keys.tolist() == [f"s{i:04d}" for i in range(len(expected))]


def test_samples_of_several_images(task_root: Path, make_image: MakeImage) -> None:
    pairs = read_samples(read_task(task_root / "wds_pairs"))
    assert np.diff(pairs.first_image).tolist() == [2] * 9
    assert pairs.captions[7] == ("thing 1 here", "a photo of thing 2")
    cues = read_samples(read_task(task_root / "wds_cues"))
    assert np.diff(cues.first_image).tolist() == [5, 6, 7, 8, 9, 10, 5, 6]
    assert cues.captions[4] == ("Thing 4",)
    assert [one.tolist() for one in cues.associations[:3]] == [
        [True, False, False, False, False],
        [True, False, True, False, False, False],
        [True, False, True, False, False, False, True],
    ]
    # image 3 of sample 5, the number 5 + 3
    expected = decode_image(make_image(8, "JPEG"), 10**6)
    np.testing.assert_array_equal(pixels(cues, int(cues.first_image[5]) + 3), expected)


def test_numbered_images_are_ordered_by_number(open_one: Any, make_image: MakeImage) -> None:
    order = [10, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9]
    images = [(f"{k}.png", make_image(k)) for k in order]
    record = json.dumps({"cue": "tree", "associations": [10]}).encode()
    samples = open_one("association", *images, ("json", record))
    for k in range(11):
        np.testing.assert_array_equal(
            pixels(samples, k), np.asarray(decode_image(make_image(k), 10**6))
        )


def test_the_preferred_image_is_that_of_clip_benchmark(open_one: Any, make_image: Any) -> None:
    png = make_image(2)
    samples = open_one(
        "classification", ("jpg", make_image(1, "JPEG")), ("png", png), ("cls", b"0")
    )
    np.testing.assert_array_equal(pixels(samples, 0), np.asarray(decode_image(png, 10**6)))


def test_a_caption_selection_with_one_image(open_one: Any, make_image: MakeImage) -> None:
    samples = open_one(
        "image_caption_selection", ("png", make_image(0)), ("txt", b"right\nwrong\nworse")
    )
    assert samples.captions == (("right", "wrong", "worse"),)
    assert samples.first_image.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["retrieval", "image_caption_selection"])
@pytest.mark.parametrize(("text", "line"), [(b"  ", 1), (b"\n", 1), (b"a\n\t\nb", 2)])
def test_blank_captions(
    open_one: Any, make_image: MakeImage, kind: str, text: bytes, line: int
) -> None:
    with pytest.raises(
        InputError, match=rf"0\.tar: s0000: a caption must not be .* Line {line} of"
    ):
        open_one(kind, ("png", make_image(0)), ("txt", text))


def test_class_names_that_cannot_be_right(
    tmp_path: Path, make_task: MakeTask, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_task(tmp_path / "wds_x", classes=4, samples=6)
    task = read_task(root)
    read_samples(task)
    assert caplog.records == []
    read_samples(replace(task, classnames=("cat", "dog", "cat", "dog", "cow", "bee")))
    equal, empty = (record.getMessage() for record in caplog.records)
    assert "x: these class names stand in more than one line" in equal
    assert equal.endswith("equal classes: 'cat', 'dog'")
    assert empty.startswith("x: 2 of 6 classes have no sample in the split 'test'")
    caplog.clear()
    read_samples(replace(task, classnames=("a", "b", "c", "d", "e")), max_samples=1)
    assert [record.getMessage()[:14] for record in caplog.records] == ["x: 1 of 5 clas"]
    caplog.clear()
    several = read_task(make_task(tmp_path / "wds_y", "multilabel", samples=1, shards=1))
    read_samples(several)
    assert caplog.records == []


def test_metadata(open_one: Any, make_image: MakeImage, make_npy: Any) -> None:
    members = ("png", make_image(0)), ("cls", b"2"), ("npy", make_npy(np.array([3.0, 0, 2])))
    samples = open_one("classification", *members, special="fmow")
    assert samples.metadata.tolist() == [[3, 0, 2]]
    assert samples.metadata.dtype == np.int64
    assert samples.labels.tolist() == [2]


def test_metadata_of_other_tasks_is_not_read(open_one: Any, make_image: MakeImage) -> None:
    samples = open_one("classification", ("png", make_image(0)), ("cls", b"2"), ("npy", b"?"))
    assert samples.metadata is None


def test_faces_have_metadata_only(open_one: Any, make_image: MakeImage, make_npy: Any) -> None:
    members = ("png", make_image(0)), ("npy", make_npy(np.arange(4)))
    samples = open_one("classification", *members, special="faces")
    assert samples.labels is None
    assert samples.metadata.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "array", [None, np.zeros((2, 2)), np.array(["a"]), np.array([0.5]), np.array([np.nan])]
)
def test_metadata_of_another_form(
    open_one: Any, make_image: MakeImage, make_npy: Any, array: np.ndarray | None
) -> None:
    data = b"" if array is None else make_npy(array)
    with pytest.raises(InputError, match=r"0\.tar: s0000: .*(metadata|member with an array)"):
        open_one(
            "classification", ("png", make_image(0)), ("cls", b"0"), ("npy", data), special="fmow"
        )


def test_metadata_of_several_lengths(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, make_npy: Any
) -> None:
    members = [
        [("png", make_image(0)), ("cls", b"0"), ("npy", make_npy(np.arange(count)))]
        for count in (2, 3)
    ]
    task = read_task(make_task(tmp_path / "x", members=members, shards=1))
    with pytest.raises(InputError, match=r"x/test: .*They have \[2, 3\]"):
        read_samples(replace(task, special="geode"))


class Bomb:
    exploded = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return setattr, (Bomb, "exploded", True)


@pytest.mark.parametrize("special", [None, "geode"])
def test_pickles_are_never_loaded(
    open_one: Any, make_image: MakeImage, make_npy: Any, special: str | None
) -> None:
    bomb = make_npy(np.array([Bomb()], dtype=object))
    kind = "multilabel" if special is None else "classification"
    with pytest.raises(InputError, match="s0000: "):
        open_one(kind, ("png", make_image(0)), ("cls", b"0"), ("npy", bomb), special=special)
    assert not Bomb.exploded


def test_other_members_are_not_looked_at(open_one: Any, make_image: MakeImage) -> None:
    members = ("png", make_image(0)), ("pyd", pickle.dumps(Bomb())), ("cls", b"0")
    assert open_one("classification", *members).labels.tolist() == [0]
    assert not Bomb.exploded


@pytest.mark.parametrize("label", [b"6", b"-1", b"cat", b"", b"1.0"])
def test_label_out_of_range(open_one: Any, make_image: MakeImage, label: bytes) -> None:
    message = (
        rf"0\.tar: s0000: the label must be a number from 0 to 5, .* Got {re.escape(repr(label))}"
    )
    with pytest.raises(InputError, match=message):
        open_one("classification", ("png", make_image(0)), ("cls", label))


@pytest.mark.parametrize(
    "label", [np.ones(5), np.ones((1, 6)), np.full(6, 2), np.full(6, np.nan), np.array(["a"] * 6)]
)
def test_multi_hot_label_of_another_form(
    open_one: Any, make_image: MakeImage, make_npy: Any, label: np.ndarray
) -> None:
    with pytest.raises(InputError, match=r"0\.tar: s0000: the label must be an npy array of 6"):
        open_one("multilabel", ("png", make_image(0)), ("npy", make_npy(label)))


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (b"", "at least one caption"),
        (b"\xff", "must be UTF-8"),
        (b"short\n" + b"ab " * 6000, r"may have 16384 bytes, .*Line 2 of \.txt has more"),
        (b"x" * 300, "and 250 letters in a row"),
    ],
)
@pytest.mark.parametrize("kind", ["retrieval", "image_caption_selection"])
def test_captions_that_are_none(
    open_one: Any, make_image: MakeImage, kind: str, captions: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=rf"0\.tar: s0000: .*{message}"):
        open_one(kind, ("png", make_image(0)), ("txt", captions))


@pytest.mark.parametrize(
    "record",
    [
        b"", b"{", b"[]", b"3", b"[" * 100_000, b'{"cue": "a"}', b'{"cue": 1, "associations": [0]}',
        b'{"cue": " ", "associations": [0]}', b'{"cue": "a", "associations": []}',
        b'{"cue": "a", "associations": [2]}', b'{"cue": "a", "associations": [-1]}',
        b'{"cue": "a", "associations": [0.0]}', b'{"cue": "a", "associations": [true]}',
        b'{"cue": "a", "associations": [[0]]}', b'{"cue": "a", "associations": [[0], [0, 1]]}',
        b'{"cue": "a", "associations": 0}',
    ],
)  # fmt: skip
def test_associations_of_another_form(open_one: Any, make_image: MakeImage, record: bytes) -> None:
    images = [(f"{k}.png", make_image(k)) for k in (0, 1)]
    with pytest.raises(InputError, match=r'0\.tar: s0000: .*"associations".*from 0 to 1'):
        open_one("association", *images, ("json", record))


@pytest.mark.parametrize("suffixes", [["png"], ["0.png", "2.png"], ["1.png"], ["0.gif"], ["a.png"],
                                      ["0.png", f"{'1' * 5000}.png"]])  # fmt: skip
def test_numbered_images_are_missing(
    open_one: Any, make_image: MakeImage, suffixes: list[str]
) -> None:
    record = ("json", b'{"cue": "a", "associations": [0]}')
    images = [(suffix, make_image(0)) for suffix in suffixes]
    if len(suffixes[-1]) > 100:  # no such image: one is left
        assert len(open_one("association", *images, record).places) == 1
        return
    with pytest.raises(InputError, match=r"s0000: .* images \.0\.jpg, .* It has \["):
        open_one("association", *images, record)


def test_members_are_missing(tmp_path: Path, make_task: MakeTask, make_image: MakeImage) -> None:
    def opened(name: str, *members: Member) -> None:
        read_samples(read_task(make_task(tmp_path / name, members=[list(members)], shards=1)))

    with pytest.raises(InputError, match=r"s0000: .* a \.webp or \.png .* It has \['cls'\]"):
        opened("a", ("cls", b"0"))
    with pytest.raises(InputError, match=r"s0000: .* a \.cls member. It has \['png'\]"):
        opened("b", ("png", make_image(0)))
    with pytest.raises(InputError, match=r"s0000: .* a \.webp or .* It has \['0\.png', 'cls'\]"):
        opened("c", ("0.png", make_image(0)), ("cls", b"0"))


class CountsAnimals(TaskKind):
    """A kind of another distribution."""

    name = "counts_animals"
    suffix = "txt"
    main_metric = "acc"

    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        return Label(value=int(data))

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        raise NotImplementedError


class CountsOnSeveral(CountsAnimals):
    images: ClassVar[ImagesOfSample] = "numbered"


@pytest.mark.parametrize(
    ("kind", "suffix", "message"),
    [
        (
            CountsAnimals,
            "0.png",
            r'a \.webp or .*set images = "numbered" in the class CountsAnimals',
        ),
        (CountsAnimals, "gif", r"of the kind counts_animals must have a .*'txt'\]\.$"),
        (
            CountsOnSeveral,
            "png",
            r'must have numbered images .*set images = "one" in the class Cou',
        ),
        (CountsOnSeveral, "1.png", r"must have numbered images .*'txt'\]\.$"),
    ],
)
def test_the_author_of_a_kind_is_told_how_to_declare_its_images(
    open_one: Any, make_image: MakeImage, kind: type[TaskKind], suffix: str, message: str
) -> None:
    members = [(suffix, make_image(0)), ("txt", b"3")]
    with offered(kind()), pytest.raises(InputError, match=message):
        open_one(kind.name, *members)


@pytest.mark.parametrize("what", ["images", "captions"])
def test_selections_of_several_sizes(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, what: str
) -> None:
    images = [("0.png", make_image(0)), ("1.png", make_image(1))]
    samples = [[*images, ("txt", b"a\nb")] for _ in range(3)]
    samples[2] = [*images[:1], ("txt", b"a\nb")] if what == "images" else [*images, ("txt", b"a")]
    root = make_task(tmp_path / "x", "image_caption_selection", members=samples, shards=1)
    with pytest.raises(InputError, match=rf"x: .*as many {what} as the first, 2. s0002 has 1"):
        read_samples(read_task(root))


def test_no_samples(tmp_path: Path, make_task: MakeTask) -> None:
    """Also in one tar of several: a tar that was lost is not a smaller test set."""
    with pytest.raises(InputError, match=r"0\.tar must hold samples"):
        read_samples(read_task(make_task(tmp_path / "x", members=[])))
    with pytest.raises(InputError, match=r"0\.tar must hold samples"):
        read_samples(read_task(make_task(tmp_path / "y", samples=3, shards=4)))


def test_truncated_tar(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "x")
    tar = root / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"1\.tar ends after 5000 bytes.*Copy this task again"):
        read_samples(read_task(root))
    tar.write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"1\.tar"):
        read_samples(read_task(root))


def test_it_warns_of_nothing_and_opens_no_image(
    task_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Image, "open")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in find_tasks(task_root).tasks:
            assert len(read_samples(task)) > 5


@pytest.mark.parametrize("name", ["things", "captions", "many_labels", "pairs", "cues"])
def test_some_samples_are_those_samples(task_root: Path, name: str) -> None:
    task = read_task(task_root / f"wds_{name}")
    whole, some = read_samples(task), read_samples(task, max_samples=4)
    rows = np.flatnonzero(np.isin(whole.keys, some.keys))
    assert len(some) == len(rows) == 4
    assert some.keys.tolist() == whole.keys[rows].tolist()
    for new, row in enumerate(rows):
        old = whole.places[whole.first_image[row] : whole.first_image[row + 1]]
        np.testing.assert_array_equal(
            some.places[some.first_image[new] : some.first_image[new + 1]], old
        )
        if whole.labels is not None:
            assert some.labels is not None
            np.testing.assert_array_equal(some.labels[new], whole.labels[row])
        if whole.captions:
            assert some.captions[new] == whole.captions[row]
        if whole.associations:
            assert some.associations[new] is not whole.associations[0] or row == 0
            np.testing.assert_array_equal(some.associations[new], whole.associations[row])
    assert read_samples(task, max_samples=99).keys.tolist() == whole.keys.tolist()


def test_a_choice_of_samples_is_stable(tmp_path: Path, make_task: MakeTask) -> None:
    """Fewer are among more; how samples are spread over tars, and other samples, do not matter."""
    one = read_task(make_task(tmp_path / "a", samples=20, shards=1))
    three = read_task(make_task(tmp_path / "b", samples=20, shards=3))
    five = read_samples(one, max_samples=5).keys.tolist()
    assert read_samples(three, max_samples=5).keys.tolist() == five
    assert set(five) < set(read_samples(one, max_samples=9).keys.tolist())
    assert five != [f"s{i:04d}" for i in range(5)]
    assert five == ["s0000", "s0003", "s0009", "s0015", "s0019"]  # as on any machine


# ---- several samples under one key ------------------------------------------------------------


def test_one_name_for_several_samples_is_an_error(
    open_one: Callable[..., TaskSamples], make_image: MakeImage
) -> None:
    image = make_image(0)
    several = [("png", image), ("cls", b"0"), ("png", make_image(1)), ("cls", b"1")]
    match = (
        r"x/test/0\.tar: s0000: .* one member of each suffix.*s0000\.png, s0000\.cls, s0000\.png"
    )
    with pytest.raises(InputError, match=match):
        open_one("classification", *several)


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        ("classification", [("png", b""), ("cls", b"0"), ("cls", b"0")]),
        ("classification", [("png", b""), ("cls", b"0"), ("PNG", b"")]),
        ("retrieval", [("jpg", b""), ("txt", b"a"), ("txt", b"b")]),
        ("association", [("0.jpg", b""), ("0.jpg", b""), ("json", b"{}")]),
    ],
)
def test_a_suffix_twice_is_an_error(
    open_one: Callable[..., TaskSamples], kind: str, members: list[Member]
) -> None:
    with pytest.raises(InputError, match=r"must have one member of each suffix"):
        open_one(kind, *members)


def test_names_with_more_dots(tmp_path: Path, make_task: MakeTask, make_image: MakeImage) -> None:
    members = [
        [(f"{number}.png", make_image(number)), (f"{number}.cls", b"%d" % number)]
        for number in range(3)
    ]
    root = make_task(
        tmp_path / "x", members=[[part for both in members for part in both]], shards=1
    )
    with pytest.raises(
        InputError, match=r"s0000\.0\.png, s0000\.0\.cls.*last_dot as the key split"
    ):
        read_samples(read_task(root))
    samples = read_samples(read_task(root, key_split="last_dot"))
    assert samples.keys.tolist() == ["s0000.0", "s0000.1", "s0000.2"]
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2]


def test_members_beside_the_image_change_nothing(
    open_one: Callable[..., TaskSamples], make_image: MakeImage
) -> None:
    image = make_image(0)
    samples = open_one(
        "classification", ("seg.png", b"mask"), ("png", image), ("cls", b"3"), ("input.jpg", b"")
    )
    assert len(samples) == 1
    assert samples.places[0, 2] == len(image)
