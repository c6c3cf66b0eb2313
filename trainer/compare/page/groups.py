"""Groups that a report counts samples by: clusters of their images, languages of their captions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.errors import InputError
from siftclip.files import npz_headers
from siftclip.purposes import GeneratorPurpose
from siftclip.selectors.core.source import IMAGE, Requirements
from siftclip.selectors.fitting.kmeans import assign, fit_kmeans
from siftclip.selectors.kernels.blocks import usable_rows
from siftclip.selectors.methods.captions.languages import LanguageIdentifier
from siftclip.trainer.compare.page.captions import read_captions
from siftclip.trainer.compare.page.grouping import (
    CLUSTER,
    DUPLICATE,
    LANGUAGE,
    NEAR,
    SAMPLES_EACH,
    Grouping,
    Groups,
    by_size,
    cluster_names,
    count_clusters,
    grouped_languages,
    near_duplicates,
)
from siftclip.trainer.compare.page.languages import LEAST_LETTERS, SureLanguages

MOST_CAPTIONS = 20_000  # of a pool, whose languages are told and which name clusters
_MOST_COMPARED = 10_000  # samples, each with all others
_FIT_ON = 20_000  # samples whose features k-means learns from
_MOST_LETTERS = 1000  # of a caption that languages and words are told by
_SEED = 0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFeatures:
    """Where features of a pool's images are."""

    source: PoolSource
    key: str  # of the array, such as "l14_img"


def group_samples(
    pool: Pool,
    features: ImageFeatures | None,
    *,
    progress: bool,
    identifier: LanguageIdentifier | None = None,
) -> Groups:
    """Group the samples of a pool by clusters, near duplicates and languages, where known.

    Args:
        pool: of n samples.
        features: of its images; None: there are none, so no clusters and no near duplicates.
        progress: show bars.
        identifier: of languages; None: CLD3, where it is installed.
    """
    rows = sampled_rows(np.arange(len(pool)), MOST_CAPTIONS)
    texts = [
        None if text is None else text[:_MOST_LETTERS]
        for text in read_captions(pool, rows, progress=progress)
    ]
    found = [
        *_by_images(features, len(pool), rows, texts),
        _languages(len(pool), rows, texts, identifier or SureLanguages()),
    ]
    return Groups(
        groupings=tuple(grouping for grouping, _ in found if grouping is not None),
        notes=tuple(note for _, note in found),
    )


def first_features(
    pool: Pool, places: Sequence[tuple[Path | None, str | None]]
) -> ImageFeatures | None:
    """Find the first features of images; None without any.

    Args:
        pool: whose samples have them.
        places: folders with the array that is wanted; None: the pool's own metadata, any array.
    """
    for folder, wanted in dict.fromkeys(places):
        source = PoolSource(
            pool,
            features=[folder],
            scores_root=pool.options.cache_folder,  # nothing is kept
            chunk_samples=1 << 16,
            max_bad_fraction=pool.options.max_bad_fraction,
            progress=False,
        )
        try:
            keys = npz_headers(source.store(()).parts[0].path)
        except InputError as error:
            log.info("no clusters by the features of %s: %s", folder or pool.root, error)
            continue
        usable = [key for key in keys if key.endswith(f"_{IMAGE}") and wanted in (None, key)]
        if usable:
            return ImageFeatures(source=source, key=min(usable))
    return None


def sampled_rows(rows: np.ndarray, most: int) -> np.ndarray:
    """Draw at most so many of rows, int64 [k] and ascending, always the same ones."""
    if len(rows) <= most:
        return rows
    generator = np.random.default_rng([_SEED, GeneratorPurpose.GALLERY, 2])
    return np.sort(generator.choice(rows, size=most, replace=False))


