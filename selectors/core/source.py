"""What a selector reads: samples in parts, with random access, shared among ranks.

A source stands for the same samples on every rank. The work is cut into named tasks, and the task
of number i belongs to rank i modulo the number of ranks. Tasks depend on the source alone, neither
on the ranks nor on the size of chunks.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError, ParameterError, require_text
from siftclip.ranks import Ranks
from siftclip.selectors.kernels.blocks import usable_rows

T = TypeVar("T")

log = logging.getLogger(__name__)

IMAGE, TEXT = "img", "txt"  # the endings of the arrays of a feature set
_WAY_OUT = (
    "Name a feature set of the pool, such as {example}. siftclip.select and the method scores name "
    "those that they are given."
)
TASK_SAMPLES = 1 << 17  # of a task, at most: what a killed run does again, and the share of a rank


def set_name(key: str) -> str:
    """Return the feature set of an array: `l14_img` and `l14_txt` are of the model `l14`."""
    name, _, kind = key.rpartition("_")
    return name if kind in (IMAGE, TEXT) else key


def require_one_width(features: Mapping[str, Tensor]) -> None:
    """Check that all arrays of a feature set have one width.

    Args:
        features: float [n, d] by key.

    Raises:
        InputError: they come from different models.
    """
    first: dict[str, str] = {}
    for key, values in features.items():
        other = first.setdefault(set_name(key), key)
        if values.shape[1:] != features[other].shape[1:]:
            raise InputError(
                f"Images and texts must be features [samples, dim] of one model. {other} and {key} "
                f"are {list(features[other].shape)} and {list(values.shape)}."
            )


class ListColumn(NamedTuple):
    """A list of whole numbers for each sample, such as the concepts that it shows.

    Attributes:
        values: int64 [m], all lists one after the other.
        offsets: int64 [n + 1]; list i is `values[offsets[i] : offsets[i + 1]]`.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import ListColumn
        >>> lists = ListColumn(np.array([7, 8, 9]), np.array([0, 2, 2, 3]))  # [7, 8], [], [9]
        >>> lists.take(np.array([2, 0]))
        ListColumn(values=array([9, 7, 8]), offsets=array([0, 1, 3]))
    """

    values: np.ndarray
    offsets: np.ndarray

    def take(self, index: np.ndarray) -> ListColumn:
        """Take the lists at `index`, int64 [k], in that order."""
        lengths = np.diff(self.offsets)[index]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.repeat(self.offsets[index] - offsets[:-1], lengths)
        return ListColumn(self.values[starts + np.arange(offsets[-1])], offsets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """How a CLIP model turns a cosine into a logit: scale * cosine + bias.

    Attributes:
        scale: the inverse of the temperature; a float64 scalar of torch on a GPU whose model still
            trains, since reading it would wait for the device.
        bias: 0 of models without one; as `scale`.
        has_bias: False: the model was trained without one, and not for a sigmoid loss.
    """

    scale: float | Tensor
    bias: float | Tensor = 0.0
    has_bias: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some samples, as a selector sees them. Nothing in it may be modified.

    `rows` and `uids` are always there, the rest if `Requirements` ask for it.

    Attributes:
        rows: int64 [n], rows of the pool.
        uids: uint64 [n, 2], (high, low).
        features: float [n, d] by key, such as `l14_img`, as they are stored: of a pool often
            float16, and on the device of the source. Compute with `.float()`, and make tensors of
            your own with `device=features.device`.
        captions: n texts.
        sizes: int64 [n, 2], original width and height in pixels; -1 where unknown.
        column: float64 [n]; NaN where it has no value.
        lists: of n lists; empty where there is none.
    """

    rows: np.ndarray
    uids: np.ndarray
    features: dict[str, Tensor] = field(default_factory=dict)
    captions: list[str] | None = None
    sizes: np.ndarray | None = None
    column: np.ndarray | None = None
    lists: ListColumn | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def usable(self) -> Tensor:
        """Find the samples that can be scored by their features: bool [n], on the features' device.

        A vector that is zero, or has a component that is not finite, says nothing about its sample.
        """
        masks = [usable_rows(values) for values in self.features.values()]
        return torch.stack(masks).all(0) if masks else torch.ones(len(self), dtype=torch.bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalColumn:
    """Numbers made elsewhere, keyed by uid.

    `path` is a parquet file with the columns `uid` (32 hexadecimal digits, with dashes or without)
    and `column`, a structured `.npy` with the fields f0, f1 (the uid) and `column`, or a DataComp
    subset file (`.npy`), whose value is how often it lists a uid; `column` is then None. Without a
    path it is a column of the parquet files of the pool's own metadata, or `TRAINING_LOSS`.
    """

    path: str | None
    column: str | None

    def __post_init__(self) -> None:
        if self.path is not None:
            require_text("path", self.path, owner=self)
        if self.column is not None:
            require_text("column", self.column, owner=self)


# The contrastive loss of each sample when it was trained on last; NaN before. In training only.
TRAINING_LOSS = ExternalColumn(path=None, column="training_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFile:
    """Features of other samples than the pool's: of a target, of class names.

    `path` is a file (`.npz`, `.npy`, `.pt`, `.safetensors`) or a folder of such files, whose rows
    are joined in the order of the names; `key` is the array, None for a file with a single one.
    """

    path: str
    key: str | None = None

    def __post_init__(self) -> None:
        require_text("path", self.path)
        if self.key is not None:
            require_text("key", self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a selector reads beside rows and uids.

    Attributes:
        features: keys of arrays, such as `l14_img` (images) and `l14_txt` (captions), all of one
            feature set. `ReadsFeatures.feature_keys` makes them of its name.
        captions: whether it reads the captions.
        sizes: whether it reads the original sizes of the images.
        column: one number per sample, made elsewhere, such as
            `ExternalColumn(path="scores.parquet", column="score")`.
        lists: a column whose values are lists of whole numbers.
        files: features of other samples, such as a target's, that it reads with `source.file`.

    Example:
        >>> from siftclip.selectors import ClipScore
        >>> ClipScore(features="l14", fraction=0.3).requires.features
        ('l14_img', 'l14_txt')
    """

    features: tuple[str, ...] = ()
    captions: bool = False
    sizes: bool = False
    column: ExternalColumn | None = None
    lists: ExternalColumn | None = None
    files: tuple[FeatureFile, ...] = ()


class ReadsFeatures:
    """A selector that reads a feature set by its name, in `features`, or one array of it, in `key`.

    None stands for the features that it is used with, and for the images among them. Derive from
    it and from a selector, and set `self.features` (or `self.key`) from an argument whose default
    is None.

    Example:
        >>> from siftclip.selectors import ClipScore, ReadsFeatures
        >>> issubclass(ClipScore, ReadsFeatures)
        True
        >>> ClipScore(features="l14", fraction=0.3).feature_keys("img", "txt")
        ('l14_img', 'l14_txt')
    """

    features: str | None
    key: str | None

    def feature_keys(self, *endings: str) -> tuple[str, ...]:
        """Return the keys of some arrays of the feature set, such as `l14_img` and `l14_txt`.

        Args:
            endings: "img" for images, "txt" for captions.

        Raises:
            ParameterError: no feature set is named yet.
        """
        name = self._named("features", self.features, 'features="l14"')
        return tuple(f"{name}_{ending}" for ending in endings)

    @property
    def array_key(self) -> str:
        """The key of the one array that is read, such as `l14_img`.

        Raises:
            ParameterError: no array is named yet.
        """
        return self._named("key", self.key, 'key="l14_img"')

    def _named(self, parameter: str, value: str | None, example: str) -> str:
        if value is None:
            raise ParameterError(
                "must be given here: no features are named yet",
                owner=self,
                parameter=parameter,
                way_out=_WAY_OUT.format(example=example),
            )
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Samples that are stored together: those of one feature file, or of one tar.

    Attributes:
        name: unique, fit for the name of a file.
        rows: int64, in the order in which they are stored.
    """

    name: str
    rows: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkUnit:
    """A piece of work that one rank does, and that is not done again once its answer is kept.

    Attributes:
        name: unique among the tasks of a selector, fit for the name of a file.
        rows: int64, rows of the pool.
    """

    name: str
    rows: np.ndarray


class Cache(Protocol):
    """What a selector has worked out and need not work out again. Shared by the ranks."""

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """Return the arrays that were put under `name`, or None."""

    def put(self, name: str, **arrays: np.ndarray) -> None:
        """Keep arrays. Only one rank may put a name, except for equal arrays."""


class DictCache:
    """Keeps arrays in memory."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, np.ndarray]] = {}

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        return self._kept.get(name)

    def put(self, name: str, **arrays: np.ndarray) -> None:
        self._kept[name] = arrays


class Bar(Protocol):
    """A progress bar."""

    def update(self, n: int) -> object:
        """Advance by `n` samples."""


class NoBar:
    """Shows nothing."""

    def update(self, n: int) -> None:
        return None


class Source(ABC):
    """The samples that a selector decides about.

    Attributes:
        rows: int64 [n], ascending, distinct. Scores and multiplicities of a selector are arrays
            aligned with them.
        uids: uint64 [n, 2].
        ranks: the processes that share the work; `ranks.sum(tensor)` adds over them.
        device: of the features that `take` gives.
        chunk_samples: bounds the memory: never hold features of many more samples.
    """

    rows: np.ndarray
    uids: np.ndarray
    ranks: Ranks
    device: torch.device
    chunk_samples: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def whole(self) -> Source:
        """The source before any restriction: the pool."""
        return self

    @abstractmethod
    def parts(self, requires: Requirements) -> list[Part]:
        """Return the samples for which there is what is required. Their rows are disjoint."""

    @abstractmethod
    def take(self, rows: np.ndarray, requires: Requirements) -> Chunk:
        """Read the samples `rows`, int64 [m], in this order; any rows of `parts(requires)`."""

    @abstractmethod
    def file(self, file: FeatureFile) -> Iterator[Tensor]:
        """Read the rows of a feature file, in tensors float [<= chunk_samples, d] on the device."""

    def logits(self, features: str) -> Logits:
        """Return scale and bias of the model behind the features of a name, such as "learner".

        Raises:
            InputError: they are not known.
        """
        raise InputError(
            f"The logit scale of the model of the features {features!r} is not known here: set the "
            "selector's logit_scale for them."
        )

    @abstractmethod
    def cache(self, selector: object) -> Cache:
        """Return what this selector has worked out for this source."""

    @abstractmethod
    def bar(self, total: int, label: str) -> AbstractContextManager[Bar]:
        """Open a progress bar over `total` samples of this rank."""

    def index_of(self, rows: np.ndarray) -> np.ndarray:
        """Find where `rows` stand in `self.rows`: int64 [m]."""
        if len(self.rows) and self.rows[-1] == len(self.rows) - 1:
            return rows  # all rows from 0: a whole pool
        return np.searchsorted(self.rows, rows)

    def tasks(self, requires: Requirements, label: str = "") -> list[WorkUnit]:
        """Split the samples of all parts into tasks of at most TASK_SAMPLES, in their order."""
        return [
            WorkUnit(
                name=f"{label}{part.name}-{start}", rows=part.rows[start : start + TASK_SAMPLES]
            )
            for part in self.parts(requires)
            for start in range(0, len(part.rows), TASK_SAMPLES)
        ]

    def mine(self, tasks: Sequence[WorkUnit]) -> Sequence[WorkUnit]:
        """Return the tasks that belong to this rank."""
        return tasks[self.ranks.rank :: self.ranks.size]

    def chunks(self, rows: np.ndarray, requires: Requirements) -> Iterator[Chunk]:
        """Yield the samples `rows`, int64, in chunks of at most `chunk_samples`."""
        for start in range(0, len(rows), self.chunk_samples):
            yield self.take(rows[start : start + self.chunk_samples], requires)

    def restrict(self, rows: np.ndarray) -> Source:
        """Return the same source with some of its samples only: int64, ascending, distinct."""
        return self if len(rows) == len(self) else RestrictedSource(self, rows)

    def report(self, selector: object, choice: Any, samples: int, seconds: float) -> None:
        """Take note of what a selector has made of `samples` samples. Default: nothing."""
        return None

    def warn(self, text: str) -> None:
        """Tell the user what is odd about a choice; every rank calls it with the same text."""
        if self.ranks.rank == 0:
            log.warning("%s", text)


class RestrictedSource(Source):
    """Some samples of another source."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source = source
        self.rows = rows
        self.uids = source.uids[source.index_of(rows)]
        self.ranks, self.device = source.ranks, source.device
        self.chunk_samples = source.chunk_samples

    @property
    def whole(self) -> Source:
        return self.source.whole

    def parts(self, requires: Requirements) -> list[Part]:
        kept = np.zeros(len(self.source), dtype=bool)
        kept[self.source.index_of(self.rows)] = True
        parts = (
            replace(part, rows=part.rows[kept[self.source.index_of(part.rows)]])
            for part in self.source.parts(requires)
        )
        return [part for part in parts if len(part.rows)]

    def take(self, rows: np.ndarray, requires: Requirements) -> Chunk:
        return self.source.take(rows, requires)

    def chunks(self, rows: np.ndarray, requires: Requirements) -> Iterator[Chunk]:
        return self.source.chunks(rows, requires)

    def file(self, file: FeatureFile) -> Iterator[Tensor]:
        return self.source.file(file)

    def logits(self, features: str) -> Logits:
        return self.source.logits(features)

    def report(self, selector: object, choice: Any, samples: int, seconds: float) -> None:
        self.whole.report(selector, choice, samples, seconds)

    def warn(self, text: str) -> None:
        self.source.warn(text)

    def cache(self, selector: object) -> Cache:
        return self.whole.cache((selector, self.rows))

    def bar(self, total: int, label: str) -> AbstractContextManager[Bar]:
        return self.source.bar(total, label)


def take(chunk: Chunk, index: np.ndarray) -> Chunk:
    """Take the samples of a chunk at `index`, int64 [m], in that order."""
    at = torch.from_numpy(index)
    return Chunk(
        rows=chunk.rows[index],
        uids=chunk.uids[index],
        features={
            key: values[at.to(values.device, non_blocking=True)]
            for key, values in chunk.features.items()
        },
        captions=None if chunk.captions is None else [chunk.captions[i] for i in index],
        sizes=None if chunk.sizes is None else chunk.sizes[index],
        column=None if chunk.column is None else chunk.column[index],
        lists=None if chunk.lists is None else chunk.lists.take(index),
    )
