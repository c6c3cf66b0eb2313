from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.pool.reader import decode_image
from siftclip.errors import InputError
from siftclip.eval.encoding.encoder import EncodeOptions, Encoder, ImageFeatures
from siftclip.eval.tasks.images import ImageTable, distinct_images, image_ids, read_images
from siftclip.eval.tasks.samples import read_samples
from siftclip.eval.tasks.task import find_tasks, read_task
from siftclip.ranks import OneRank, Ranks

OPTIONS = EncodeOptions(device=torch.device("cpu"), batch_size=4, progress=False)
TEXTS = ["a cat", "a photo of a very small cat", "", "größer", *(f"picture {i}" for i in range(9))]

RunOnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]


@pytest.fixture(scope="module")
def table(task_root: Path) -> ImageTable:
    samples = [read_samples(task) for task in find_tasks(task_root, ["things", "pairs"]).tasks]
    return distinct_images(samples)[0]


@pytest.fixture
def ready(clip: ClipModel) -> ClipModel:
    return replace(clip, model=copy.deepcopy(clip.model).eval())


def sets_of(table: ImageTable) -> list[np.ndarray]:
    """Sets of several sizes and orders; one is empty, one has a single image."""
    rows = np.arange(len(table))
    return [rows[:9], rows[9:9], rows[20:12:-1], rows[9:10], rows[10:12]]


@torch.no_grad()
def encode(
    clip: ClipModel,
    table: ImageTable,
    sets: Sequence[np.ndarray],
    ranks: Ranks | None = None,
    **changes: Any,
) -> tuple[list[ImageFeatures], np.ndarray]:
    if ranks is not None:  # ranks are threads here, and each has a model of its own
        clip = replace(clip, model=copy.deepcopy(clip.model))
    encoder = Encoder(clip, replace(OPTIONS, **changes), ranks)
    images = list(encoder.image_sets(table, sets))
    return images, encoder.texts(TEXTS).numpy()


@torch.no_grad()
def test_features_are_those_of_the_model(ready: ClipModel, table: ImageTable) -> None:
    found, texts = encode(ready, table, sets_of(table))
    contents = list(read_images(table))
    for rows, one in zip(sets_of(table), found, strict=True):
        assert one.features.dtype == np.float32
        assert one.faults == {}
        assert one.ids.tolist() == image_ids(table.take(rows)).tolist()
        if not len(rows):
            continue
        pictures = [ready.eval_transform(decode_image(contents[row], 10**6)) for row in rows]
        expected = ready.model.encode_image(torch.stack(pictures), normalize=True)  # type: ignore[operator]
        np.testing.assert_allclose(one.features, expected, atol=2e-6)
    expected = ready.model.encode_text(ready.tokenizer(TEXTS), normalize=True)  # type: ignore[operator]
    np.testing.assert_allclose(texts, expected, atol=2e-6)


class Whole:
    """A transform that cannot be taken apart."""

    def __init__(self, clip: ClipModel) -> None:
        self.transform = clip.eval_transform

    def __call__(self, image: Any) -> torch.Tensor:
        return self.transform(image)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_the_model_gets_the_pixels_of_its_transform(
    ready: ClipModel, table: ImageTable, whole: bool, workers: int
) -> None:
    """To the bit, whether loaders send uint8 or what the transform gave."""
    given: list[torch.Tensor] = []
    model: Any = ready.model
    model.visual.register_forward_pre_hook(lambda _, images: given.append(images[0]))
    asked = replace(ready, eval_transform=Whole(ready)) if whole else ready
    encode(asked, table, [np.arange(len(table))], num_workers=workers)
    pictures = [ready.eval_transform(decode_image(data, 10**6)) for data in read_images(table)]
    seen = torch.cat(given)
    assert seen.dtype == torch.float32
    assert all(images.is_contiguous() for images in given)
    assert torch.equal(seen, torch.stack(pictures))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_change_nothing(
    ready: ClipModel, table: ImageTable, run_on_ranks: RunOnRanks, size: int
) -> None:
    """Not a bit, also where a rank has no batch of a set."""
    sets = sets_of(table)
    images, texts = encode(ready, table, sets)
    for found, found_texts in run_on_ranks(size, lambda ranks: encode(ready, table, sets, ranks)):
        assert np.array_equal(found_texts, texts)
        for one, expected in zip(found, images, strict=True):
            assert np.array_equal(one.features, expected.features)
            assert np.array_equal(one.ids, expected.ids)
            assert one.faults == {}


def test_more_ranks_than_batches(
    ready: ClipModel, table: ImageTable, run_on_ranks: RunOnRanks
) -> None:
    """Nothing at all is left for the last ranks, and of an empty list for none."""
    rows = [np.arange(3)]
    (alone,), _ = encode(ready, table, rows)
    for (found,), _ in run_on_ranks(4, lambda ranks: encode(ready, table, rows, ranks)):
        assert np.array_equal(found.features, alone.features)
    empty = [np.arange(0)]
    for (found,), _ in run_on_ranks(2, lambda ranks: encode(ready, table, empty, ranks)):
        assert len(found.features) == len(found.ids) == 0