def _by_images(
    features: ImageFeatures | None, samples: int, rows: np.ndarray, texts: Sequence[str | None]
) -> list[tuple[Grouping | None, str]]:
    """Find clusters and near duplicates; why there are none, where there are none."""
    if features is None:
        why = "since there are no features of the pool: siftclip embed makes them."
        return [(None, f"There are no clusters of images, {why}")]
    try:
        return [_clusters(features, rows, texts), _near_duplicates(features, samples)]
    except InputError as error:  # damaged features lose nothing else of a report
        log.warning("there are no clusters of images: %s", error)
        return [(None, f"There are no clusters of images: {error}")]


def _clusters(
    features: ImageFeatures, rows: np.ndarray, texts: Sequence[str | None]
) -> tuple[Grouping | None, str]:
    """Cluster all samples with a feature, and name the clusters by the captions of rows."""
    source, key = features.source, features.key
    count = count_clusters(source.store((key,)).pool_coverage.present)
    if not count:
        least = 2 * SAMPLES_EACH
        return None, f"There are no clusters of images, since fewer than {least} have features."
    centroids = fit_kmeans(source, key, clusters=count, seed=_SEED, sample=_FIT_ON)
    labels = by_size(_nearest(source, key, centroids))
    names = cluster_names(labels[rows], texts, int(labels.max(initial=-1)) + 1)
    return Grouping(title=CLUSTER, labels=labels, names=tuple(names)), (
        f"Clusters of images are those of k-means on {key}, named by the words that are most "
        "typical of their captions."
    )


def _nearest(source: PoolSource, key: str, centroids: torch.Tensor) -> np.ndarray:
    """Find the centroid of every sample of a pool: int64 [n], -1 without a usable feature."""
    labels = np.full(len(source), -1, dtype=np.int64)
    requires = Requirements(features=(key,))
    for part in source.parts(requires):
        for chunk in source.chunks(part.rows, requires):
            labels[chunk.rows] = assign(chunk.features[key], centroids)[0].numpy()
            labels[chunk.rows[~chunk.usable().numpy()]] = -1
    return labels


def _near_duplicates(features: ImageFeatures, samples: int) -> tuple[Grouping | None, str]:
    """Find near duplicates among some samples with a feature."""
    source, key = features.source, features.key
    parts = source.parts(Requirements(features=(key,)))
    all_rows = np.sort(np.concatenate([part.rows for part in parts]))
    rows = sampled_rows(all_rows, _MOST_COMPARED)
    values = source.take_features(rows, (key,))[key]
    usable = usable_rows(values).cpu().numpy()
    rows, values = rows[usable], values[usable]
    near = near_duplicates(values)
    labels = np.full(samples, -1, dtype=np.int64)
    labels[rows] = np.where(near, 0, 1)
    sampled = (
        f"{len(rows):,} samples that were drawn at random"
        if len(rows) < len(all_rows)
        else ("all samples with features")
    )
    about = f"another image at a cosine of at least {NEAR} in {key}, among {sampled}"
    if not near.any():
        return None, f"There are no near duplicates: {about}."
    names = ("with a near duplicate", "without")
    return Grouping(title=DUPLICATE, labels=labels, names=names), f"A near duplicate is {about}."


def _languages(
    samples: int, rows: np.ndarray, texts: Sequence[str | None], identifier: LanguageIdentifier
) -> tuple[Grouping | None, str]:
    """Tell the languages of the captions of rows."""
    there = np.array([text is not None for text in texts], dtype=bool)
    try:
        codes = identifier([text for text in texts if text is not None])
    except InputError:
        return None, "Languages of captions need the extra text: pip install 'siftclip[text]'."
    own, names = grouped_languages(codes)
    labels = np.full(samples, -1, dtype=np.int64)
    labels[rows[there]] = own
    sampled = f" of {len(rows):,} captions that were drawn at random" if len(rows) < samples else ""
    return Grouping(title=LANGUAGE, labels=labels, names=tuple(names)), (
        f"Languages{sampled} are told by CLD3; those of captions of fewer than {LEAST_LETTERS} "
        "letters, and those that it is not sure of, are unknown."
    )
