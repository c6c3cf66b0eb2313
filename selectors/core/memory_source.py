"""Samples in memory as a source, whoever made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.ranks import OneRank, Ranks
from siftclip.selectors.core.conversion import (
    as_captions,
    as_numbers,
    as_rows,
    as_sizes,
    as_uids,
    require_same_samples,
    unit_rows,
    vectors,
)
from siftclip.selectors.core.source import (
    Bar,
    Cache,
    Chunk,
    DictCache,
    FeatureFile,
    Logits,
    NoBar,
    Part,
    Requirements,
    Source,
    require_one_width,
    take,
)


class MemorySource(Source):
    """Samples in memory: a super-batch, or the input of a test.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import Chunk, MemorySource, Uniform, run
        >>> uids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]], dtype=np.uint64)
        >>> source = MemorySource(Chunk(rows=np.arange(4), uids=uids))
        >>> run(Uniform(seed=0, fraction=0.5), source).multiplicities
        array([0, 0, 1, 1])
    """

    def __init__(
        self,
        chunk: Chunk,
        *,
        files: Mapping[FeatureFile, Tensor] | None = None,
        logits: Mapping[str, Logits] | None = None,
        part_samples: int | None = None,
        chunk_samples: int = 8192,
        ranks: Ranks | None = None,
        trusted: bool = False,
    ) -> None:
        """Hold a chunk.

        Args:
            chunk: all samples, in any order. It has all that selectors will require.
            files: what `file` gives.
            logits: what `logits` gives.
            part_samples: cut into parts of so many, in the order of the chunk; None: one part.
            chunk_samples: how many samples a method should hold at a time.
            ranks: that share the work.
            trusted: whether all arrays are what they must be. Else they are checked, converted from
                numpy, and features scaled to unit norm where they are not of it.

        Raises:
            InputError: an array is not what it must be, or they are not of the same samples, or two
                arrays of a feature set have different widths.
        """
        if not trusted:
            chunk = checked_chunk(chunk)
            files = {
                file: vectors(values, f"files[{file.path!r}]")
                for file, values in (files or {}).items()
            }
        require_one_width(chunk.features)
        order = np.argsort(chunk.rows)
        self._chunk, self._order, self._files = chunk, order, dict(files or {})
        self._logits = dict(logits or {})
        self._part_samples = part_samples or max(1, len(chunk))
        self.rows, self.uids = chunk.rows[order], chunk.uids[order]
        self.ranks, self.chunk_samples = ranks or OneRank(), chunk_samples
        self._told: set[str] = set()
        devices = {values.device for values in chunk.features.values()}
        self.device = devices.pop() if devices else torch.device("cpu")

    def parts(self, requires: Requirements) -> list[Part]:
        starts = range(0, len(self.rows), self._part_samples)
        return [
            Part(name=f"part{number}", rows=self._chunk.rows[start : start + self._part_samples])
            for number, start in enumerate(starts)
        ]

    def take(self, rows: np.ndarray, requires: Requirements) -> Chunk:
        if np.array_equal(rows, self._chunk.rows):
            taken = self._chunk  # no copy of a whole super-batch
        else:
            taken = take(self._chunk, self._order[np.searchsorted(self.rows, rows)])
        _require_held(taken, requires)
        return replace(taken, features={key: taken.features[key] for key in requires.features})

    def logits(self, features: str) -> Logits:
        return self._logits[features] if features in self._logits else super().logits(features)

    def file(self, file: FeatureFile) -> Iterator[Tensor]:
        if file not in self._files:
            raise InputError(f"The source does not hold what the selector reads from {file.path}.")
        yield from torch.split(self._files[file], self.chunk_samples)

    def cache(self, selector: object) -> Cache:
        return DictCache()

    def warn(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            super().warn(text)

    def bar(self, total: int, label: str) -> AbstractContextManager[Bar]:
        return nullcontext(NoBar())


def checked_chunk(chunk: Chunk) -> Chunk:
    """Return a chunk with arrays that are what they must be: `Chunk` says what.

    Raises:
        InputError: one of them cannot be converted, or they are not of the same samples.
    """
    owner = Chunk
    checked = Chunk(
        rows=as_rows(chunk.rows, owner=owner),
        uids=as_uids(chunk.uids, owner=owner),
        features={key: unit_rows(each, key, owner) for key, each in chunk.features.items()},
        captions=None if chunk.captions is None else as_captions(chunk.captions, owner=owner),
        sizes=None if chunk.sizes is None else as_sizes(chunk.sizes, owner=owner),
        column=None
        if chunk.column is None
        else as_numbers(chunk.column, owner=owner, name="column"),
        lists=chunk.lists,
    )
    arrays = {
        "rows": checked.rows,
        "uids": checked.uids,
        **checked.features,
        "captions": checked.captions,
        "sizes": checked.sizes,
        "column": checked.column,
        "lists": None if checked.lists is None else checked.lists.offsets[1:],
    }
    require_same_samples({name: len(each) for name, each in arrays.items() if each is not None})
    return checked


def _require_held(chunk: Chunk, requires: Requirements) -> None:
    """Check that a chunk has what is required.

    Raises:
        InputError: it lacks something.
    """
    held = {
        name: getattr(chunk, name) is not None for name in ("captions", "sizes", "column", "lists")
    }
    lacking = [name for name, is_held in held.items() if getattr(requires, name) and not is_held]
    lacking += [key for key in requires.features if key not in chunk.features]
    if lacking:
        there = [*chunk.features, *(name for name, is_held in held.items() if is_held)]
        raise InputError(
            f"The samples in memory lack {', '.join(lacking)}, which the selector reads. They have "
            f"{', '.join(there) or 'nothing but rows and uids'}."
        )
