"""Runs a selector over a pool: chunks from disk, scores in files, the rule, the selection.

Scores are written part by part (a part is an npz of the features, or a shard of the pool), so that
a killed run continues with the next part, and another fraction of the same scores costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

import siftclip
from siftclip.datamodules.features import FeatureStore, open_features
from siftclip.datamodules.files import read_npz, write_json, write_npz
from siftclip.datamodules.pool import Pool, read_metadata_uids
from siftclip.datamodules.reader import BadSampleError, SampleReader, decode_caption
from siftclip.datamodules.selection import Selection, make_selection, read_subset
from siftclip.selectors.base import (
    Choice,
    Chunk,
    Requirements,
    ScoreSelector,
    Selector,
    check_choice,
)
from siftclip.selectors.errors import InputError

log = logging.getLogger(__name__)

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
# What of a selector's parameters only concerns its rule, and leaves the scores as they are.
RULE_PARAMETERS = ("fraction", "threshold", "rule")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolChunks:
    """The chunks of a pool that a selector asked for."""

    pool: Pool
    requires: Requirements
    store: FeatureStore | None
    column: np.ndarray | None  # float64 [n]
    chunk_samples: int

    def part_names(self) -> list[str]:
        """Names of the parts, unique."""
        if self.store is not None:
            return [part.path.stem for part in self.store.parts]
        return [shard.stem for shard in self.pool.shards]

    def part(self, number: int) -> Iterator[Chunk]:
        """The chunks of one part."""
        if self.store is not None:
            chunks = self.store.chunks(
                self.store.parts[number], self.pool, self.requires.features, self.chunk_samples
            )
        else:
            chunks = self._shard_chunks(number)
        reader = SampleReader(pool=self.pool, max_image_pixels=1)
        try:
            for chunk in chunks:
                yield self._complete(chunk, reader)
        finally:
            reader.close()

    def __call__(self) -> Iterator[Chunk]:
        """All chunks: a selector's `ChunkSource`."""
        for number in range(len(self.part_names())):
            yield from self.part(number)

    def _shard_chunks(self, shard: int) -> Iterator[Chunk]:
        rows = self.pool.shard_rows(shard)
        for start in range(0, len(rows), self.chunk_samples):
            at = rows[start : start + self.chunk_samples]
            yield Chunk(rows=at, uids=self.pool.uids[at])

    def _complete(self, chunk: Chunk, reader: SampleReader) -> Chunk:
        captions = None
        if self.requires.captions:
            captions = [_caption_or_empty(data) for data in reader.read_captions(chunk.rows)]
        return Chunk(
            rows=chunk.rows,
            uids=chunk.uids,
            features=chunk.features,
            captions=captions,
            column=None if self.column is None else self.column[chunk.rows],
        )


def _caption_or_empty(data: bytes | BadSampleError) -> str:
    try:
        return "" if isinstance(data, BadSampleError) else decode_caption(data)
    except BadSampleError:
        return ""  # a selector may judge it; training counts it as bad


def open_chunks(
    pool: Pool,
    requires: Requirements,
    *,
    features_folder: Path | None,
    chunk_samples: int,
    max_bad_fraction: float,
) -> PoolChunks:
    """Find on disk what a selector requires.

    Raises:
        InputError: features or column are missing or damaged.
    """
    store = None
    if requires.features:
        store = open_features(
            pool,
            folder=features_folder,
            keys=requires.features,
            max_bad_fraction=max_bad_fraction,
        )
    return PoolChunks(
        pool=pool,
        requires=requires,
        store=store,
        column=None
        if requires.column is None
        else read_column(
            pool, Path(requires.column.path), requires.column.column, option="selector"
        ),
        chunk_samples=chunk_samples,
    )


def read_column(pool: Pool, path: Path, name: str | None, *, option: str) -> np.ndarray:
    """The external numbers of each row of the pool, float64 [n], NaN where there is none.

    Of a uid that the file has twice, the first number counts.

    Args:
        pool: whose rows are wanted.
        path: a parquet file with `uid` and the column, or a DataComp subset.
        name: the column; None for a subset, whose numbers are how often it has a uid.
        option: the node of the configuration that has `path` and `column`, for messages.

    Raises:
        InputError: the file is missing or damaged, or none of its uids is in the pool.
    """
    if not path.is_file():
        raise InputError(f"{option}.path must be an existing file. Got {str(path)!r}.")
    if name is None:
        uids, counts = read_subset(path)
        values = counts.astype(np.float64)
    else:
        uids, valid, faults = read_metadata_uids(path)
        schema = pq.read_schema(path)
        if name not in schema.names:
            raise InputError(
                f"{option}.column={name!r} is not a column of {path}. It has {schema.names}."
            )
        try:
            values = pq.read_table(path, columns=[name])[name].to_numpy().astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{option}.column={name!r} of {path} must hold numbers: {error}."
            ) from None
        if faults.samples:
            log.warning("%s: left out %s", path, faults.summary())
            uids, values = uids[valid], values[valid]
    rows = pool.table.find(uids)
    present = rows >= 0
    log.info("%s: %d of %d uids are in the pool", path, int(present.sum()), len(uids))
    if not present.any():
        raise InputError(f"None of the {len(uids)} uids in {path} is in the pool {pool.root}.")
    column = np.full(len(pool), np.nan)
    column[rows[present][::-1]] = values[present][::-1]  # numpy keeps the last of equal indices
    return column


