"""What ClipCov computes from features: the initial score's terms, and similarities in a class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from siftclip.hashing import uid_order
from siftclip.ranks import SCALE
from siftclip.selectors.core.source import Requirements, Source
from siftclip.selectors.fitting.latent_classes import LatentClasses
from siftclip.selectors.kernels.low_similarities import low_similarities

HELD_SAMPLES = 1 << 15  # features held at once: of one class, or of several small ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The samples that have a class, by class and then by uid."""

    index: np.ndarray  # int64 [m], places in the source
    rows: np.ndarray  # int64 [m]
    uid_ranks: np.ndarray  # int64 [m], the place of each uid among all, ascending
    classes: np.ndarray  # int64 [m], which of the classes that are not empty
    labels: np.ndarray  # int64 [c], the number that each of these bears in the class names
    starts: np.ndarray  # int64 [c + 1], class k is starts[k] : starts[k + 1]

    @classmethod
    def of(cls, source: Source, classes: LatentClasses) -> Members:
        """Sort the samples of a source."""
        by_uid = uid_order(source.uids)
        uid_ranks = np.empty(len(by_uid), dtype=np.int64)
        uid_ranks[by_uid] = np.arange(len(by_uid))
        index = by_uid[np.argsort(classes.of[by_uid], kind="stable")]
        index = index[int((classes.of < 0).sum()) :]
        labels = np.flatnonzero(classes.sizes)
        return cls(
            index=index,
            rows=source.rows[index],
            uid_ranks=uid_ranks[index],
            classes=np.repeat(np.arange(len(labels)), classes.sizes[labels]),
            labels=labels,
            starts=np.concatenate([[0], np.cumsum(classes.sizes[labels])]).astype(np.int64),
        )

    def pieces(self) -> list[tuple[int, int]]:
        """Split into ranges of at most HELD_SAMPLES members: whole classes, or strips of one."""
        pieces, first = [], 0
        for start, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            if end - first > HELD_SAMPLES and start > first:
                pieces.append((first, start))
                first = start
            while end - first > HELD_SAMPLES:  # then first belongs to this class
                pieces.append((first, first + HELD_SAMPLES))
                first += HELD_SAMPLES
            if end - start > HELD_SAMPLES and end > first:
                pieces.append((first, end))
                first = end
        return [*pieces, (first, len(self.rows))] if first < len(self.rows) else pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Centres:
    """What a sample of one class is compared with, each float32 [d]."""

    image: Tensor  # mean image of the class
    text: Tensor
    other_image: Tensor  # mean over the other classes of their mean images
    other_text: Tensor
    label: Tensor | None  # text features of the class name


def linear_terms(image_features: Tensor, text_features: Tensor, centres: Centres) -> Tensor:
    """Compute the terms of samples of one class that are linear in each of their features.

    Args:
        image_features: float [n, d].
        text_features: float [n, d], of the same samples.
        centres: of their class.

    Returns:
        float64 [4, n]: cross covariance *without* its threshold, the mean over the class of the
        similarities of the image to the texts and of the text to the images; own image-text
        similarity; similarity of text and class name (zero without a name); similarity to the other
        classes' mean texts (of the image) and mean images (of the text). arXiv 2403.12267; the
        normalisation of the last, which the authors did not release, is the mean over the classes.
    """
    image, text = image_features.float(), text_features.float()
    label = torch.zeros_like(centres.text) if centres.label is None else centres.label
    by_image = image @ torch.stack([centres.text, centres.other_text], 1)
    by_text = text @ torch.stack([centres.image, centres.other_image, label], 1)
    cosine = (image * text).sum(1)
    terms = [by_image[:, 0] + by_text[:, 0], cosine, by_text[:, 2], by_image[:, 1] + by_text[:, 1]]
    return torch.stack(terms).double()