def test_workers_change_nothing(ready: ClipModel, table: ImageTable) -> None:
    """Number 2 of clip_benchmark's faults: there are more of them than tars, and than batches."""
    sets = sets_of(table)
    alone, _ = encode(ready, table, sets)
    before = torch.get_rng_state(), random.getstate()
    many, _ = encode(ready, table, sets, num_workers=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    for one, expected in zip(many, alone, strict=True):
        assert np.array_equal(one.features, expected.features)


def test_what_else_is_encoded_changes_nothing(ready: ClipModel, table: ImageTable) -> None:
    sets = sets_of(table)
    together, _ = encode(ready, table, sets)
    (alone,), _ = encode(ready, table, [sets[2]])
    assert np.array_equal(alone.features, together[2].features)


def test_the_size_of_a_batch_changes_little(ready: ClipModel, table: ImageTable) -> None:
    (one,), texts = encode(ready, table, [np.arange(12)])
    (other,), other_texts = encode(ready, table, [np.arange(12)], batch_size=12)
    np.testing.assert_allclose(one.features, other.features, atol=2e-6)
    np.testing.assert_allclose(texts, other_texts, atol=2e-6)


def test_each_batch_is_computed_by_one_rank(
    ready: ClipModel, table: ImageTable, run_on_ranks: RunOnRanks
) -> None:
    def count(ranks: Ranks) -> tuple[list[int], list[int]]:
        mine = replace(ready, model=copy.deepcopy(ready.model))
        images: list[int] = []
        texts: list[int] = []
        model: Any = mine.model
        model.visual.register_forward_hook(lambda m, given, out: images.append(len(given[0])))
        model.ln_final.register_forward_hook(lambda m, given, out: texts.append(len(given[0])))
        encoder = Encoder(mine, OPTIONS, ranks)
        with torch.no_grad():
            assert len(list(encoder.image_sets(table, [np.arange(15)]))) == 1
            encoder.texts(TEXTS)
        return images, texts

    images, texts = zip(*run_on_ranks(3, count), strict=True)
    assert images == ([4, 3], [4], [4])
    assert texts == ([4, 1], [4], [4])


def test_faults_are_known_on_all_ranks(
    tmp_path: Path, make_task: Any, make_image: Any, ready: ClipModel, run_on_ranks: RunOnRanks
) -> None:
    members = [[("png", make_image(i)), ("cls", b"0")] for i in range(10)]
    for row in (1, 2, 7):
        members[row][0] = ("png", b"no picture %d" % row)
    samples = read_samples(read_task(make_task(tmp_path / "größer", members=members, shards=2)))
    table, _ = distinct_images([samples])
    sets = [np.asarray([9, 7, 5]), np.asarray([0, 1, 2, 3, 4, 6])]
    (first, second), _ = encode(ready, table, sets, batch_size=2)
    assert sorted(first.faults) == [1]
    assert sorted(second.faults) == [1, 2]
    assert "1.tar: s0007: a sample whose image cannot be decoded" in first.faults[1]
    assert "größer" in second.faults[2]
    for (one, other), _ in run_on_ranks(
        3, lambda ranks: encode(ready, table, sets, ranks, batch_size=2)
    ):
        assert (one.faults, other.faults) == (first.faults, second.faults)
        assert np.array_equal(other.features, second.features)


def test_bf16(ready: ClipModel, table: ImageTable) -> None:
    seen: set[torch.dtype] = set()
    model: Any = ready.model
    model.visual.register_forward_hook(lambda m, _, out: seen.add(out.dtype))
    (full,), texts = encode(ready, table, [np.arange(8)])
    (low,), low_texts = encode(ready, table, [np.arange(8)], autocast=torch.bfloat16)
    assert seen == {torch.float32, torch.bfloat16}
    assert low.features.dtype == low_texts.dtype == np.float32
    assert 1e-6 < np.abs(low.features - full.features).max() < 0.1
    assert 1e-6 < np.abs(low_texts - texts).max() < 0.1


def test_a_foreign_tokenizer_is_found(ready: ClipModel) -> None:
    other = replace(ready, tokenizer=lambda texts: torch.full((len(texts), 16), 60_000))
    with pytest.raises(InputError, match="gives the token 60000, and the model has 49408"):
        Encoder(other, OPTIONS, OneRank()).texts(["a"])


def test_one_bar_that_goes_away(
    ready: ClipModel,
    table: ImageTable,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode(ready, table, [np.arange(9)], progress=True)
    assert capfd.readouterr() == ("", "")  # a file would get a line for each change
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    encode(ready, table, [np.arange(9)], progress=True)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "images" in printed.err
    assert printed.err.split("\r")[-1].strip() == ""
    encode(ready, table, [np.arange(9)])
    assert capfd.readouterr() == ("", "")