def scores_identity(parameters: Mapping[str, Any], chunks: PoolChunks) -> dict[str, Any]:
    """What scores depend on: the scorer's parameters, the pool, the features, the code."""
    scorer = {key: value for key, value in parameters.items() if key not in RULE_PARAMETERS}
    column = chunks.requires.column
    return {
        "scorer": scorer,
        "pool": chunks.pool.fingerprint,
        "features": None if chunks.store is None else chunks.store.fingerprint,
        "column": None if column is None else file_stamp(Path(column.path)),
        "siftclip": siftclip.__version__,
    }


def file_stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for an identity."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def score_pool(
    selector: ScoreSelector, chunks: PoolChunks, *, folder: Path, progress: bool = True
) -> np.ndarray:
    """Score every sample of a pool: float32 [n], NaN where a sample cannot be judged.

    Args:
        selector: that scores.
        chunks: of the pool.
        folder: where each part's scores are kept. Parts that are there are not scored again, so
            the folder's name must stand for everything that they depend on.
        progress: show a bar.
    """
    scores = np.full(len(chunks.pool), np.nan, dtype=np.float32)
    names = chunks.part_names()
    todo = [number for number, name in enumerate(names) if not (folder / f"{name}.npz").exists()]
    if todo:
        selector.fit(chunks)
    for number in tqdm(todo, desc="score", unit="part", disable=not progress, leave=False):
        found = [(chunk.rows, selector.checked_score(chunk)) for chunk in chunks.part(number)]
        write_npz(
            folder / f"{names[number]}.npz",
            rows=np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)]),
            scores=np.concatenate([np.empty(0, np.float32), *(part for _, part in found)]),
        )
    for name in names:
        rows, part_scores = read_npz(folder / f"{name}.npz", ["rows", "scores"])
        scores[rows] = part_scores
    return scores


def summarise(scores: np.ndarray) -> dict[str, float]:
    """Quantiles of the scores that are not NaN, by name (`q50` is the median)."""
    judged = scores[~np.isnan(scores)]
    if len(judged) == 0:
        return {}
    values = np.quantile(judged.astype(np.float64), QUANTILES)
    return {f"q{100 * q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The answer of the score stage."""

    folder: Path
    scores: np.ndarray | None  # float32 [n]; None for a selector without scores
    identity: dict[str, Any]


def run_scores(
    selector: Selector,
    parameters: Mapping[str, Any],
    chunks: PoolChunks,
    *,
    scores_root: Path,
    progress: bool = True,
) -> Scored:
    """The score stage: reuse or make the scores of a selector for a pool."""
    identity = scores_identity(parameters, chunks)
    folder = scores_root / identity_hash(identity)
    scores = None
    if isinstance(selector, ScoreSelector):
        scores = score_pool(selector, chunks, folder=folder, progress=progress)
        summary = {
            "identity": identity,
            "samples": len(scores),
            "unjudged": int(np.isnan(scores).sum()),
            "quantiles": summarise(scores),
        }
        write_json(folder / "scores.json", summary)
        if summary["unjudged"]:
            log.warning(
                "%d of %d samples have no score and cannot be selected",
                summary["unjudged"],
                len(scores),
            )
    return Scored(folder=folder, scores=scores, identity=identity)


def run_selection(
    selector: Selector, name: str, parameters: Mapping[str, Any], chunks: PoolChunks, scored: Scored
) -> Selection:
    """The select stage: apply the rule to the scores, or call a selector that has none."""
    pool = chunks.pool
    if isinstance(selector, ScoreSelector) and scored.scores is not None:
        rows = np.arange(len(pool), dtype=np.int64)
        choice = Choice(
            rows=rows,
            multiplicities=selector.rule(scored.scores, pool.uids),
            scores=scored.scores,
        )
    else:
        choice = check_choice(type(selector).__name__, selector.select(chunks), samples=len(pool))
    kept = choice.multiplicities > 0
    manifest = {
        "selector": name,
        "parameters": dict(parameters),
        "pool": {"root": str(pool.root), "fingerprint": pool.fingerprint, "samples": len(pool)},
        "identity": scored.identity,
        "kept_samples": int(choice.multiplicities.sum()),
        "kept_distinct": int(kept.sum()),
        "kept_fraction": float(kept.sum() / len(pool)),
        "score_quantiles_pool": {} if choice.scores is None else summarise(choice.scores),
        "score_quantiles_kept": {} if choice.scores is None else summarise(choice.scores[kept]),
        "siftclip": siftclip.__version__,
    }
    return make_selection(pool.uids[choice.rows], choice.multiplicities, manifest)
