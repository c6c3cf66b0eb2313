"""What the demo's pools and tasks consist of: scenes with captions, and the pool's known defects.

A pool of scraped pairs holds captions that belong to other images, captions that say nothing,
images of no use for the task, junk and duplicates. Here each kind has a known share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from siftclip.errors import InputError
from siftclip.trainer.demo import digit_scenes as scenes

Kind = Literal["clean", "mismatched", "generic", "off_target", "text_junk", "duplicate"]

COPIES_PER_BASE = 4  # near duplicates of one clean sample
DIGIT_TEMPLATES = ("the digit {c}", "a handwritten {c}", "a picture of the {c}")
COLOUR_TEMPLATES = ("a {c} digit", "a handwritten digit in {c}", "a single {c} digit")
COUNT_CLASSES = ("a single digit", "two digits", "three digits")
COUNT_TEMPLATES = ("{c}", "{c} on a black background", "{c} on a grey background")
MAX_RETRIEVAL_SAMPLES = 500  # one digit, ink and background make 320 captions, for half of these


@dataclass(frozen=True, slots=True, kw_only=True)
class DefectMix:
    """Which fraction of the pool is of which kind; they add up to 1."""

    clean: float = 0.40  # a digit scene with its own caption
    mismatched: float = 0.25  # a digit scene with the caption of one that shares nothing with it
    generic: float = 0.10  # a digit scene with a caption that fits any image
    off_target: float = 0.10  # a geometric pattern with its own caption
    text_junk: float = 0.10  # a digit scene with a file name, a URL, HTML or letters
    duplicate: float = 0.05  # a clean sample again, with its caption, in other noise

    def counts(self, samples: int) -> dict[Kind, int]:
        """Split `samples` into counts of each kind: the largest remainders are rounded up.

        Raises:
            InputError: a fraction is negative or they do not add up to 1, or there are duplicates
                of nothing.
        """
        fractions = np.asarray([getattr(self, field.name) for field in fields(self)])
        if fractions.min() < 0 or abs(fractions.sum() - 1) > 1e-9:
            raise InputError(f"DefectMix must hold fractions that add up to 1. Got {self}.")
        exact = np.round(fractions * samples, 6)  # 0.1 * 30 is a little more than 3
        counts = np.floor(exact).astype(int)
        for i in np.argsort(counts - exact, kind="stable")[: samples - counts.sum()]:
            counts[i] += 1
        names: list[Any] = [field.name for field in fields(self)]
        by_kind: dict[Kind, int] = dict(zip(names, counts.tolist(), strict=True))
        if by_kind["duplicate"] > COPIES_PER_BASE * by_kind["clean"]:
            raise InputError(
                f"DefectMix may hold {COPIES_PER_BASE} duplicates for each clean sample. "
                f"Got {by_kind['duplicate']} for {by_kind['clean']}."
            )
        return by_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image, uint8 [32, 32, 3], with its caption and what is known about it."""

    image: np.ndarray
    caption: str
    kind: Kind
    digits: tuple[int, ...]  # rows of scikit-learn's data set
    words: tuple[str, ...]  # the digits in the image
    inks: tuple[str, ...]
    copy_of: int  # the sample's number in its pool, -1 for what is not a duplicate


