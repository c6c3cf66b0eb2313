"""Scenes are what their captions say, and depend on nothing but seed and purpose."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.trainer.demo import samples as demo_samples
from siftclip.trainer.demo.digit_scenes import (
    BACKGROUNDS,
    DIGIT_WORDS,
    IMAGE_SIZE,
    INKS,
    SHAPES,
    DigitImages,
    ShapeScene,
    caption_scene,
    caption_scene_in_full,
    derive_generator,
    draw_scene,
    draw_shape,
    draw_unlike_scene,
    render_scene,
    render_shape,
    split_digits,
)
from siftclip.trainer.demo.samples import DefectMix, Sample, make_samples, make_tasks

SEEDS = range(3)


@pytest.fixture(scope="module")
def splits() -> tuple[DigitImages, ...]:
    return split_digits(0, (0.3, 0.45, 0.25))


def make_pool(seed: int, digits: DigitImages, samples: int = 200) -> list[Sample]:
    return list(make_samples(seed, "pool", digits, DefectMix().counts(samples)))


def words_of(caption: str) -> list[str]:
    """The words of a caption; "two digits" is one, for it names a number and no digit."""
    text = caption.replace(",", " ").replace(":", " ")
    return re.sub(r"(two|three) digits", r"\1-digits", text).split()


def test_splits_are_disjoint_complete_and_hold_every_digit(splits: tuple[DigitImages, ...]) -> None:
    rows = np.concatenate([part.rows for part in splits])
    assert sorted(rows.tolist()) == list(range(1797))
    for part, fraction in zip(splits, (0.3, 0.45, 0.25), strict=True):
        assert set(part.labels.tolist()) == set(range(10))
        assert len(part.rows) == pytest.approx(1797 * fraction, abs=10)


def test_splits_depend_on_the_seed() -> None:
    first, again, other = (split_digits(seed, (0.5, 0.5))[0].rows for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_purposes_have_streams_of_their_own() -> None:
    draws = {derive_generator(s, p).integers(1 << 62) for s in SEEDS for p in ("pool", "teacher")}
    assert len(draws) == 2 * len(SEEDS)


def test_no_word_means_two_things() -> None:
    names = [*DIGIT_WORDS, *INKS, *BACKGROUNDS, *SHAPES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_digits_lie_inside_the_image_from_left_to_right(
    splits: tuple[DigitImages, ...], seed: int, count: int
) -> None:
    rng = derive_generator(seed, "test")
    for _ in range(100):
        scene = draw_scene(rng, splits[0], count=count)
        assert len(scene.digits) == count
        edge = 0
        for digit in scene.digits:
            assert DIGIT_WORDS[splits[0].labels[digit.index]] == digit.word
            assert digit.left >= edge
            assert 0 <= digit.top <= IMAGE_SIZE - digit.height
            edge = digit.left + digit.width
        assert edge <= IMAGE_SIZE


@pytest.mark.parametrize("seed", SEEDS)
def test_captions_are_true_and_keep_the_order(splits: tuple[DigitImages, ...], seed: int) -> None:
    rng = derive_generator(seed, "test")
    for _ in range(200):
        scene = draw_scene(rng, splits[0])
        words = words_of(caption_scene(rng, scene))
        assert tuple(w for w in words if w in DIGIT_WORDS) in (scene.words, ())
        assert {w for w in words if w in INKS} <= set(scene.inks)
        full = words_of(caption_scene_in_full(scene))
        assert tuple(w for w in full if w in DIGIT_WORDS) == scene.words
        assert tuple(w for w in full if w in INKS) == scene.inks
        assert scene.background in full


def test_an_article_fits_its_noun(splits: tuple[DigitImages, ...]) -> None:
    rng = derive_generator(0, "test")
    captions = [caption_scene(rng, draw_scene(rng, splits[0])) for _ in range(500)]
    assert any("an orange" in caption for caption in captions)
    assert not any("a orange" in caption for caption in captions)


def test_an_unlike_scene_shares_nothing(splits: tuple[DigitImages, ...]) -> None:
    rng = derive_generator(0, "test")
    for _ in range(100):
        scene = draw_scene(rng, splits[0])
        other = draw_unlike_scene(rng, splits[0], scene)
        assert not {*scene.words, *scene.inks} & {*other.words, *other.inks}
        assert scene.background != other.background


def test_images_have_the_colours_of_their_scene(splits: tuple[DigitImages, ...]) -> None:
    rng = derive_generator(0, "test")
    for _ in range(50):
        scene = draw_scene(rng, splits[0], count=1)
        image = render_scene(rng, scene, splits[0]).astype(float)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        corner = image[:2].mean(axis=(0, 1))  # jitter moves it by 12 a channel and 3 sigma are 36
        assert np.abs(corner - BACKGROUNDS[scene.background]).max() < 60
        distances = np.abs(image - INKS[scene.digits[0].ink]).mean(axis=2)
        assert distances.min() < 45


def test_every_shape_differs_from_its_background() -> None:
    rng = derive_generator(0, "test")
    seen = set()
    for _ in range(100):
        scene = draw_shape(rng)
        image = render_shape(rng, scene)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert image.std(axis=(0, 1)).max() > 8
        seen.add(scene.shape)
    assert seen == set(SHAPES)


@pytest.mark.parametrize(
    ("shape", "inked"),
    [
        ("triangle", "middle corner"),
        ("circle", "middle side inside"),
        ("square", "middle side inside corner"),
        ("cross", "middle side"),
        ("ring", "side"),
        ("stripes", "middle inside outside"),
        ("gradient", "middle side corner"),  # brighter from row to row
    ],
)
def test_a_shape_is_what_its_name_says(shape: str, inked: str) -> None:
    scene = ShapeScene(shape=shape, ink="white", background="black", box=(4, 4, 28, 28))
    image = render_shape(derive_generator(0, "test"), scene).mean(axis=2)
    places = {"middle": (16, 16), "side": (16, 6), "inside": (10, 10), "corner": (26, 6)}
    places["outside"] = (1, 4)  # of the box
    assert [name for name, place in places.items() if image[place] > 110] == inked.split()


@pytest.mark.parametrize("samples", [20, 33, 100, 12_000])
def test_the_mix_is_exact(samples: int) -> None:
    mix = DefectMix()
    counts = mix.counts(samples)
    assert sum(counts.values()) == samples
    for kind, count in counts.items():
        assert abs(count - getattr(mix, kind) * samples) < 1


def test_the_default_mix_of_the_default_pool() -> None:
    assert DefectMix().counts(12_000) == {
        "clean": 4800,
        "mismatched": 3000,
        "generic": 1200,
        "off_target": 1200,
        "text_junk": 1200,
        "duplicate": 600,
    }


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (DefectMix(clean=0.5), "add up to 1"),
        (DefectMix(clean=0.8, mismatched=-0.15), "add up to 1"),
        (DefectMix(clean=0.05, duplicate=0.40), "4 duplicates for each clean sample"),
    ],
)
def test_a_mix_that_cannot_be(mix: DefectMix, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mix.counts(1000)


@pytest.mark.parametrize("seed", SEEDS)
def test_samples_are_what_they_claim(splits: tuple[DigitImages, ...], seed: int) -> None:
    samples = make_pool(seed, splits[1])
    assert Counter(sample.kind for sample in samples) == DefectMix().counts(200)
    for sample in samples:
        words = set(words_of(sample.caption))
        named = words & set(DIGIT_WORDS)
        if sample.kind in ("clean", "duplicate"):
            assert named in (set(sample.words), set())
            assert words & set(INKS) <= set(sample.inks)
        elif sample.kind == "mismatched":
            assert not named & set(sample.words)
            assert not words & set(sample.inks)
        elif sample.kind == "off_target":
            assert not sample.words
            assert words & set(SHAPES)
            assert set(sample.inks) <= words
        else:
            assert not named
            assert not words & set(INKS)


def test_duplicates_look_and_read_like_their_base(splits: tuple[DigitImages, ...]) -> None:
    samples = make_pool(0, splits[1], samples=400)
    copies = [sample for sample in samples if sample.kind == "duplicate"]
    uses = Counter(copy.copy_of for copy in copies)
    assert max(uses.values()) == demo_samples.COPIES_PER_BASE
    for copy in copies:
        base = samples[copy.copy_of]
        assert base.kind == "clean"
        assert (copy.caption, copy.digits, copy.inks) == (base.caption, base.digits, base.inks)
        assert not np.array_equal(copy.image, base.image)
        # other noise and slightly other colours, but the same strokes at the same places
        assert np.abs(copy.image.astype(float) - base.image).mean() < 50
    assert all(sample.copy_of == -1 for sample in samples if sample.kind != "duplicate")


def test_samples_use_only_the_digits_given(splits: tuple[DigitImages, ...]) -> None:
    for part in splits:
        used = {row for sample in make_pool(0, part) for row in sample.digits}
        assert used <= set(part.rows.tolist())


def test_tasks_have_the_sizes_and_unique_captions(splits: tuple[DigitImages, ...]) -> None:
    tasks = {
        task.name: task
        for task in make_tasks(
            0, splits[2], classification_samples=40, count_samples=30, retrieval_samples=120
        )
    }
    assert {name: len(task.images) for name, task in tasks.items()} == {
        "digit": 40,
        "colour": 40,
        "count": 30,
        "retrieval": 120,
    }
    assert len(set(tasks["retrieval"].labels)) == 120
    assert Counter(tasks["count"].labels) == {"0": 10, "1": 10, "2": 10}
    for name in ("digit", "colour", "count"):
        task = tasks[name]
        assert {int(label) for label in task.labels} <= set(range(len(task.classes)))
        assert all("{c}" in template for template in task.templates)


def test_more_unique_captions_than_there_are_is_an_error(splits: tuple[DigitImages, ...]) -> None:
    with pytest.raises(InputError, match=r"retrieval_samples must be at most 500. Got 501"):
        list(
            make_tasks(
                0, splits[2], classification_samples=1, count_samples=1, retrieval_samples=501
            )
        )


def test_captions_fit_the_context_of_the_demo_model(splits: tuple[DigitImages, ...]) -> None:
    open_clip = pytest.importorskip("open_clip")
    rng = derive_generator(0, "test")
    captions = [caption_scene(rng, draw_scene(rng, splits[0])) for _ in range(300)]
    tokens = open_clip.SimpleTokenizer(context_length=32)(captions)
    assert int((tokens != 0).sum(dim=1).max()) <= 16
