"""The pool, and the features of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from siftclip.trainer.settings.fields.marks import AtMost, Credentials, Example, Needs, Open
from siftclip.trainer.settings.fields.section import (
    Auto,
    Count,
    KeySplit,
    LocalPath,
    Name,
    Samples,
    Section,
    Share,
    Workers,
)
from siftclip.trainer.settings.model import EmbeddingModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings(Section):
    """Webdataset tars in root/shards (DataComp) or in root itself (img2dataset, CC3M, CC12M)."""

    PLACE: ClassVar[str] = "pool"

    root: Annotated[
        str,
        Credentials(),
        Needs("must name the folder of the pool, such as pool.root=/data/datacomp_small."),
        Example("/data/datacomp_small"),
    ]
    """Folder of the pool, or a URL that fsspec reads: s3://..., gs://..., hf://..., http://..."""

    cache_dir: LocalPath | None = None
    """Indices and features; null: ROOT/.siftclip, or ~/.cache/siftclip if read-only or a URL."""

    max_bad_fraction: Share = 0.01
    """Stop if a larger share of the samples is damaged; 0 allows none."""

    key_split: KeySplit = "first_dot"
    """The dot that ends a sample's key in its members' names: first_dot is webdataset's rule."""

    index_workers: Workers | Auto = "auto"
    """Tars indexed at the same time; auto: one per core."""

    storage_options: Annotated[
        Mapping[str, Any], Credentials(), Open(), Example("{anon: true}")
    ] = field(default_factory=dict)
    """Options of a URL's fsspec file system, such as {anon: true}; written without their values."""

    shard_cache_gb: Annotated[float, Ge(0), AtMost(10**9)] = 0
    """GB of whole tars of a URL to keep on the local disk; 0: read ranges each time."""

    max_caption_bytes: Count = 16384
    """Longer captions are bad samples; checked before they are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesSettings(Section):
    """Image and text features of the pool's samples, which selectors read.

    features=metadata: those that the pool brings, DataComp's npz files. features=open_clip: those
    that `siftclip embed` makes.
    """

    PLACE: ClassVar[str] = "features"

    name: Annotated[Name, Example("l14")]
    """The arrays are NAME_img and NAME_txt; DataComp has l14 and b32."""

    root: LocalPath | None = None
    """Folder of the npz files; null: the pool's metadata, or features/NAME in the pool's cache."""

    model: EmbeddingModel | None
    """The model that embeds; null: nothing to embed."""

    batch_size: Samples = 256
    """Samples that the model embeds at once."""

    more: tuple[LocalPath | None, ...] = ()
    """Folders of further feature sets to look for arrays in; null among them: the metadata."""

    chunk_samples: Annotated[int, Ge(1), AtMost(2**30)] = 65536
    """Samples in memory at once."""