def piece_terms(
    source: Source,
    requires: Requirements,
    members: Members,
    centres: list[Centres],
    piece: tuple[int, int],
    threshold: float | None,
) -> dict[str, np.ndarray]:
    """Compute the terms of some members, and find low similarities between images and classes.

    Returns:
        `linear` float64 [4, n] of the piece; `low_sums` int64 (in 1 / SCALE), `image_low` and
        `text_low` int32 of all members of the classes in it, from the first of these on.
    """
    begin, end = piece
    first, last = int(members.classes[begin]), int(members.classes[end - 1])
    base, stop = int(members.starts[first]), int(members.starts[last + 1])
    linear = np.zeros((4, end - begin))
    low_sums = np.zeros(stop - base, dtype=np.int64)
    image_low, text_low = np.zeros((2, stop - base), dtype=np.int32)
    held = source.take(members.rows[begin:end], requires)
    images, texts = (held.features[key] for key in requires.features)
    for number in range(first, last + 1):
        start, until = int(members.starts[number]), int(members.starts[number + 1])
        low, high = max(start, begin), min(until, end)
        strip = slice(low - begin, high - begin)
        image, text = images[strip].float(), texts[strip].float()
        linear[:, strip] = linear_terms(image, text, centres[number]).cpu()
        if threshold is None:
            continue
        at = slice(low - base, high - base)
        whole = low == start and high == until
        place = start
        for other in [text] if whole else _texts(source, requires, members.rows[start:until]):
            similar = low_similarities(image, other, threshold)
            to = slice(place - base, place - base + len(other))
            low_sums[at] += (similar.image_sums * SCALE).round().long().cpu().numpy()
            low_sums[to] += (similar.text_sums * SCALE).round().long().cpu().numpy()
            image_low[at] |= similar.image_low.int().cpu().numpy()
            text_low[to] |= similar.text_low.int().cpu().numpy()
            place += len(other)
    return {"linear": linear, "low_sums": low_sums, "image_low": image_low, "text_low": text_low}


def _texts(source: Source, requires: Requirements, rows: np.ndarray) -> Iterator[Tensor]:
    for chunk in source.chunks(rows, requires):
        yield chunk.features[requires.features[1]]


class ClassSimilarities:
    """The similarities p(i, j) = M_ij + M_ji within one class, on demand.

    M is the matrix of image-text similarities with entries of at most the threshold set to zero.
    Features are read at the first use; those of a class of at most HELD_SAMPLES are then held, a
    larger one is read again at each use. All entries that are not low sum to a linear form, so that
    the redundancy with any number of picks costs one product with a vector.
    """

    def __init__(
        self,
        source: Source,
        requires: Requirements,
        rows: np.ndarray,
        *,
        threshold: float | None,
        image_low: np.ndarray,
        text_low: np.ndarray,
    ) -> None:
        """Set the class, rows int64 [n], and which of its images and texts have low similarities:
        bool [n]."""
        self._source, self._requires, self._rows = source, requires, rows
        self._threshold = threshold
        self._low = torch.from_numpy(np.stack([image_low, text_low])).to(source.device)
        self._held: tuple[Tensor, Tensor] | None = None

    def redundancy(self, picks: np.ndarray) -> np.ndarray:
        """Sum p(i, j) over the picks j, int64 [m]: float64 [n]."""
        image_picks, text_picks = self._features(picks)
        chosen = torch.from_numpy(picks).to(self._source.device)
        image_low, text_low = self._low[:, chosen]
        image_sum, text_sum = image_picks.sum(0), text_picks.sum(0)
        parts, start = [], 0
        for image, text in self._pieces():
            total = (image @ text_sum + text @ image_sum).double()
            low = self._low[:, start : start + len(image)]
            self._drop_low(total, image, low[0], text_picks[text_low])
            self._drop_low(total, text, low[1], image_picks[image_low])
            parts.append(total.cpu().numpy())
            start += len(image)
        return np.concatenate(parts)

    def _drop_low(self, total: Tensor, left: Tensor, low: Tensor, right: Tensor) -> None:
        """Take the low similarities of left [n, d] and right [m, d] out of their sums [n]."""
        at = low.nonzero()[:, 0]
        if self._threshold is None or len(at) == 0 or len(right) == 0:
            return
        products = left[at] @ right.T
        products.masked_fill_(products > self._threshold, 0.0)
        total[at] -= products.sum(1).double()

    def among(self, members: np.ndarray) -> np.ndarray:
        """Return p(i, j) of some members, int64 [m]: float64 [m, m]."""
        image, text = self._features(members)
        products = image @ text.T
        if self._threshold is not None:
            products.masked_fill_(products <= self._threshold, 0.0)
        return (products + products.T).double().cpu().numpy()

    def _features(self, members: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read the image and text features of some members, float32 [m, d] each."""
        if len(self._rows) <= HELD_SAMPLES:
            at = torch.from_numpy(members).to(self._source.device)
            ((image, text),) = self._pieces()
            return image[at], text[at]
        return self._take(self._rows[members])

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield image and text features of the class in pieces, float32 [k, d] each."""
        if len(self._rows) <= HELD_SAMPLES:
            if self._held is None:
                self._held = self._take(self._rows)
            yield self._held
            return
        for chunk in self._source.chunks(self._rows, self._requires):
            image, text = (chunk.features[key].float() for key in self._requires.features)
            yield image, text

    def _take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        features = self._source.take(rows, self._requires).features
        image, text = (features[key].float() for key in self._requires.features)
        return image, text
