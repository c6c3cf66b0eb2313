"""A selector on arrays in memory: features, captions and numbers of samples, without a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError, ParameterError
from siftclip.selectors.core.source import (
    IMAGE,
    TEXT,
    Chunk,
    FeatureFile,
    MemorySource,
    Requirements,
)

Array: TypeAlias = np.ndarray | Tensor
Arrays: TypeAlias = Array | Mapping[str, Array]

GIVEN = "given"  # the name of a feature set that came as arrays
# Of a norm from 1: what rounding unit vectors to bfloat16 or float16 leaves. Beyond it, vectors are
# scaled, because every score here is one of directions.
UNIT_TOLERANCE = 4e-3


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
        uids: uint64 [n, 2] of 128-bit numbers that decide ties and random draws; None: the numbers
            of the samples, from 0.
        files: what feature files of the selector hold, [m, d].

    Raises:
        InputError: something that is required is missing, or shapes do not fit together.
    """
    if isinstance(captions, str):
        rule = "must be a list of texts, one for each sample"
        raise ParameterError(rule, owner=owner, parameter="captions", value=captions)
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
    if len(set(lengths.values())) != 1:
        raise InputError(f"All arrays must be of the same samples. Their lengths are {lengths}.")
    samples = next(iter(lengths.values()))
    numbers = np.stack([np.zeros(samples), np.arange(samples)], axis=1).astype(np.uint64)
    chunk = Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=numbers if uids is None else _uids(uids),
        features=features,
        captions=None if captions is None else [*captions],
        sizes=None if sizes is None else np.asarray(sizes, dtype=np.int64),
        column=None if column is None else np.asarray(column, dtype=np.float64),
    )
    lacking = [file.path for file in requires.files if file not in (files or {})]
    if lacking:
        raise ParameterError(
            f"must hold what the selector reads from {lacking}",
            owner=owner,
            parameter="files",
            way_out="siftclip.select and siftclip.score read these files themselves.",
        )
    return MemorySource(chunk, files=files)


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
            there = [words.get(name, name) for name in arrays]
            raise ParameterError(
                f"must be given: the selector reads {words.get(key, 'that array')}",
                owner=owner,
                parameter=words.get(key, f"images[{key!r}]"),
                got=f"the arrays {', '.join(there)}" if there else "no array",
            )
    return {key: unit_rows(arrays[key], words.get(key, key), owner) for key in requires.features}


def unit_rows(values: Any, name: str, owner: object = None) -> Tensor:
    """Return vectors as a tensor, those that are not of unit norm scaled to it (float32 or finer).

    Rows of zeros or with components that are not finite stay: they have no direction, and their
    samples get no score.

    Args:
        values: float [n, d], numpy or torch.
        name: of the parameter, for messages.
        owner: of the parameter, for messages.

    Raises:
        ParameterError: it is no such array.
    """
    tensor = _tensor(values) if isinstance(values, np.ndarray) else values
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
        raise ParameterError(
            "must be a float array [samples, dim], of numpy or torch",
            owner=owner,
            parameter=name,
            got=kind_of(values),
        )
    tensor = tensor.detach()
    exact = torch.promote_types(tensor.dtype, torch.float32)
    norms = torch.linalg.vector_norm(tensor, dim=1, dtype=exact)
    has_direction = norms.isfinite() & (norms > 0)
    if not ((norms - 1).abs() > UNIT_TOLERANCE)[has_direction].any():
        return tensor
    scales = torch.where(has_direction, norms, torch.ones_like(norms))
    return tensor.to(exact) / scales[:, None]


def _tensor(values: np.ndarray) -> Tensor | None:
    if values.dtype.kind not in "fiu":
        return None
    native = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def kind_of(values: Any) -> str:
    """Say what a value is: dtype and shape of an array, of numpy or torch, else its class."""
    if isinstance(values, np.ndarray | Tensor):
        return f"{values.dtype} {list(values.shape)}"
    return type(values).__name__


def _uids(uids: np.ndarray) -> np.ndarray:
    array = np.asarray(uids)
    if array.dtype != np.uint64 or array.ndim != 2 or array.shape[1] != 2:
        raise ParameterError("must be uint64 [samples, 2]", parameter="uids", got=kind_of(array))
    return array