def make_samples(
    seed: int, purpose: str, digits: scenes.DigitImages, counts: dict[Kind, int]
) -> Iterator[Sample]:
    """Draw the samples of a pool in a random order of kinds, `counts` of each."""
    rng = scenes.derive_generator(seed, purpose)
    kinds = rng.permutation(np.repeat(list(counts), list(counts.values())))
    clean = np.flatnonzero(kinds == "clean")
    copies = np.flatnonzero(kinds == "duplicate")
    bases = rng.permutation(clean)[: -(-len(copies) // COPIES_PER_BASE)]
    base_of = dict(zip(copies.tolist(), np.resize(bases, len(copies)).tolist(), strict=True))
    # All scenes first: a duplicate may come before the sample that it repeats.
    drawn = [scenes.draw_scene(rng, digits) for _ in kinds]
    captions = [scenes.caption_scene(rng, scene) for scene in drawn]
    for number, kind in enumerate(kinds.tolist()):
        if kind == "off_target":
            shape = scenes.draw_shape(rng)
            image, caption = scenes.render_shape(rng, shape), scenes.caption_shape(rng, shape)
            yield Sample(
                image=image,
                caption=caption,
                kind=kind,
                digits=(),
                words=(),
                inks=(shape.ink,),
                copy_of=-1,
            )
            continue
        shown = base_of.get(number, number)
        scene, caption = drawn[shown], captions[shown]
        if kind == "mismatched":
            caption = scenes.caption_scene(rng, scenes.draw_unlike_scene(rng, digits, scene))
        elif kind == "generic":
            caption = scenes.generic_caption(rng)
        elif kind == "text_junk":
            caption = scenes.junk_caption(rng)
        yield Sample(
            image=scenes.render_scene(rng, scene, digits),
            caption=caption,
            kind=kind,
            digits=tuple(int(digits.rows[digit.index]) for digit in scene.digits),
            words=scene.words,
            inks=scene.inks,
            copy_of=base_of.get(number, -1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A zero-shot task. Without classes it is retrieval."""

    name: str
    images: tuple[np.ndarray, ...]  # uint8 [32, 32, 3] each
    labels: tuple[str, ...]  # the index of the class, or the caption
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


def make_tasks(
    seed: int,
    digits: scenes.DigitImages,
    *,
    classification_samples: int,
    count_samples: int,
    retrieval_samples: int,
) -> Iterator[Task]:
    """Draw the tasks digit, colour (of the one digit), count and retrieval.

    The captions of retrieval name all that there is to see, and no two are equal.

    Raises:
        InputError: there are not as many different captions.
    """
    if retrieval_samples > MAX_RETRIEVAL_SAMPLES:
        raise InputError(
            f"retrieval_samples must be at most {MAX_RETRIEVAL_SAMPLES}. Got {retrieval_samples}."
        )
    inks = tuple(scenes.INKS)
    images, drawn = _draw(seed, "digit", digits, classification_samples, (1,))
    labels = tuple(str(scenes.DIGIT_WORDS.index(scene.words[0])) for scene in drawn)
    yield Task(
        name="digit",
        images=images,
        labels=labels,
        classes=scenes.DIGIT_WORDS,
        templates=DIGIT_TEMPLATES,
    )
    images, drawn = _draw(seed, "colour", digits, classification_samples, (1,))
    labels = tuple(str(inks.index(scene.inks[0])) for scene in drawn)
    yield Task(
        name="colour", images=images, labels=labels, classes=inks, templates=COLOUR_TEMPLATES
    )
    images, drawn = _draw(seed, "count", digits, count_samples, (1, 2, 3))
    labels = tuple(str(len(scene.digits) - 1) for scene in drawn)
    yield Task(
        name="count",
        images=images,
        labels=labels,
        classes=COUNT_CLASSES,
        templates=COUNT_TEMPLATES,
    )
    images, drawn = _draw(seed, "retrieval", digits, retrieval_samples, (1, 2), unique=True)
    labels = tuple(scenes.caption_scene_in_full(scene) for scene in drawn)
    yield Task(name="retrieval", images=images, labels=labels)


def _draw(
    seed: int,
    name: str,
    digits: scenes.DigitImages,
    samples: int,
    digits_per_scene: tuple[int, ...],
    *,
    unique: bool = False,
) -> tuple[tuple[np.ndarray, ...], list[scenes.Scene]]:
    """Draw images and scenes of a task; the numbers of digits take turns."""
    rng = scenes.derive_generator(seed, f"task {name}")
    drawn: list[scenes.Scene] = []
    seen: set[str] = set()
    while len(drawn) < samples:
        count = digits_per_scene[len(drawn) % len(digits_per_scene)]
        scene = scenes.draw_scene(rng, digits, count=count)
        caption = scenes.caption_scene_in_full(scene)
        if not (unique and caption in seen):
            drawn.append(scene)
            seen.add(caption)
    return tuple(scenes.render_scene(rng, scene, digits) for scene in drawn), drawn
