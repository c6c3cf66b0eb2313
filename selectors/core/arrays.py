"""A selector on arrays in memory: features, captions and numbers of samples, without a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

import numpy as np
from torch import Tensor

from siftclip.errors import InputError, ParameterError
from siftclip.selectors.core.conversion import (
    as_captions,
    as_numbers,
    as_sizes,
    as_uids,
    require_same_samples,
    unit_rows,
    vectors,
)
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import IMAGE, TEXT, Chunk, FeatureFile, Requirements

Array: TypeAlias = np.ndarray | Tensor
Arrays: TypeAlias = Array | Mapping[str, Array]

GIVEN = "given"  # the name of a feature set that came as arrays


class OtherArrays(TypedDict, total=False):
    """What `array_source` takes beside features."""

    captions: Sequence[str] | None
    sizes: Array | None
    column: Array | None
    uids: np.ndarray | None
    files: Mapping[FeatureFile, Tensor] | None


def array_source(
    requires: Requirements,
    *,
    owner: object,
    images: Arrays | None = None,
    texts: Array | None = None,
    captions: Sequence[str] | None = None,
    sizes: Array | None = None,
    column: Array | None = None,
    uids: np.ndarray | None = None,
    files: Mapping[FeatureFile, Tensor] | None = None,
) -> MemorySource:
    """Hold arrays of n samples as what a selector reads.

    Args:
        requires: of the selector, whose features are named (`bind_features` with `GIVEN`).
        owner: the selector, for messages.
        images: float [n, d], numpy or torch, on any device; or a mapping of such arrays by key, as
            an npz file has them, such as `l14_img` and `l14_txt`. Rows that are not of unit norm
            are scaled to it, others stay unchanged, to the bit.
        texts: float [n, e], as the images.
        captions: n texts.
        sizes: int [n, 2], original width and height in pixels.
        column: float [n], what a selector of external scores reads.
        uids: uint64 [n, 2] of 128-bit numbers that decide ties and random draws, or n texts of 32
            hexadecimal digits; None: the numbers of the samples, from 0.
        files: what feature files of the selector hold, [m, d].

    Raises:
        InputError: something that is required is missing, or shapes do not fit together.
    """
    captions = None if captions is None else as_captions(captions, owner=owner)
    column = None if column is None else as_numbers(column, owner=owner, name="column")
    sizes = None if sizes is None else as_sizes(sizes, owner=owner)
    uids = None if uids is None else as_uids(uids, owner=owner)
    features = _features(requires, owner, images, texts)
    given = {
        **(images if isinstance(images, Mapping) else {"images": images, "texts": texts}),
        "captions": captions,
        "sizes": sizes,
        "column": column,
        "uids": uids,
    }
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    _require_given(requires, owner, set(lengths))
    require_same_samples(lengths)
    samples = next(iter(lengths.values()))
    numbers = np.stack([np.zeros(samples), np.arange(samples)], axis=1).astype(np.uint64)
    chunk = Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=numbers if uids is None else uids,
        features=features,
        captions=captions,
        sizes=sizes,
        column=column,
    )
    lacking = [file.path for file in requires.files if file not in (files or {})]
    if lacking:
        raise ParameterError(
            f"must hold what the selector reads from {lacking}",
            owner=owner,
            parameter="files",
            way_out="siftclip.select and siftclip.score read these files themselves.",
        )
    arrays_of = {
        file: vectors(values, f"files[{file.path!r}]", owner)
        for file, values in (files or {}).items()
    }
    return MemorySource(chunk, files=arrays_of, trusted=True)


def _require_given(requires: Requirements, owner: object, given: set[str]) -> None:
    """Raise InputError if something that is no feature is required and not given."""
    needs = {
        "captions": requires.captions,
        "sizes": requires.sizes,
        "column": requires.column is not None,
    }
    for name, needed in needs.items():
        if needed and name not in given:
            rule = "must be given: the selector reads them"
            raise ParameterError(rule, owner=owner, parameter=name)
    if requires.lists is not None:
        raise InputError("The selector reads lists of numbers, which only a pool has: use a pool.")
    if not given:
        rule = "must be given, or captions, or a column: there are no samples"
        raise ParameterError(rule, owner=owner, parameter="images")


def _features(
    requires: Requirements, owner: object, images: Arrays | None, texts: Array | None
) -> dict[str, Tensor]:
    """Return what is required of the features, by key, of unit norm."""
    if isinstance(images, Mapping):
        arrays, words = images, {}
    else:
        names = {key.rpartition("_")[0] for key in requires.features}
        name = names.pop() if len(names) == 1 else GIVEN  # of whichever set the selector reads
        both = {f"{name}_{IMAGE}": images, f"{name}_{TEXT}": texts}
        words = dict(zip(both, ("images", "texts"), strict=True))
        arrays = {key: values for key, values in both.items() if values is not None}
    for key in requires.features:
        if key not in arrays:
            there = [str(words.get(name, name)) for name in arrays]
            raise ParameterError(
                f"must be given: the selector reads {words.get(key, 'that array')}",
                owner=owner,
                parameter=words.get(key, f"images[{key!r}]"),
                got=f"the arrays {', '.join(there)}" if there else "no array",
            )
    return {key: unit_rows(arrays[key], words.get(key, key), owner) for key in requires.features}
