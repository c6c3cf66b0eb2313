"""A pool as selectors see it: features, captions and columns from files, answers kept in files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siftclip.damaged import set_aside_if_damaged
from siftclip.datamodules.features.files import feature_file_stamp, read_feature_file
from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.features.store import FeatureStore, join_features
from siftclip.datamodules.identity.identities import (
    kept_identity,
    say_reused,
    say_why_not,
    selector_identity,
)
from siftclip.datamodules.pool.image_sizes import COLUMNS, read_image_sizes
from siftclip.datamodules.pool.pool import Pool, metadata_tables
from siftclip.datamodules.pool.reader import (
    BadSampleError,
    ChangedTarError,
    SampleReader,
    decode_caption,
)
from siftclip.datamodules.selection.columns import column_stamp, read_pool_column, read_pool_lists
from siftclip.datamodules.selection.selection import UNSCORED_KEY
from siftclip.errors import InputError
from siftclip.file_identity import START_AGAIN, has_changed
from siftclip.files import (
    identity_hash,
    npz_headers,
    read_json_object,
    read_npz_all,
    write_json,
    write_npz,
)
from siftclip.progress import show_progress
from siftclip.ranks import OneRank, Ranks
from siftclip.selectors.core.base import Choice, ScoreSelector, Selector
from siftclip.selectors.core.description import describe, nested
from siftclip.selectors.core.source import (
    Bar,
    Cache,
    Chunk,
    ExternalColumn,
    FeatureFile,
    ListColumn,
    Part,
    Requirements,
    Source,
)
from siftclip.writing import delete_file

IDENTITY_NAME = "identity.json"
_SIZES = ExternalColumn(path=None, column=COLUMNS[0])  # stands for both, which one file has
QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def summarise(scores: np.ndarray) -> dict[str, float]:
    """Compute quantiles of the scores that are finite, by name (`q50` is the median)."""
    finite = scores[np.isfinite(scores)]
    if len(finite) == 0:
        return {}
    values = np.quantile(finite.astype(np.float64), QUANTILES)
    return {f"q{100 * q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}


class _KeptArrays(dict[str, np.ndarray]):
    """The arrays of a file in which an array may be missing."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self._path = path

    def __missing__(self, key: str) -> np.ndarray:
        raise InputError(
            f"{self._path} must hold the array {key!r}. It holds {sorted(self)}. Delete it, or "
            "compute again without reuse."
        )


@dataclass(slots=True)
class FolderCache:
    """Keeps each answer in an npz of its own, written atomically, and knows what it has given."""

    folder: Path
    written: set[str] = field(default_factory=set)  # names, by this process
    reused: dict[str, Path] = field(default_factory=dict)  # the files, by name

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        if name not in self.written:
            self.reused[name] = path
        try:
            return _KeptArrays(path, read_npz_all(path))
        except InputError as error:  # all ranks must see the same, so it is not passed over here
            raise InputError(f"{error} Delete it, or compute again without reuse.") from None

    def put(self, name: str, **arrays: np.ndarray) -> None:
        write_npz(self.folder / f"{name}.npz", **arrays)
        self.written.add(name)


