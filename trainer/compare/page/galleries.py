"""Galleries: samples that say most about what the arms keep and drop, few and always the same."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from siftclip.datamodules.index.uids import format_uids
from siftclip.datamodules.pool.reader import (
    BadSampleError,
    SampleReader,
    decode_caption,
    decode_image,
)
from siftclip.purposes import GeneratorPurpose
from siftclip.trainer.compare.page.pool_view import Arms, PoolView

SIDE = 96  # pixels of a thumbnail
PAGE = 12  # samples of a gallery that are seen at a time, also in page.js
MOST_SAMPLES = 48  # of a gallery
MOST_PAIRS = 12  # of arms without the baseline
MOST_SHOWN = 1200  # of a page, some 4 KB each
MOST_LETTERS = 400  # of a caption
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Rows of a pool with what is said of each, those that matter most first."""

    title: str
    note: str
    rows: tuple[int, ...]
    notes: tuple[str, ...]  # of each
    least: int = PAGE  # samples without which it is not shown

    def cut(self, count: int) -> Gallery:
        """Return a gallery of the first `count` samples."""
        return replace(self, rows=self.rows[:count], notes=self.notes[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A sample as the page shows it."""

    caption: str
    image: Markup | None  # a data URL; None: it was not read, or could not be
    fault: str  # why not; "" where nothing is wrong
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownGallery:
    """A gallery with its samples."""

    title: str
    note: str
    samples: tuple[Shown, ...]


def choose_galleries(arms: Arms, view: PoolView) -> list[Gallery]:
    """Choose galleries: disagreements of arms, scores, repetitions, and choices in the loop."""
    with_baseline, others = _pairs(arms, view)
    return limited(
        [
            *(each for pair in with_baseline for each in _disagreements(view, *pair)),
            *_of_scores(arms, view),
            *_repeated(view),
            *_in_loop(view),
            *(each for pair in others[:MOST_PAIRS] for each in _disagreements(view, *pair)),
        ],
        MOST_SHOWN,
    )


def limited(galleries: Sequence[Gallery], most: int) -> list[Gallery]:
    """Cut galleries to `most` samples in all: first pages before others, early ones before late."""
    kept: list[Gallery] = []
    counts: list[int] = []
    for gallery in galleries:
        least = min(len(gallery.rows), gallery.least)
        if least and least <= most - sum(counts):
            kept.append(gallery)
            counts.append(least)
    for at, gallery in enumerate(kept):
        counts[at] += min(len(gallery.rows) - counts[at], most - sum(counts))
    return [gallery.cut(count) for gallery, count in zip(kept, counts, strict=True)]


def gallery_frame(view: PoolView, galleries: Sequence[Gallery]) -> pd.DataFrame:
    """Return the uids of all galleries, one row per sample that is shown."""
    rows = [
        {"gallery": gallery.title, "row": row, "note": note}
        for gallery in galleries
        for row, note in zip(gallery.rows, gallery.notes, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["gallery", "row", "note"])
    uids = format_uids(view.pool.uids[frame["row"].to_numpy(dtype=np.int64)])
    return frame.assign(uid=uids)


def read_galleries(view: PoolView, galleries: Sequence[Gallery]) -> list[ShownGallery]:
    """Read captions and thumbnails; what cannot be read says why, and loses nothing else."""
    rows = np.unique([row for gallery in galleries for row in gallery.rows]).astype(np.int64)
    reader = SampleReader(pool=view.pool, max_image_pixels=view.max_image_pixels)
    try:
        read = dict(_read(reader, rows, images=view.images))
    finally:
        reader.close()
    return [
        ShownGallery(
            title=gallery.title,
            note=gallery.note,
            samples=tuple(
                Shown(caption=read[row][0], image=read[row][1], fault=read[row][2], note=note)
                for row, note in zip(gallery.rows, gallery.notes, strict=True)
            ),
        )
        for gallery in galleries
    ]


def _read(
    reader: SampleReader, rows: np.ndarray, *, images: bool
) -> Iterator[tuple[int, tuple[str, Markup | None, str]]]:
    """Yield each row with its caption, its thumbnail and what is wrong with it."""
    if not images:
        for row, raw in zip(rows.tolist(), reader.read_captions(rows), strict=True):
            yield row, (*_caption(raw, reader.max_caption_bytes)[:1], None, "")
        return
    for at, sample in reader.read(rows):
        row = int(rows[at])
        if isinstance(sample, BadSampleError):
            yield row, ("", None, str(sample))
            continue
        caption, fault = _caption(sample.caption, reader.max_caption_bytes)
        try:
            image = thumbnail(decode_image(sample.image, reader.max_image_pixels))
        except BadSampleError as error:
            yield row, (caption, None, str(error))
        else:
            yield row, (caption, image, fault)


def _caption(raw: bytes | BadSampleError, most_bytes: int) -> tuple[str, str]:
    try:
        if isinstance(raw, BadSampleError):
            raise raw
        caption = decode_caption(raw, most_bytes)
    except BadSampleError as error:
        return f"(a sample {error})", ""
    cut = f"{caption[:MOST_LETTERS]} ..." if len(caption) > MOST_LETTERS else caption
    return cut.replace("\n", " "), ""


def thumbnail(image: Image.Image) -> Markup:
    """Return a small copy of an image as a data URL of WebP."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=70)
    return Markup(f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}")


def _pairs(arms: Arms, view: PoolView) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the pairs with the baseline, and the others; those that disagree most come first."""
    kept = {arm: view.kept[arm] > 0 for arm in arms.arms if arm in view.kept}

    def agreement(pair: tuple[str, str]) -> float:
        first, second = (kept[arm] for arm in pair)
        return float((first & second).sum() / max(1, (first | second).sum()))

    names = sorted(kept, key=lambda arm: arm != arms.baseline)  # the baseline is first of its pairs
    pairs = sorted(combinations(names, 2), key=agreement)
    with_baseline = [(arm, baseline) for baseline, arm in pairs if baseline == arms.baseline]
    return with_baseline, [pair for pair in pairs if arms.baseline not in pair]


def _disagreements(view: PoolView, one: str, other: str) -> Iterator[Gallery]:
    """Yield what an arm keeps and another one drops, and the other way round.

    Those of which the ranks of the two scores differ most, or any, where there are not two.
    """
    for arm, against in ((one, other), (other, one)):
        rows = np.flatnonzero((view.kept[arm] > 0) & (view.kept[against] == 0))
        if len(rows) == 0:
            continue
        how, gap = "a random sample", None
        if {arm, against} <= view.scores.keys():
            how = "those whose ranks by the two scores differ most"
            gap = _ranks(view.scores[arm])[rows] - _ranks(view.scores[against])[rows]
        most = MOST_SAMPLES
        chosen = _drawn(rows, most) if gap is None else rows[list(_top(gap, most))]
        yield Gallery(
            title=f"kept by {arm}, dropped by {against}",
            note=f"{len(rows):,} samples; {how}.",
            rows=tuple(chosen.tolist()),
            notes=tuple(note_of(view, int(row), arm) for row in chosen),
        )


def _repeated(view: PoolView) -> Iterator[Gallery]:
    """Yield what arms keep more than once, most often first."""
    for arm, times in view.kept.items():
        if times.max() > 1:
            rows = _top(times.astype(np.float64), min(MOST_SAMPLES, int((times > 1).sum())))
            yield Gallery(
                title=f"{arm}: most repeated",
                note="Samples that are kept most often.",
                rows=rows,
                notes=tuple(f"{times[row]} times" for row in rows),
            )


def _in_loop(view: PoolView) -> Iterator[Gallery]:
    """Yield what arms have chosen most often while they trained, and what they never chose."""
    for arm, chosen in view.in_loop.items():
        times = chosen.times
        rows = _top(times.astype(np.float64), min(MOST_SAMPLES, int((times > 0).sum())))
        yield Gallery(
            title=f"{arm}: chosen most often in the loop",
            note=f"{int((times > 0).sum()):,} samples were chosen at all, {chosen.of}.",
            rows=rows,
            notes=tuple(f"{times[row]} times" for row in rows),
        )
        never = np.flatnonzero((times == 0) & (view.kept[arm] > 0))
        rows = tuple(_drawn(never, MOST_SAMPLES).tolist())
        yield Gallery(
            title=f"{arm}: never chosen in the loop",
            note=f"{len(never):,} samples that it could have chosen; a random sample.",
            rows=rows,
            notes=tuple(note_of(view, row, arm) for row in rows),
        )


def _of_scores(arms: Arms, view: PoolView) -> Iterator[Gallery]:
    """Yield two samples of each tenth of the scores, and the best and the worst."""
    for arm in arms.arms:
        scores = view.scores.get(arm)
        known = np.flatnonzero(np.isfinite(scores)) if scores is not None else np.empty(0, np.int64)
        if scores is None or len(known) < 20:
            continue
        order = known[np.argsort(-scores[known], kind="stable")]
        tenths = np.array_split(order, 10)
        rows = np.concatenate([_drawn(tenth, 2) for tenth in tenths])
        names = [f"tenth {number}" for number in range(1, 11) for _ in range(2)]
        yield Gallery(
            title=f"{arm}: from the best to the worst tenth",
            note="Two samples of each tenth of the pool by score, drawn at random.",
            least=len(rows),
            rows=tuple(rows.tolist()),
            notes=tuple(
                f"{name}, {note_of(view, int(row), arm)}"
                for name, row in zip(names, rows, strict=True)
            ),
        )
        few = min(MOST_SAMPLES, len(order) // 2)
        for title, ends in (("best", order[:few]), ("worst", order[::-1][:few])):
            yield Gallery(
                title=f"{arm}: {title} by score",
                note="",
                rows=tuple(ends.tolist()),
                notes=tuple(note_of(view, int(row), arm) for row in ends),
            )


def note_of(view: PoolView, row: int, arm: str) -> str:
    """Say the score of a sample, whether it is kept, and its kind."""
    parts = []
    if arm in view.scores:
        parts.append(f"{view.scores[arm][row]:.3g}")
    parts.append("kept" if view.kept[arm][row] else "dropped")
    if view.kinds is not None and view.kinds[row]:
        parts.append(str(view.kinds[row]))
    return ", ".join(parts)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Return ranks in [0, 1], the lowest score first; float64 [n], NaN counts as the lowest."""
    values = np.where(np.isnan(scores), -np.inf, scores)
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.linspace(0, 1, len(values))
    return ranks


def _top(values: np.ndarray, count: int) -> tuple[int, ...]:
    return tuple(np.argsort(-values, kind="stable")[:count].tolist())


def _drawn(rows: np.ndarray, count: int) -> np.ndarray:
    """Draw some of the rows, always the same."""
    generator = np.random.default_rng([_SEED, GeneratorPurpose.GALLERY, len(rows)])
    return np.sort(generator.choice(rows, size=min(count, len(rows)), replace=False))