class PoolSource(Source):
    """The samples of a pool."""

    def __init__(
        self,
        pool: Pool,
        *,
        features: Sequence[Path | None],
        scores_root: Path,
        chunk_samples: int,
        max_bad_fraction: float,
        ranks: Ranks | None = None,
        device: torch.device | None = None,
        progress: bool = True,
        reuse: bool = True,
    ) -> None:
        """Open nothing yet.

        Args:
            pool: whose samples are selected.
            features: folders of feature sets; None is the pool's own metadata. A selector reads the
                first that has all arrays it requires.
            scores_root: folder below which answers are kept.
            chunk_samples: how many samples' features may be in memory at a time.
            max_bad_fraction: how many rows of a feature set may have a bad uid.
            ranks: that share the work; alone by default.
            device: of the features; the CPU by default.
            progress: show bars.
            reuse: use answers that an earlier process has kept.
        """
        self.pool = pool
        self.rows = np.arange(len(pool), dtype=np.int64)
        self.uids = pool.uids
        self.ranks = ranks or OneRank()
        self.device = device or torch.device("cpu")
        self.chunk_samples = chunk_samples
        self.scores_root = scores_root
        self.folders = tuple(dict.fromkeys(features))
        self.max_bad_fraction = max_bad_fraction
        self.progress = progress
        self.reuse = reuse
        self._caches: dict[str, FolderCache] = {}
        self._stores: dict[Path | None, FeatureStore] = {}
        self._checked: dict[tuple[str, ...], FeatureStore] = {}
        self._features: dict[Path, RowFeatures] = {}
        self._stamps_of: dict[ExternalColumn | FeatureFile, Any] = {}  # when first looked at
        self._columns: dict[ExternalColumn, np.ndarray] = {}
        self._lists: dict[ExternalColumn, ListColumn] = {}
        self._sizes: np.ndarray | None = None
        self.reports: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def has_features(self, keys: tuple[str, ...]) -> bool:
        """Return whether one of the feature sets has all of these arrays."""
        try:
            return self._find_store(keys) is not None
        except InputError:  # there are no features at all
            return False

    def store(self, keys: tuple[str, ...]) -> FeatureStore:
        """Open the feature set that a selector with these keys reads.

        Raises:
            InputError: there are no features, or none with all of the keys.
        """
        if keys not in self._checked:  # once, for it opens every file
            store = self._find_store(keys) or self._stores[self.folders[-1]]
            self._checked[keys] = store.require(keys)
        return self._checked[keys]

    def _find_store(self, keys: tuple[str, ...]) -> FeatureStore | None:
        for folder in self.folders:
            if folder not in self._stores:
                self._stores[folder] = join_features(
                    self.pool, folder=folder, max_bad_fraction=self.max_bad_fraction
                )
            if self._stores[folder].holds(keys):
                return self._stores[folder]
        return None

    def parts(self, requires: Requirements) -> list[Part]:
        if requires.features:
            store = self.store(requires.features)
            return [Part(name=part.path.stem, rows=part.rows) for part in store.parts]
        return [
            Part(name=shard.stem, rows=self.pool.shard_rows(number))
            for number, shard in enumerate(self.pool.shards)
        ]

    def take(self, rows: np.ndarray, requires: Requirements) -> Chunk:
        column = None
        if requires.column is not None:
            column = self._column(requires.column)[rows].astype(np.float64, copy=False)
        lists = None
        if requires.lists is not None:
            lists = self._all_lists(requires.lists).take(rows)
        sizes = None
        if requires.sizes:
            sizes = self._all_sizes()[rows]
        return Chunk(
            rows=rows,
            uids=self.uids[rows],
            features=self._gather(rows, requires.features) if requires.features else {},
            captions=self._captions(rows) if requires.captions else None,
            sizes=sizes,
            column=column,
            lists=lists,
        )

    def chunks(self, rows: np.ndarray, requires: Requirements) -> Iterator[Chunk]:
        """Yield chunks as the base class; the next one is read while the caller works on one."""
        starts = range(0, len(rows), self.chunk_samples)
        with ThreadPoolExecutor(1) as executor:
            ahead = None
            for start in starts:
                current = ahead or executor.submit(
                    self.take, rows[start : start + self.chunk_samples], requires
                )
                following = start + self.chunk_samples
                ahead = None
                if following < len(rows):
                    ahead = executor.submit(
                        self.take, rows[following : following + self.chunk_samples], requires
                    )
                yield current.result()

    def file(self, file: FeatureFile) -> Iterator[Tensor]:
        self._stamp(file)
        for values in read_feature_file(file, self.chunk_samples):
            self._require_same(file)
            yield values.to(self.device)

    def cache(self, selector: object) -> Cache:
        identity = self.identity(selector)
        name = identity_hash(identity)
        if name not in self._caches:
            folder = self.scores_root / name
            if self.ranks.rank == 0:
                self._open_folder(folder, identity)
            self.ranks.barrier()  # before any rank reads it, or writes to it
            self._caches[name] = FolderCache(folder)
        return self._caches[name]

    def _open_folder(self, folder: Path, identity: dict[str, Any]) -> None:
        """Say what stands for the answers in a folder, and empty it if they shall not be reused.

        Of answers that are reused, damaged ones are set aside, before any rank reads them.
        """
        path = folder / IDENTITY_NAME
        if os.path.lexists(path):
            with set_aside_if_damaged(path):
                read_json_object(path)
        if not os.path.lexists(path):
            kept = self.scores_root.glob(f"*/{IDENTITY_NAME}")
            say_why_not("scores", identity, kept, like="selector")
            write_json(path, identity)
        for answer in sorted(folder.glob("*.npz")):
            if self.reuse:
                with set_aside_if_damaged(answer):
                    npz_headers(answer)
            else:
                delete_file(answer)

    def say_what_was_reused(self) -> None:
        """Say in a line for each selector how much of its work was there already, and since when.

        Once for what was reused since the last call, on the first rank, of its own share.
        """
        for cache in self._caches.values():
            if cache.reused and self.ranks.rank == 0:
                oldest = min(cache.reused.values(), key=lambda path: path.stat().st_mtime)
                parts = "1 part" if len(cache.reused) == 1 else f"{len(cache.reused)} parts"
                say_reused(f"the scores or statistics of {parts}", oldest)
            cache.written.update(cache.reused)
            cache.reused.clear()

    def report(self, selector: object, choice: Choice, samples: int, seconds: float) -> None:
        """Add a line to `reports`, which selections carry in their manifest; see `Source`."""
        kept = choice.multiplicities > 0
        record: dict[str, Any] = {
            "selector": type(selector).__name__,
            "samples": samples,
            "kept_samples": int(choice.multiplicities.sum()),
            "kept_distinct": int(kept.sum()),
            "seconds": seconds,
        }
        if isinstance(selector, ScoreSelector) and choice.scores is not None:
            # of a composition, NaN also stands for what an earlier stage has dropped
            record[UNSCORED_KEY] = int(np.isnan(choice.scores).sum())
            record["never_samples"] = int(np.isneginf(choice.scores).sum())
        if choice.scores is not None:
            record["score_quantiles"] = summarise(choice.scores)
            record["score_quantiles_kept"] = summarise(choice.scores[kept])
        if choice.weights is not None and kept.any():
            weights = choice.weights[kept].astype(np.float64)
            record["weights"] = {
                "min": float(weights.min()),
                "mean": float(np.average(weights, weights=choice.multiplicities[kept])),
                "max": float(weights.max()),
            }
        self.reports.append(record)

    def warn(self, text: str) -> None:
        """Warn once of each text, which selections carry in their manifest; see `Source`."""
        if text not in self.warnings:
            self.warnings.append(text)
            super().warn(text)

    def bar(self, total: int, label: str) -> AbstractContextManager[Bar]:
        return show_progress(
            total=total,
            label=label,
            unit="sample",
            bar=self.progress,
            speaks=self.ranks.rank == 0 and total > 0,
            delay_seconds=1.0,  # many pieces of work are shorter
        )

    def identity(self, selector: object, *, with_rule: bool = False) -> dict[str, Any]:
        """Return what an answer depends on: the selector and its code, the pool, and all files.

        Args:
            selector: or a selector and the rows that it chooses from, int64.
            with_rule: for what is kept; scores do not depend on the rule.
        """
        rows = None
        if isinstance(selector, tuple):
            selector, rows = selector
        if not isinstance(selector, Selector):
            raise TypeError(f"a cache belongs to a Selector. Got {type(selector).__name__}.")
        ruled = isinstance(selector, ScoreSelector) and not with_rule
        needs = [member.requires for member in nested(selector, Selector)]  # type: ignore[type-abstract]  # mypy 4717
        named = [column for need in needs for column in (need.column, need.lists)]
        if any(need.sizes for need in needs) and metadata_tables(self.pool):
            named.append(_SIZES)
        columns = dict.fromkeys(column for column in named if column is not None)
        files = dict.fromkeys(file for need in needs for file in need.files)
        of_selector = selector_identity(selector, without=("rule",) if ruled else ())
        return kept_identity(
            "selection" if with_rule else "scores",
            {
                **of_selector,
                "pool": self.pool.fingerprint,
                "tars": self._stamps(needs),
                "features": self._fingerprints([need.features for need in needs]),
                "columns": [self._stamp(column) for column in columns],
                "targets": [self._stamp(file) for file in files],
                "samples": None if rows is None else describe(rows),
                **(self.pool.caption_identity if any(need.captions for need in needs) else {}),
            },
        )

    def _stamp(self, external: ExternalColumn | FeatureFile) -> Any:
        """Return what stands for a column or a target in what is kept, from now on."""
        if external not in self._stamps_of:
            self._stamps_of[external] = self._stamp_now(external)
        return self._stamps_of[external]

    def _stamp_now(self, external: ExternalColumn | FeatureFile) -> Any:
        if isinstance(external, FeatureFile):
            return feature_file_stamp(external)
        return column_stamp(self.pool, external)

    @contextmanager
    def _unchanged(self, column: ExternalColumn) -> Iterator[None]:
        self._stamp(column)
        yield
        self._require_same(column)

    def _require_same(self, external: ExternalColumn | FeatureFile) -> None:
        """Check that what was read is what is kept under its stamp: a stat for each file."""
        if self._stamp_now(external) != self._stamps_of[external]:
            raise has_changed(external.path or self.pool.root, START_AGAIN)

    def _stamps(self, needs: Sequence[Requirements]) -> str | None:
        """Return the stamp of the tars if a selector reads captions or image headers; else None."""
        if not any(need.captions or need.sizes for need in needs):
            return None
        return self.pool.tars_stamp

    def _fingerprints(self, keys_of_members: list[tuple[str, ...]]) -> list[str]:
        """Return the fingerprints of the feature sets that the members of a selector read."""
        fingerprints: set[str] = set()
        for keys in filter(None, keys_of_members):
            store = self._find_store(keys)
            # a composition names the arrays of all its members, which may be in several sets
            stores = [self.store((key,)) for key in keys] + ([store] if store else [])
            fingerprints.update(store.fingerprint for store in stores)
        return sorted(fingerprints)

    def _gather(self, rows: np.ndarray, keys: tuple[str, ...]) -> dict[str, Tensor]:
        store = self.store(keys)
        if store.folder not in self._features:
            self._features[store.folder] = RowFeatures.build(
                store, (), len(self.pool), held_parts=1
            )
        features = self._features[store.folder].gather(rows, keys)
        return {key: values.to(self.device) for key, values in features.items()}

    def take_features(self, rows: np.ndarray, keys: tuple[str, ...]) -> dict[str, Tensor]:
        """Read features of rows, int64 [m], by key, each from the first feature set that has it."""
        return {key: self._gather(rows, (key,))[key] for key in keys}

    def provide(self, column: ExternalColumn, values: np.ndarray) -> None:
        """Take the numbers of a column from an array, float [n] by row, which may change later."""
        self._columns[column] = values

    def _column(self, column: ExternalColumn) -> np.ndarray:
        if column not in self._columns:
            with self._unchanged(column):
                values = read_pool_column(self.pool, column)
            self._columns[column] = values
        return self._columns[column]

    def _all_lists(self, column: ExternalColumn) -> ListColumn:
        if column not in self._lists:
            with self._unchanged(column):
                lists = read_pool_lists(self.pool, column)
            self._lists[column] = lists
        return self._lists[column]

    def _all_sizes(self) -> np.ndarray:
        if self._sizes is None:
            in_metadata = bool(metadata_tables(self.pool))  # else in the tars, which are checked
            with self._unchanged(_SIZES) if in_metadata else nullcontext():
                sizes = read_image_sizes(self.pool, progress=self.progress)
            self._sizes = sizes
        return self._sizes

    def _captions(self, rows: np.ndarray) -> list[str]:
        reader = SampleReader(pool=self.pool, max_image_pixels=1)
        try:
            bound = reader.max_caption_bytes
            return [_caption_or_empty(data, bound) for data in reader.read_captions(rows)]
        finally:
            reader.close()


def _caption_or_empty(data: bytes | BadSampleError, max_bytes: int) -> str:
    if isinstance(data, ChangedTarError):
        raise data.stop()
    try:
        return "" if isinstance(data, BadSampleError) else decode_caption(data, max_bytes)
    except BadSampleError:
        return ""  # a selector may judge it; training counts it as bad
